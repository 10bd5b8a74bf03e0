"""Registering our operators with torch.

Not through `torch.library.custom_op`: its wrapper imports the compiler at the first eager call, one to two seconds of
every short script, and costs each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anyup.ops import flop_formulas

_LIBRARY = torch.library.Library("anyup", "FRAGMENT")

BODIES: dict[Any, Callable[..., Any]] = {}
"""What runs when an operator is called, by operator: for a dispatch mode that is to see what a body does."""


def register(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register an operator that mutates nothing and returns new tensors, and return what calls it.

    Args:
        name: the operator is `torch.ops.anyup.<name>`.
        body: what runs, on any device, below autograd; its annotations are the schema.
        fake: what returns empty tensors of the result's exact shapes, dtypes and strides.
        flops: what a call costs, of its arguments, with shapes for tensors (see `anyup.ops.flop_formulas`).
        gradient: of the results, as `torch.library.register_autograd` takes it; None: to differentiate is an error.
        setup_context: what saves for the gradient.
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
