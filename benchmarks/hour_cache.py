"""Triton's cache for a card that is not here: the kernels of whole forwards, compiled under the keys of their launches.

The keys hold the version of Triton and its compiled library: the cache is for a machine with the same wheel of triton,
of the same version of Python. What is not found there is compiled there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from anyup.bench.workloads import square
from anyup.kernels.launch import Target

DTYPES = (torch.bfloat16, torch.float32)
WORKLOADS = (square(448, 32), square(224, 16), square(1024, 64), square(2048, 128))


def make(folder: Path, arch: str = "90") -> int:
    """Fill a folder for a compute capability without the dot; the exit status."""
    from benchmarks.modelled_gpu.ahead_of_time import compilation_of, target_of
    from benchmarks.modelled_gpu.model_steps import steps_of

    # The stages before the machine code are five times as large.
    os.environ.update(TRITON_CACHE_DIR=str(folder.resolve()), TRITON_STORE_BINARY_ONLY="1")
    target = target_of(arch)
    seen: set[str] = set()
    begun = time.monotonic()
    for dtype in DTYPES:
        for workload in WORKLOADS:
            for step in steps_of(workload, dtype, Target(target.backend, target.arch)):
                if step.launch is None:
                    continue
                compilation = compilation_of(step.launch, target)
                if compilation.key not in seen:
                    seen.add(compilation.key)
                    compilation.run()
            print(f"{dtype}, {workload.name}: {len(seen)} kernels, {time.monotonic() - begun:.0f} s", flush=True)
    return 0


def settle(folder: Path) -> None:
    """Make a cache that was moved one that Triton reads: its lists of files hold the paths where they were made."""
    for path in folder.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent.resolve() / name) for name in names}
        path.write_text(json.dumps({"child_paths": here}))
