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
"""Of what a GPU has free, where the caller sets no limit."""

# Not worth asking the system about: so many bytes, and of a GPU one part in so many.
_ALWAYS_FREE = 2**26
_SMALL_SHARE = 16

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}}
_UNITS.update({f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)})


def parse_memory(max_memory: int | str | None, name: str = "max_memory") -> int | None:
    """Bytes of "2GB", "1.5 GB", "800 MiB" or a number of bytes; None stays None.

    Raises a ValueError or TypeError that names the argument, what was expected and what came.
    """
    if max_memory is None:
        return None
    expected = 'expected bytes or a text such as "2GB" or "1.5 GiB"'
    if isinstance(max_memory, bool) or not isinstance(max_memory, (Integral, str)):
        raise TypeError(f"{name}: {expected}, got {max_memory!r}")
    if isinstance(max_memory, str):
        # So many digits that no product of them is infinite.
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)\s*", max_memory, re.I | re.A)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{name}: {expected}, got {max_memory!r}")
        max_memory = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if max_memory < 1:
        raise ValueError(f"{name}: expected a positive amount of memory, got {max_memory!r}")
    return int(max_memory)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CPU or a GPU now, with what caches hold and give; None where it is unknown."""
    if device.type == "cpu":
        return _free_host_memory()
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@cache
def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, which are asked for once; None where it is unknown."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def is_small(needed: int, device: torch.device) -> bool:
    """Whether so many bytes are so few beside a GPU's that nobody asks it what is free.

    That is a call to its driver, which may wait for what runs. Where they are not to be had after all, the call that
    runs out of memory goes on with less.
    """
    total = total_memory(device)
    return total is not None and _SMALL_SHARE * needed <= total


def has_room(needed: int, device: torch.device) -> bool:
    """Whether a call that sets no limit may take so many bytes, as far as is known."""
    if device.type == "cpu" or is_small(needed, device):
        return True
    limit = limit_on(device, None)
    return limit is None or needed <= limit


def is_plain(tensor: Tensor) -> bool:
    """Whether its operations take memory, as far as is known: those of a tracer's tensors, for one, take none."""
    return type(tensor) in (Tensor, nn.Parameter)


def check_room(needed: int, what: str, device: torch.device, hint: str) -> None:
    """Raise ValueError where so many bytes are not to be had on the device: Linux ends a process that takes them."""
    free = free_memory(device) if needed >= _ALWAYS_FREE and not is_small(needed, device) else None
    if free is not None and needed > free:
        raise ValueError(
            f"{what} takes {human_bytes(needed)}, and {human_bytes(free)} of memory are free on {device}; {hint}"
        )


def _free_host_memory() -> int | None:
    """Linux's estimate, the page cache and the swap included, or less where a control group has less."""
    known = host_memory()
    try:
        return min([known["MemAvailable"], *_control_groups()]) + known["SwapFree"]
    except (OSError, KeyError, ValueError):
        return None


def host_memory() -> dict[str, int]:
    """Bytes by the names that Linux gives them in /proc/meminfo; nothing where the system keeps no such account."""
    try:
        lines = [line.split(":") for line in Path("/proc/meminfo").read_text().splitlines()]
        return {name: int(number.split()[0]) * 1024 for name, number in lines}
    except (OSError, ValueError, IndexError):
        return {}


def limit_on(device: torch.device, max_memory: int | str | None) -> int | None:
    """The bytes that a call may allocate: the caller's limit, or `SHARE` of what a GPU has free, or None for any."""
    limit = parse_memory(max_memory)
    if limit is not None:
        return limit
    free = None if device.type == "cpu" else free_memory(device)
    return None if free is None else int(SHARE * free)


def _control_groups(groups: Path = Path("/proc/self/cgroup"), system: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each of the process's control groups with a limit has left, what its page cache would give included."""
    for line in groups.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, names = system, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root = system / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        own = root / group.lstrip("/")  # in a container it may be the root that is its own
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """One number, or none where there is no limit."""
    try:
        most, taken = (int((folder / name).read_text()) for name in (limit, used))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, most - taken + int(statistics[cache]))
    except (OSError, ValueError, KeyError):
        return
