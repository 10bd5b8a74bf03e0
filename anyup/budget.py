"""Amounts of memory: as a caller writes them, as a device has them, and as people read them."""

from __future__ import annotations

import re
from decimal import Decimal

import torch

SHARE = 0.9
"""Of what a GPU has free, where the caller sets no limit."""

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}}
_UNITS.update({f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)})


def parse_memory(max_memory: int | str | None, name: str = "max_memory") -> int | None:
    """Bytes of "2GB", "1.5 GB", "800 MiB" or a number of bytes; None stays None.

    Raises a ValueError or TypeError that names the argument, what was expected and what came.
    """
    if max_memory is None:
        return None
    expected = 'expected bytes or a text such as "2GB" or "1.5 GiB"'
    if isinstance(max_memory, bool) or not isinstance(max_memory, (int, str)):
        raise TypeError(f"{name}: {expected}, got {max_memory!r}")
    if isinstance(max_memory, str):
        # So many digits that no product of them is infinite.
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)\s*", max_memory, re.I | re.A)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{name}: {expected}, got {max_memory!r}")
        max_memory = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if max_memory < 1:
        raise ValueError(f"{name}: expected a positive amount of memory, got {max_memory!r}")
    return max_memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU now, with what torch's allocator holds unused; None where it is unknown."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def limit_on(device: torch.device, max_memory: int | str | None) -> int | None:
    """The bytes that a call may allocate: the caller's limit, or `SHARE` of what a GPU has free, or None for any."""
    limit = parse_memory(max_memory)
    if limit is not None:
        return limit
    free = free_memory(device)
    return None if free is None else int(SHARE * free)
