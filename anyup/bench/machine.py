"""The machine that a figure belongs to: what it is, and how fast its matrix products and copies are."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anyup import __version__
from anyup.bench.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the package is used from one."""

FLOOR_OPERATIONS = 2 * 419_000
"""Of one pixel: the multiplications and additions that the model needs at 448 from 32 with C = 384."""


@dataclass(frozen=True)
class Machine:
    """What every stored row names."""

    device: str
    dtype: str
    threads: int
    torch: str
    anyup: str
    commit: str | None

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe() -> Machine:
    """This machine, with the threads that torch is set to."""
    threads = torch.get_num_threads()
    return Machine(_cpu_model(), "float32", threads, torch.__version__, __version__, _commit())


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Operations a second of a square float32 product, best of `repeats`, on torch's threads."""
    a, b, out = (torch.ones(size, size) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), repeats)


def copy_bandwidth(size: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes, best of `repeats`, on torch's threads."""
    source, target = (torch.ones(size // 4) for _ in range(2))
    return 2 * size / _best(lambda: target.copy_(source), repeats)


def floor_seconds(workload: Workload, rate: float) -> float:
    """The time of the model's arithmetic at a matrix product's `rate`, in operations a second."""
    return FLOOR_OPERATIONS * workload.pixels / rate


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _best(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_model() -> str:
    cores = os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {cores} cores"


def _commit() -> str | None:
    """The checkout's commit, None outside one; "-dirty" where its files, stored results aside, differ."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not (ROOT / ".git").exists():  # an installed wheel may lie below somebody else's checkout
        return None
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit
