"""Large images on little memory: the peak and the work of calls within a budget, each in a child process.

`python -m anyup.bench.high_resolution CASE` is the child. It loads the model, makes a small call (the first one in a
process imports what torch needs for it), and prints as JSON what the case takes above that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import anyup
from anyup.bench import cases, memory
from anyup.bench.floors import CLASSES
from anyup.bench.results import Row
from anyup.bench.workloads import Workload, square
from anyup.budget import parse_memory
from anyup.limited_memory import Plan


@dataclass(frozen=True)
class Case:
    """A workload within a budget; None: without one. With a head its outputs are returned, else streamed to a file."""

    workload: Workload
    budget: str | None
    head: bool

    @property
    def what(self) -> str:
        """What is made of the workload, for people."""
        made = f"{CLASSES}-class head, returned" if self.head else "streamed to a float16 memory map"
        return f"{made}, {self.budget or 'unbounded'}"

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.workload.name}, {self.what}"


CASES = {
    "1024": Case(square(1024, 64), None, head=True),
    "1024 within 600MB": Case(square(1024, 64), "600MB", head=True),
    "2048": Case(square(2048, 128), None, head=True),
    "2048 within 1.5GB": Case(square(2048, 128), "1.5GB", head=True),
    "1024 to a file within 600MB": Case(square(1024, 64), "600MB", head=False),
    "2048 to a file within 1GB": Case(square(2048, 128), "1GB", head=False),
    "4096 to a file within 2GB": Case(square(4096, 256), "2GB", head=False),
}


REACH = ("2048", "2048 within 1.5GB", "4096 to a file within 2GB")
"""What the claims are made about."""


def measure(name: str, threads: int) -> Row:
    """A case in a child process: peak and predicted bytes, processor and wall seconds."""
    command = [sys.executable, "-m", "anyup.bench.high_resolution", name, "--threads", str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{child.stderr}")
    row: Row = json.loads(child.stdout.splitlines()[-1])
    return row


def run(case: Case) -> Row:
    """A case in this process."""
    model = cases.model()
    image, features = case.workload.inputs()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if case.head:
            call, plan = _head(model, image, features, case)
        else:
            call, plan = _file(model, image, features, case, Path(folder))
        for _ in model.stream(image[:, :, :32, :32], features[:, :, :2, :2]):
            pass
        wall, processor = time.perf_counter(), time.process_time()
        found = memory.measure_here(call)
        seconds = time.process_time() - processor
        return {
            "text": case.text,
            "budget_bytes": parse_memory(case.budget),
            "peak_bytes": found.peak_bytes,
            "peak_is_exact": found.exact,
            "predicted_bytes": plan.peak_bytes,
            "kept": plan.kept(),
            "predicted_cost": plan.cost,
            "processor_seconds": seconds,
            "wall_seconds": time.perf_counter() - wall,
            "microseconds_per_pixel": seconds / case.workload.pixels * 1e6,
        }


def _head(
    model: anyup.AnyUp, image: torch.Tensor, features: torch.Tensor, case: Case
) -> tuple[Callable[[], torch.Tensor], Plan]:
    head = torch.nn.Conv2d(case.workload.channels, CLASSES, 1)
    with_head = anyup.with_head(model, head)
    work = case.workload
    plan = anyup.plan(work.size, work.grid, work.channels, values=CLASSES, max_memory=case.budget)
    return lambda: with_head(image, features, max_memory=case.budget), plan


def _file(
    model: anyup.AnyUp, image: torch.Tensor, features: torch.Tensor, case: Case, folder: Path
) -> tuple[Callable[[], torch.Tensor], Plan]:
    shape = (1, case.workload.channels, *case.workload.size)
    out = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
    plan = model.stream(image, features, max_memory=case.budget, out=out).plan
    return lambda: model(image, features, max_memory=case.budget, out=out), plan


def main(argv: list[str] | None = None) -> int:
    """The child process."""
    parser = argparse.ArgumentParser(prog="python -m anyup.bench.high_resolution", description=measure.__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(json.dumps(run(CASES[arguments.case])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
