"""Peak memory of a call: on a CPU the resident set of a child process that makes it once, on a card its allocator's.

`python -m anyup.bench.memory CASE WORKLOAD` is the child, with `--published PATH` for a case of a checkout. It loads
the model, fills the inputs, notes its resident set, makes the call, and prints the peak above that note as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from anyup.bench import cases, workloads
from anyup.bench.cases import Sizes
from anyup.bench.floors import FORWARD, PASSES
from anyup.bench.published_code import CASES, PublishedCode

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def is_for_want_of_memory(error: Exception) -> bool:
    """Whether a call failed because memory did not suffice."""
    return isinstance(error, MemoryError) or _tells_of_it(str(error))


def _tells_of_it(message: str) -> bool:
    return any(text in message for text in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class Memory:
    """Peak bytes above the loaded model and its inputs, the output included.

    `peak_bytes` is None where memory did not suffice. `exact` is False where the system cannot forget an
    earlier peak, which may then hide a smaller one: `peak_bytes` is an upper bound.
    """

    peak_bytes: int | None
    exact: bool = True


def measure_in_child(case: str, sizes: Sizes, *, threads: int | None = None, checkout: Path | None = None) -> Memory:
    """The peak of a case on a CPU, one of `checkout`'s where there is one.

    Raises RuntimeError with the child's messages where it fails for another reason than memory.
    """
    command = [sys.executable, "-m", "anyup.bench.memory", case, sizes.workload.name]
    command += ["--dtype", sizes.dtype, "--pass", sizes.direction]
    command += ["--threads", str(threads or torch.get_num_threads())]
    if sizes.chunk is not None:
        command += ["--chunk", str(sizes.chunk)]
    if checkout is not None:
        command += ["--published", str(checkout)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return Memory(**json.loads(child.stdout.splitlines()[-1]))
    # The kernel kills with signal 9 what takes the last memory.
    if child.returncode == -9 or _tells_of_it(child.stderr):
        return Memory(None)
    raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{child.stderr}")


def measure_on_card(call: cases.Call, device: torch.device) -> Memory:
    """The most that one call allocates on a card above what is allocated before it; after a first call."""
    try:
        call()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return Memory(None)
    return Memory(torch.cuda.max_memory_allocated(device) - before)


def measure_here(call: cases.Call) -> Memory:
    """The peak of one call in this process, above what is resident before it."""
    forgot = _forget_peak()
    before = _resident_bytes()
    earlier = _peak_bytes()
    call()
    peak = _peak_bytes()
    return Memory(peak - before, exact=forgot or peak > earlier)


def _forget_peak() -> bool:
    """Make the kernel start the process's peak anew from what is resident now; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    # Not ru_maxrss where it can be helped: a child inherits there the peak of the process that started it.
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes() -> int:
    resident = _status_bytes("VmRSS")
    return _peak_bytes() if resident is None else resident


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _be_killed_first() -> None:
    """Where memory runs out, this process goes, and not the one that waits for it."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def main(argv: list[str] | None = None) -> int:
    """The child process."""
    parser = argparse.ArgumentParser(prog="python -m anyup.bench.memory", description=__doc__)
    parser.add_argument("case", help=f"one of {cases.WHOLE}, one of {cases.OPERATIONS} with /backend, or of {CASES}")
    parser.add_argument("workload", help='a name, for example "448 from 32"')
    parser.add_argument("--dtype", choices=cases.DTYPES, default="float32")
    parser.add_argument("--pass", dest="direction", choices=PASSES, default=FORWARD)
    parser.add_argument("--chunk", type=int, help="the baseline's queries at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--published", metavar="PATH", help="a checkout of wimmerth/anyup, for its cases")
    arguments = parser.parse_args(argv)
    _be_killed_first()
    torch.set_num_threads(arguments.threads)
    workload = workloads.find(arguments.workload)
    sizes = Sizes(workload, arguments.dtype, arguments.direction, chunk=arguments.chunk)
    build = PublishedCode(arguments.published).build if arguments.published else cases.build
    call = build(arguments.case, sizes)
    print(json.dumps(asdict(measure_here(call))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
