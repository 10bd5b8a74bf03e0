"""The refusals of this process: kernels that did not compile or launch, and backends that failed.

A refusal costs speed and not the result, so it is reported and not raised. `anyup info` and `anyup bench` list them.
"""

from __future__ import annotations

_remembered: dict[str, None] = {}


def remember(text: str) -> None:
    """Add a refusal to the list, unless it is there already."""
    _remembered[text] = None


def remembered() -> tuple[str, ...]:
    """All refusals of this process without repeats, in order of time."""
    return tuple(_remembered)
