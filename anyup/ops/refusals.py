"""What a device refused in this process: kernels that did not compile or launch, and backends that run instead.

A refusal costs speed and no result, so that it is told and not raised; `anyup info` and `anyup bench` list them.
"""

from __future__ import annotations

_remembered: dict[str, None] = {}


def remember(text: str) -> None:
    """Keep a refusal; one that is known already changes nothing."""
    _remembered[text] = None


def remembered() -> tuple[str, ...]:
    """Each refusal of this process once, the first one first."""
    return tuple(_remembered)
