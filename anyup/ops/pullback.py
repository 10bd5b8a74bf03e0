"""How the references differentiate inside an operator's body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def pullback(function: Callable[..., Any], primals: tuple[Any, ...], grad: Any) -> tuple[Any, ...]:
    """The gradients of `primals` (nested tensors), given that of `function(*primals)`.

    An operator's body runs below autograd, where only `torch.func` can differentiate. Tensors of `torch.func` have no
    storage, so this fails under a dispatch mode that reads storages. The other backends have explicit formulas.
    """
    return torch.func.vjp(function, *primals)[1](grad)
