"""`python -m benchmarks.first_hour -o DIR`: what a new card is asked first, what tells most before the rest.

Each part runs in a process of its own, so that a fault of the card ends that part alone, and is ended at its limit with
what it has stored. DIR then holds `summary.md`, a page for people, and `hour.json` with each part's output; beside them
what the parts store as they go. It needs no more than a checkout, torch, triton and pytest:

    PYTHONPATH=. python -m benchmarks.first_hour -o hour [--part NAME ...] [--minutes M] [--cache DIR]

Exit status 0 where every part asked for is well, 1 otherwise; one for which no time is left is not, `tune` excepted.
`--make-cache DIR` compiles the kernels of a forward on a machine without a card, for `--cache DIR` on one with the same
triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from anyup.images import complete_or_absent
from benchmarks import hour_cache, hour_summary, hour_work, limited

ROOT = Path(__file__).resolve().parents[1]

LONGEST = 540.0
"""Seconds that a part may have, at most."""

TESTS = (
    "test_upsampler.py", "test_on_a_card.py", "test_operator.py", "test_kernels.py", "test_encoder_kernels.py",
    "test_key_grid.py",
    "test_other_kernels.py", "test_products.py", "test_tuning.py",
)  # fmt: skip
"""The files of `pytest -m gpu`, what tells most first."""

_WORKERS = 12
_LONGEST_TEST = 200.0  # seconds
_LEAST = 15.0  # seconds: with less a part is not begun
_GRACE = 15.0  # seconds from the wish that a part end to its end
_KEPT = 200_000  # characters of a part's output

_UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.\w+|.+\.partial")
"""The name of a file that was being written."""


@dataclass(frozen=True)
class Part:
    """A part of the hour.

    Attributes:
        name: as `--part` names it.
        description: what it is, for people.
        seconds: its limit.
        command: given the folder of results, and the seconds that it has.
        environment: what it has beside this process's.
        may_end: whether it is well too where it is ended at its limit.
    """

    name: str
    description: str
    seconds: float
    command: Callable[[Path, float], Sequence[str]]
    environment: Callable[[Path], Mapping[str, str]] = field(default=lambda folder: {})
    may_end: bool = False


def _work(*arguments: str) -> Callable[[Path, float], Sequence[str]]:
    return lambda folder, seconds: (
        sys.executable, "-m", "benchmarks.hour_work", *arguments, "-o", str(folder), "--seconds", f"{seconds:.0f}"
    )  # fmt: skip


def _pytest(folder: Path, seconds: float) -> Sequence[str]:
    beside: tuple[str, ...] = ()
    if find_spec("xdist"):
        workers = str(min(os.cpu_count() or 1, _WORKERS))
        # A test at a time for each: in their order, and the slow ones beside the others.
        beside = ("-n", workers, "--dist", "load", "--maxschedchunk", "1")
        if find_spec("pytest_timeout"):  # ends the worker of a test that hangs, and another one goes on
            beside += ("--timeout", f"{_LONGEST_TEST:.0f}", "--timeout-method", "thread")
    files = [str(Path("tests", "device", name)) for name in TESTS]
    options = ("-v", "-rfE", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120", "--results", str(folder))
    return (sys.executable, "-m", "pytest", "-m", "gpu", *files, *options, *beside)


def _tune(folder: Path, seconds: float) -> Sequence[str]:
    return (sys.executable, "-m", "anyup", "tune", "--quick", "--report", str(folder / "tune.json"))


PARTS = (
    Part("machine", "the machine, its rates and `anyup info`", 90.0, _work("machine")),
    Part("tests", "`pytest -m gpu`", 480.0, _pytest),
    Part("model", "whole calls and their stages", 420.0, _work("rows", "model")),
    Part("backward", "backward passes and training steps", 150.0, _work("rows", "backward")),
    Part("sanitizer", "compute-sanitizer on a small forward and backward", 270.0, _work("sanitize")),
    Part("tune", "`anyup tune --quick`, in the time that is left", 530.0, _tune,
         lambda folder: {"ANYUP_CONFIGS": str(folder / "tables")}, may_end=True),
)  # fmt: skip


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        status: "ok", "failed", "out of time", "left out" or, while it runs, "running".
        well: whether there is nothing to look into.
        output: its last output, both streams.
    """

    name: str
    description: str
    status: str = "running"
    well: bool = False
    seconds: float = 0.0
    exit_status: int | None = None
    output: str = ""


def run(
    folder: Path, parts: Sequence[Part], seconds: float, environment: Mapping[str, str], grace: float = _GRACE
) -> list[Outcome]:
    """Run the parts, one after the other, in so many seconds; what became of each is stored before the next begins."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        outcome = Outcome(part.name, part.description)
        outcomes.append(outcome)
        _store(folder, outcomes)
        limit = min(part.seconds, deadline - time.monotonic() - grace)
        if limit < min(_LEAST, part.seconds):
            outcome.status, outcome.well = "left out", part.may_end
        else:
            print(f"== {part.name}: {part.description}, at most {limit:.0f} s", flush=True)
            _run(part, folder, limit, {**environment, **part.environment(folder)}, outcome, grace)
        print(f"== {part.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        _store(folder, outcomes)
    return outcomes


def _run(
    part: Part, folder: Path, limit: float, environment: Mapping[str, str], outcome: Outcome, grace: float
) -> None:
    begun, left, output = time.monotonic(), limit, ""
    while left > 0:
        more, outcome.exit_status = limited.run(
            part.command(folder, left), left, grace=grace, folder=ROOT, environment=environment
        )
        output, left = output + more, limit - (time.monotonic() - begun)
        if outcome.exit_status != hour_work.LOST:
            break
    outcome.seconds, outcome.output = time.monotonic() - begun, output[-_KEPT:]
    if outcome.exit_status is None:
        outcome.status, outcome.well = "out of time", part.may_end
    else:
        outcome.status, outcome.well = "failed" if outcome.exit_status else "ok", not outcome.exit_status
    for path in folder.rglob("*"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()
    print("\n".join(outcome.output.strip().splitlines()[-12:]), flush=True)


def _store(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The outcomes, beside those of other parts that an earlier command left there, and the page."""
    path = folder / "hour.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else []
    parts = {part["name"]: part for part in (*earlier, *map(asdict, outcomes))}
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps({"parts": list(parts.values())}, indent=1) + "\n", encoding="utf-8")
    try:
        page = hour_summary.page(folder)
    except Exception as error:  # of a file that is not what it should be: the next part runs all the same
        page = f"No page, see hour.json: {type(error).__name__}: {error}\n"
    with complete_or_absent(folder / "summary.md") as partial:
        partial.write_text(page, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_hour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of the results")
    names = [part.name for part in PARTS]
    parser.add_argument("--part", nargs="+", choices=names, metavar="NAME", help=f"only these: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=28.0, metavar="M", help="for all parts (default: 28)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="Triton's cache, made before or by another run")
    parser.add_argument("--make-cache", type=Path, metavar="DIR", help="compile for --cache, without a card, and end")
    arguments = parser.parse_args(argv)
    if arguments.make_cache:
        return hour_cache.make(arguments.make_cache)
    if arguments.output is None:
        parser.error("-o DIR: expected a folder for the results")
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {arguments.minutes}")
    if arguments.cache and not arguments.cache.is_dir():
        parser.error(f"--cache: expected a folder, there is none at {arguments.cache}")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "ANYUP_CONFIGS": "off"}
    if arguments.cache:
        hour_cache.settle(arguments.cache)
        environment["TRITON_CACHE_DIR"] = str(arguments.cache.resolve())
    folder = arguments.output.resolve()
    chosen = [part for part in PARTS if not arguments.part or part.name in arguments.part]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part at hand ends too
    outcomes = run(folder, chosen, 60 * arguments.minutes, environment)
    print(f"\n{(folder / 'summary.md').read_text(encoding='utf-8')}")
    return 0 if all(outcome.well for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
