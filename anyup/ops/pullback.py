"""Differentiating inside an operator's body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


def pullback(function: Callable[..., Any], primals: tuple[Any, ...], grad: Any) -> tuple[Any, ...]:
    """The gradients of `primals` (nested tensors), given that of `function(*primals)`.

    An operator's body runs below autograd, where only `torch.func` differentiates. Its tensors have no storage, which a
    dispatch mode (a counter of operations, say) would look at: the modes see the operator, not its inside.
    """
    with _disable_current_modes():
        return torch.func.vjp(function, *primals)[1](grad)
