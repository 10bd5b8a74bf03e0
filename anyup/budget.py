"""Amounts of memory: as a caller writes them, as a device has them, and as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from anyup.progress import human_bytes

SHARE = 0.9
"""The share of a GPU's free memory that a call may allocate where the caller sets no limit."""

# A smaller allocation than `_ALWAYS_FREE` bytes, or than 1 / `_SMALL_SHARE` of a GPU's memory, is made without a look
# at the free memory.
_ALWAYS_FREE = 2**26
_SMALL_SHARE = 16

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}}
_UNITS.update({f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)})


def parse_memory(max_memory: float | str | None, name: str = "max_memory") -> int | None:
    """Bytes of "2GB", "1.5 GB", "800 MiB" or a whole number of bytes, as 2e9 is one; None stays None.

    Raises a ValueError or TypeError that names the argument, what was expected and what came.
    """
    if max_memory is None:
        return None
    expected = 'expected bytes or a text such as "2GB" or "1.5 GiB"'
    if isinstance(max_memory, float) and max_memory.is_integer():
        max_memory = int(max_memory)
    if isinstance(max_memory, bool) or not isinstance(max_memory, (Integral, str)):
        raise TypeError(f"{name}: {expected}, got {max_memory!r}")
    if isinstance(max_memory, str):
        # At most 18 digits, so that the product with the unit stays finite.
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)\s*", max_memory, re.I | re.A)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{name}: {expected}, got {max_memory!r}")
        max_memory = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if max_memory < 1:
        raise ValueError(f"{name}: expected a positive amount of memory, got {max_memory!r}")
    return int(max_memory)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a CPU or a GPU can allocate now, memory that caches would give back included; None: unknown."""
    if device.type == "cpu":
        return _free_host_memory()
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@cache
def total_memory(device: torch.device) -> int | None:
    """All bytes of a GPU's memory, looked up once for each device; None: unknown."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def is_small(needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes are at most a sixteenth of a GPU's memory, so that its free memory is not looked up.

    The look-up is a call of the driver, which may wait for running kernels. If the memory turns out to be full, the
    allocation fails and the call goes on with half the budget.
    """
    total = total_memory(device)
    return total is not None and _SMALL_SHARE * needed <= total


def has_room(needed: int, device: torch.device) -> bool:
    """Whether a call without `max_memory` may allocate `needed` bytes; True where the free memory is unknown."""
    if device.type == "cpu" or is_small(needed, device):
        return True
    limit = limit_on(device, None)
    return limit is None or needed <= limit


def is_plain(tensor: Tensor) -> bool:
    """Whether operations on this tensor allocate memory: those on a tracer's tensors do not."""
    return type(tensor) in (Tensor, nn.Parameter)


def check_room(needed: int, what: str, device: torch.device, hint: str) -> None:
    """Raise ValueError where `needed` bytes are not free on the device: Linux kills a process that takes more."""
    free = free_memory(device) if needed >= _ALWAYS_FREE and not is_small(needed, device) else None
    if free is not None and needed > free:
        raise ValueError(
            f"{what} takes {human_bytes(needed)}, and {human_bytes(free)} of memory are free on {device}; {hint}"
        )


def _free_host_memory() -> int | None:
    """Linux's estimate, page cache and swap included, or the limit of a control group where that is smaller."""
    known = host_memory()
    try:
        return min([known["MemAvailable"], *_control_groups()]) + known["SwapFree"]
    except (OSError, KeyError, ValueError):
        return None


def host_memory() -> dict[str, int]:
    """The entries of Linux's /proc/meminfo in bytes, by name; empty on other systems."""
    try:
        lines = [line.split(":") for line in Path("/proc/meminfo").read_text().splitlines()]
        return {name: int(number.split()[0]) * 1024 for name, number in lines}
    except (OSError, ValueError, IndexError):
        return {}


def limit_on(device: torch.device, max_memory: float | str | None) -> int | None:
    """The bytes that a call may allocate: the caller's limit, else `SHARE` of a GPU's free memory; None: no limit."""
    limit = parse_memory(max_memory)
    if limit is not None:
        return limit
    free = None if device.type == "cpu" else free_memory(device)
    return None if free is None else int(SHARE * free)


def _control_groups(groups: Path = Path("/proc/self/cgroup"), system: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """The free bytes of each control group of the process that has a limit, its page cache counted as free."""
    for line in groups.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, names = system, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root = system / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        own = root / group.lstrip("/")  # in a container the root folder may be the group's own
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """The free bytes of one control group; yields nothing where it has no limit."""
    try:
        most, taken = (int((folder / name).read_text()) for name in (limit, used))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, most - taken + int(statistics[cache]))
    except (OSError, ValueError, KeyError):
        return
