"""What the parts of `benchmarks.first_hour` do, each in a process of its own.

The last line of the output says what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from anyup import AnyUp
from anyup.bench import command as bench
from anyup.bench import machine
from anyup.bench.clock import CardLost, CudaClock
from anyup.bench.engine import Speeds
from anyup.bench.results import ResultsFile
from anyup.bench.suite import essential
from anyup.bench.workloads import Workload
from anyup.cli import info
from anyup.images import complete_or_absent
from anyup.ops.refusals import remembered
from benchmarks import limited

DEVICE = "cuda"

LOST = 75
"""The exit status of work that has lost the card; in a new process it goes on with what it has not done."""

_BUDGET, _REPEATS = 20.0, 3
"""Seconds of a call, which is left out beyond, and how often it is repeated."""

SMALL = Workload((40, 36), (5, 4), channels=48)
"""Partial tiles, and few programs: under a sanitizer a program takes many times as long."""

TOOLS = ("memcheck", "racecheck")

ALONE = (sys.executable, "-m", "benchmarks.hour_work", "small")

_SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: \d+ hazards? displayed \()(\d+) error")


def describe(folder: Path) -> int:
    """The machine: `machine.json`, and `anyup info`."""
    facts: dict[str, Any] = {**machine.describe(DEVICE), "clocks": machine.clocks(DEVICE)}
    facts |= {"cores": os.cpu_count(), "system": platform.platform(), "nvidia-smi": _answer(["nvidia-smi"])}
    facts["packages"] = {d.name: d.version for d in metadata.distributions() if d.name}
    path = folder / "machine.json"
    _write(path, facts)  # before anything runs on the card
    facts["info"] = info.report(DEVICE)
    print(facts["info"])
    speeds = Speeds.measure(DEVICE, CudaClock(torch.device(DEVICE)).once)
    facts |= {"matmul_rates": dict(speeds.rates), "copy_bandwidth": speeds.bandwidth}
    facts["clocks_after"] = machine.clocks(DEVICE)
    _write(path, facts)
    rates = ", ".join(f"{dtype} {rate / 1e12:.1f}" for dtype, rate in speeds.rates.items())
    print(f"{facts['device']}: products at {rates} TFLOP/s, a copy at {speeds.bandwidth / 1e12:.2f} TB/s")
    return 0


def measure(folder: Path, name: str) -> int:
    """Rows of `anyup bench` in `results.json`; 1 where some are wrong or failed, `LOST` where the card is."""
    file = ResultsFile(folder / "results.json", machine.describe(DEVICE))
    chosen = bench.Options(folder, DEVICE, budget=_BUDGET, repeats=_REPEATS)
    try:
        bench.run_suite(essential(DEVICE)[name], file, chosen)
    except (bench.RowsError, CardLost) as error:
        print(error)
        return LOST if isinstance(error, CardLost) else 1
    print(f"{len(file.rows)} rows in {file.path.name}")
    return 0


def small() -> int:
    """A forward, and a forward and backward, through every kernel that they have, in half and in full precision."""
    image, features = SMALL.inputs()
    torch.manual_seed(0)
    wide = AnyUp().to(DEVICE).eval()
    for dtype in (torch.float32, torch.bfloat16):
        upsampler, given = wide.to(dtype), [t.to(DEVICE, dtype) for t in (image, features)]
        with torch.inference_mode():
            upsampler(*given)
        upsampler(*(t.requires_grad_() for t in given)).float().square().mean().backward()
        torch.cuda.synchronize()
        print(f"{dtype}: ran", flush=True)
    for text in remembered():
        print(f"refused: {text}")
    print(_RAN)
    return 0


_RAN = "small: all ran"


def sanitize(seconds: float) -> int:
    """`small` as it is, then under each tool of compute-sanitizer that runs here; 1 where an error is found."""
    share = seconds / (len(TOOLS) + 1)
    output, status = limited.run(ALONE, share)
    print(output)
    if status or _RAN not in output:
        print(f"without a sanitizer: {_ended(status)}: {_last(output)}")
        return 1
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("ran; not checked: compute-sanitizer is not installed")
        return 0
    lines, faults = [], 0
    for tool in TOOLS:
        # The allocator's blocks would hide an access beyond a tensor in what it keeps for the next one.
        given = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        # What torch asks the driver for and does not get is no fault.
        command = [sanitizer, "--tool", tool, "--report-api-errors", "no", *ALONE]
        output, status = limited.run(command, share, environment=given)
        print(f"-- {tool}\n{output}", flush=True)
        found = _SUMMARY.findall(output)
        number = sum(map(int, found))
        faults += number
        if number or (found and _RAN in output):
            lines.append(f"{tool}: {number} errors" + ", and the program did not end" * (_RAN not in output))
        else:
            lines.append(f"{tool}: did not run here ({_ended(status)}: {_last(output)})")
    print("; ".join(lines))
    return 1 if faults else 0


def _answer(command: Sequence[str]) -> str:
    try:
        return limited.run(command, 20.0)[0]
    except OSError as error:
        return str(error)


def _ended(status: int | None) -> str:
    return "it ran out of its time" if status is None else f"exit status {status}"


def _last(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _write(path: Path, facts: Any) -> None:
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """A part's process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hour_work", description=__doc__)
    parser.add_argument("work", choices=("machine", "rows", "sanitize", "small"))
    parser.add_argument("name", nargs="?", help="of rows: model or backward")
    parser.add_argument("-o", "--output", type=Path, default=Path())
    parser.add_argument("--seconds", type=float, default=300.0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here")
        return 1
    return {
        "machine": lambda: describe(arguments.output),
        "rows": lambda: measure(arguments.output, arguments.name),
        "sanitize": lambda: sanitize(arguments.seconds),
        "small": small,
    }[arguments.work]()


if __name__ == "__main__":
    sys.exit(main())
