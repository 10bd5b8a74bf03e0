"""`anyup bench`: the suite on this machine, a table in the terminal, results.json and report.html in a folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from anyup.bench import machine
from anyup.bench.clock import CudaClock, require_a_living_card
from anyup.bench.engine import Engine, Speeds
from anyup.bench.implementations import Builder
from anyup.bench.published_code import PublishedCode, has_natten
from anyup.bench.report import formatting
from anyup.bench.results import MachineError, ResultsFile, Row
from anyup.bench.stored import FAULTS
from anyup.bench.suite import Comparison, comparisons
from anyup.bench.timing import Clock, host_clock
from anyup.ops.refusals import remembered
from anyup.options import UsageError
from anyup.progress import human_bytes
from anyup.run_lock import folder_for, only_run

_BUSY_LOAD = 0.5
_STEADY = 0.1  # a matrix product's rate before and after may differ by as much


class RowsError(AssertionError):
    """Results that differ from the baseline's, or calls that ended with an error: other rows are there all the same."""


@dataclass(frozen=True)
class Options:
    """What the command line says; see `anyup.bench.arguments`."""

    output: Path
    device: str
    quick: bool = False
    published: Path | None = None
    budget: float = 180.0
    threads: int | None = None
    repeats: int = 5
    only: tuple[str, ...] = ()
    restart: bool = False


def options(arguments: argparse.Namespace) -> Options:
    """The options, checked. Raises UsageError naming the one that is wrong."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: torch finds no CUDA device here")
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"-o: expected a folder, {output} is a file")
    return Options(
        output,
        device,
        arguments.quick,
        Path(arguments.published) if arguments.published else None,
        arguments.budget,
        arguments.threads,
        arguments.repeats,
        tuple(arguments.only or ()),
        arguments.restart,
    )


def run(arguments: argparse.Namespace) -> None:
    """The command. Raises UsageError before any work, RowsError at the end where rows are wrong or failed."""
    chosen = options(arguments)
    try:
        code = PublishedCode(chosen.published) if chosen.published else None
    except (ValueError, ImportError) as error:
        raise UsageError(f"--published: {error}") from error
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    stored = chosen.output / "results.json"
    with folder_for(chosen.output), only_run(stored, lambda text: _note(text, None)):
        try:
            file = ResultsFile(stored, machine.describe(chosen.device), restart=chosen.restart)
        except MachineError as error:
            raise UsageError(str(error)) from error
        _warn_of_load()
        suite = comparisons(chosen.device, quick=chosen.quick, published=code is not None, natten=has_natten())
        if chosen.only:
            suite = [comparison for comparison in suite if comparison.group in chosen.only]
        run_suite(suite, file, chosen, code)


def run_suite(
    suite: Sequence[Comparison], file: ResultsFile, chosen: Options, code: PublishedCode | None = None
) -> None:
    """Measure the machine and the suite into a file and write its page; raises RowsError where rows are at fault."""
    clock: Clock = CudaClock(torch.device(chosen.device)).once if chosen.device != "cpu" else host_clock
    speeds = Speeds.measure(chosen.device, clock)
    engine = Engine(speeds, clock, Builder(clock, code), budget=chosen.budget, repeats=chosen.repeats)
    file.put(
        (),
        matmul_rate=speeds.rates["float32"],
        matmul_rates=dict(speeds.rates),
        copy_bandwidth=speeds.bandwidth,
        clocks=machine.clocks(chosen.device),
    )
    try:
        measure(engine, suite, file)
    finally:
        _note_refusals(file)
    after = machine.matmul_rate(device=chosen.device, clock=clock)
    bandwidth = machine.copy_bandwidth(device=chosen.device, clock=clock)
    file.put((), matmul_rate_after=after, copy_bandwidth_after=bandwidth, clocks_after=machine.clocks(chosen.device))
    if abs(after - speeds.rates["float32"]) > _STEADY * speeds.rates["float32"]:
        print(
            f"warning: a matrix product ran at {speeds.rates['float32'] / 1e9:.0f} GFLOP/s before and "
            f"{after / 1e9:.0f} after: the machine was busy or throttled",
            file=sys.stderr,
        )
    print(file.path)
    _write_report(file)
    faults = [row["id"] for row in file.rows if row["status"] in FAULTS]
    if faults:
        raise RowsError(f"{len(faults)} of {len(file.rows)} rows are wrong or failed: {', '.join(faults)}")


def _note_refusals(file: ResultsFile) -> None:
    """Say what the device refused, and keep it with what an earlier run of the same file noted."""
    for text in remembered():
        _note(f"refused: {text}", None)
    file.put((), refused=list(dict.fromkeys([*file.machine.get("refused", ()), *remembered()])))


def measure(engine: Engine, suite: Sequence[Comparison], file: ResultsFile, stream: TextIO | None = None) -> None:
    """Run what the file does not hold yet, comparison by comparison; the file is complete after each.

    Raises CardLost where a card does not answer any more; the same in a new process goes on behind the comparison.
    """
    todo = [c for c in suite if any(c.identity(implementation) not in file for implementation in c.implementations)]
    stored = len(suite) - len(todo)
    if stored:
        _note(f"{stored} of {len(suite)} comparisons are stored in {file.path}", stream)
    begun = time.perf_counter()
    for number, comparison in enumerate(todo):
        left = (time.perf_counter() - begun) / number * (len(todo) - number) if number else None
        rest = "" if left is None else f", about {max(left / 60, 1):.0f} min left"
        _note(f"[{stored + number + 1}/{len(suite)}] {comparison.name}{rest}", stream)
        failure: Exception | None = None
        try:
            rows = engine.run(comparison)
        except Exception as error:  # outside the calls, or of a card that fails late
            rows, failure = engine.failed(comparison, error), error
        file.put(rows)
        for row in rows:
            print(line(row), flush=True)
            if row.get("busy"):
                _note(f"warning: {row['id']}: repeats spread by {row['spread']:.0%}: the machine was busy", stream)
        if failure is not None:
            require_a_living_card(failure)


def line(row: Row) -> str:
    """A row in the terminal."""
    name = f"{row['workload']:<24} {row['operation']:<28.28} {row['backend']:<21} {row['dtype']:<9}"
    name += "both " if row["pass"] != "forward" else ""
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['reason']}"
    parts = [f"{row['seconds']:9.6f} s" if row.get("host_seconds") else f"{row['seconds']:9.4f} s"]
    if row.get("host_seconds"):
        parts.append(f"host {row['host_seconds']:.6f} s" + ", which the card waited for" * (not row["ahead"]))
    if row.get("spread") is not None:
        parts.append(f"spread {row['spread']:4.0%}")
    if row.get("times_floor"):
        parts.append(f"{row['times_floor']:6.2f} x floor")
    if row.get("peak_bytes"):
        parts.append(human_bytes(row["peak_bytes"]))
    if row.get("speed_up"):
        parts.append(f"{row['speed_up']:.1f} times as fast")
    if row.get("stages"):
        parts += [f"{stage} {formatting.seconds(seconds)}" for stage, seconds in row["stages"].items()]
    return f"{name} " + "  ".join(parts)


def _write_report(file: ResultsFile) -> None:
    from anyup.bench.report.page import write_report

    page = file.path.with_name("report.html")
    try:
        write_report(file.as_dict(), page)
    except ImportError as error:
        print(f"no report.html: {error}", file=sys.stderr)
        return
    print(page)


def _warn_of_load() -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY_LOAD:
        print(f"warning: the load is {load:.1f} already: figures want an idle machine", file=sys.stderr)


def _note(text: str, stream: TextIO | None) -> None:
    print(text, file=stream or sys.stderr, flush=True)
