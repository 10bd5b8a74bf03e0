"""Registers our operators with torch.

`torch.library.custom_op` is not used: its wrapper imports the compiler at the first eager call, which takes one to two
seconds, and it slows down each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anyup.ops import flop_formulas

_LIBRARY = torch.library.Library("anyup", "FRAGMENT")

BODIES: dict[Any, Callable[..., Any]] = {}
"""The body of each operator, for a dispatch mode that has to see the operations inside a body."""


def register(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register an operator that mutates nothing and returns new tensors; return the function that calls it.

    Args:
        name: the operator is `torch.ops.anyup.<name>`.
        body: the computation, on any device and below autograd; its annotations give the schema.
        fake: returns empty tensors with the result's exact shapes, dtypes and strides.
        flops: takes the arguments, with shapes in place of tensors, and returns the operations of a call (see
            `anyup.ops.flop_formulas`).
        gradient: the backward function for `torch.library.register_autograd`; None: a backward pass is an error.
        setup_context: saves what the backward function needs.
    """
    _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"anyup::{name}", fake, lib=_LIBRARY)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"anyup: {name} cannot be differentiated")

    torch.library.register_autograd(f"anyup::{name}", gradient or refuse, setup_context=setup_context, lib=_LIBRARY)
    packet = getattr(torch.ops.anyup, name)
    flop_formulas.count(packet, flops)
    BODIES[packet.default] = body
    return packet.default
