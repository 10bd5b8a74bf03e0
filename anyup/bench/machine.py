"""The machine that a figure belongs to: what it is, and how fast its matrix products and copies are."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from anyup import __version__
from anyup.bench.timing import Clock, host_clock
from anyup.ops.precision import float32_matmul_precision

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the package is used from one."""


PRODUCT_SIDES = {"cpu": 2048, "cuda": 8192}
"""Of the square product that a machine's rate is measured with: a smaller one does not fill a card."""


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """This machine and these versions, with the threads that torch is set to: what results are stored with."""
    device = torch.device(device)
    on_card = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_card else _cpu_model(),
        "device_kind": "cuda" if on_card else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "anyup": __version__,
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "precision": float32_matmul_precision(device.type),
    }


def clocks(device: torch.device | str) -> dict[str, str] | None:
    """A card's clocks, memory and power as nvidia-smi has them now; None on a CPU, or where there is no nvidia-smi."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    fields = (
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "temperature.gpu",
        "power.draw",
        "power.limit",
        "driver_version",
    )
    # By its own number: torch counts the visible cards alone, nvidia-smi all.
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={card}"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    values = [value.strip() for value in output.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def matmul_rate(
    size: int | None = None,
    repeats: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    clock: Clock = host_clock,
) -> float:
    """Operations a second of a square product of random numbers, best of `repeats`; on a CPU on torch's threads.

    `size` is by default that of `PRODUCT_SIDES`.
    """
    size = size or PRODUCT_SIDES[torch.device(device).type]
    # Numbers that are all alike take less power, and a card runs faster.
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), repeats, clock)


def copy_bandwidth(
    size: int = 2**28, repeats: int = 5, *, device: torch.device | str = "cpu", clock: Clock = host_clock
) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes, best of `repeats`; on a CPU on torch's threads."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _best(lambda: target.copy_(source), repeats, clock)


def _best(function: Callable[[], object], repeats: int, clock: Clock) -> float:
    function()
    return min(clock(function).seconds for _ in range(repeats))


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


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
