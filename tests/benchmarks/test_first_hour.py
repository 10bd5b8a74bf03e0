"""`python -m benchmarks.first_hour`: its parts where ttsem pretends a card; what it makes of parts that end badly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.checkouts import ROOT
from support.patience import PATIENCE, wait_until

from anyup.cli import command as cli
from benchmarks import first_hour, hour_cache, hour_summary, hour_work
from benchmarks.first_hour import PARTS, Part

TESTS = ROOT / "tests"
REHEARSED = str(TESTS / "support" / "rehearsed_hour.py")


def part(name: str, program: str, seconds: float = 60.0, **more: Any) -> Part:
    """A part whose process runs this Python in the folder of the results."""
    return Part(name, f"of {name}", seconds, lambda folder, _: (sys.executable, "-c", program, str(folder)), **more)


def run(folder: Path, *parts: Part, seconds: float = 600.0, environment: Mapping[str, str] | None = None) -> list[Any]:
    return first_hour.run(folder, parts, seconds, environment or {}, grace=1.0)


def assert_fits(folder: Path) -> None:
    """What comes back from a machine that gives little back."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) <= 8, files
    for path in files:
        assert path.stat().st_size <= 2**24 and len(path.relative_to(folder).parents) <= 3
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in path.relative_to(folder).parts), path


def alive(number: int) -> bool:
    """Whether a process runs on; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(number: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


STORES = "import pathlib, sys; pathlib.Path(sys.argv[1], 'rows').write_text('some')"


def test_a_part_that_fails_does_not_stop_the_next_and_both_are_told(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        part("first", f"{STORES}; print('so far'); raise SystemExit('illegal memory access')"),
        part("crash", "import os; os.abort()"),
        part("next", "print('12 | passed')"),
    )
    assert [outcome.status for outcome in found] == ["failed", "failed", "ok"]
    assert [outcome.well for outcome in found] == [False, False, True]
    stored = json.loads((tmp_path / "hour.json").read_text())["parts"]
    assert [(one["name"], one["status"], one["exit_status"]) for one in stored] == [
        ("first", "failed", 1), ("crash", "failed", -6), ("next", "ok", 0)
    ]  # fmt: skip
    assert stored[0]["output"] == "so far\nillegal memory access\n"
    page = (tmp_path / "summary.md").read_text()
    assert "**Not all is well.**" in page and "| next: of next | ok | 0 | 12 \\| passed |" in page
    assert re.search(r"\| first: of first \| \*\*failed\*\* \| \d+ \| illegal memory access \|", page)


@pytest.mark.slow
def test_a_part_that_overruns_is_ended_with_all_that_it_started_and_keeps_what_it_stored(tmp_path: Path) -> None:
    stubborn = f"{STORES}\nimport signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "pathlib.Path(sys.argv[1], f'.results.{child.pid}-0123abcd.json').write_text('half')\n"
        "time.sleep(600)"
    )
    begun = time.monotonic()
    # As long as Python takes to begin on a busy machine.
    found = run(tmp_path, part("slow", stubborn, seconds=10.0), part("next", "print('here')"))
    assert [outcome.status for outcome in found] == ["out of time", "ok"] and not found[0].well
    assert time.monotonic() - begun < 300
    assert not alive(int(found[0].output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hour.json", "rows", "summary.md"]


def test_a_part_that_loses_the_card_goes_on_in_a_new_process(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; done = pathlib.Path(sys.argv[1], 'rows'); done.touch()\n"
        "number = len(done.read_text()) + 1; done.write_text(number * 'x'); print(number)\n"
        f"raise SystemExit({hour_work.LOST} if number < 3 else 1)"
    )
    (found,) = run(tmp_path, part("model", program))
    assert (found.status, found.exit_status, found.output.split()) == ("failed", 1, ["1", "2", "3"])


@pytest.mark.slow
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["as started", "in background"])
def test_a_part_that_may_end_is_asked_to_first_and_is_well(handler: Any, tmp_path: Path) -> None:
    told = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('kept what was found')"
    before = signal.signal(signal.SIGINT, handler)
    try:
        (found,) = run(tmp_path, part("tune", told, seconds=5.0, may_end=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found.status, found.well, found.output) == ("out of time", True, "kept what was found\n")
    assert "All is well." in (tmp_path / "summary.md").read_text()


def test_a_file_that_the_page_cannot_read_stops_no_part(tmp_path: Path) -> None:
    found = run(tmp_path, part("first", f"{STORES.replace('rows', 'results.json')}"), part("next", "print(1)"))
    assert [outcome.status for outcome in found] == ["ok", "ok"]
    assert "No page, see hour.json: JSONDecodeError" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_a_run_that_is_ended_ends_its_part(tmp_path: Path) -> None:
    program = f"{STORES.replace('some', 'begun')}; import time; time.sleep(600)"
    code = (
        "import sys; from benchmarks import first_hour\n"
        f"command = lambda folder, _: (sys.executable, '-c', {program!r}, str(folder))\n"
        "first_hour.PARTS = (first_hour.Part('p', '', 60.0, command),)\n"
        "sys.exit(first_hour.main(['-o', sys.argv[1]]))"
    )
    ours = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    wait_until((tmp_path / "rows").exists, lambda: ours.poll() is None)
    (child,) = children(ours.pid)
    ours.terminate()
    assert ours.wait(PATIENCE) == 143
    wait_until(lambda: not alive(child))
    stored = json.loads((tmp_path / "hour.json").read_text())["parts"]
    assert [one["status"] for one in stored] == ["running"]
    assert "| p:  | **running** |" in (tmp_path / "summary.md").read_text()


def test_what_has_no_time_left_is_left_out_and_told(tmp_path: Path) -> None:
    found = run(tmp_path, part("tests", "print(1)"), part("tune", "print(1)", may_end=True), seconds=2.0)
    assert [(one.status, one.well) for one in found] == [("left out", False), ("left out", True)]
    assert "| tests: of tests | **left out** |" in (tmp_path / "summary.md").read_text()


def test_parts_of_an_earlier_command_stay_beside_those_of_the_next(tmp_path: Path) -> None:
    run(tmp_path, part("a", "print(1)"), part("b", "print(2)"))
    run(tmp_path, part("b", "raise SystemExit(3)"), part("c", "print(3)"))
    stored = json.loads((tmp_path / "hour.json").read_text())["parts"]
    assert [(one["name"], one["exit_status"]) for one in stored] == [("a", 0), ("b", 3), ("c", 0)]


def test_the_exit_status_says_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    told = "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['ANYUP_CONFIGS'])"
    monkeypatch.setattr(first_hour, "PARTS", (part("well", told), part("ill", "raise SystemExit(1)")))
    options = ["-o", str(tmp_path / "out"), "--cache", str(cache)]
    assert first_hour.main([*options, "--part", "well"]) == 0
    assert f"{cache} off" in capsys.readouterr().out
    assert first_hour.main(options) == 1
    assert "**Not all is well.**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "-o DIR: expected a folder"),
        (["-o", "x", "--minutes", "0"], "--minutes: expected more than 0"),
        (["-o", "x", "--cache", "nowhere"], "--cache: expected a folder"),
        (["-o", "x", "--part", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_a_wrong_option_is_told_before_any_work(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        first_hour.main(arguments)
    assert raised.value.code == 2 and words in capsys.readouterr().err


def test_each_part_has_less_than_nine_minutes_and_what_it_runs_is_there(tmp_path: Path) -> None:
    assert all(part.seconds <= 540 for part in PARTS)
    assert [part.name for part in PARTS] == ["machine", "tests", "model", "backward", "sanitizer", "tune"]
    files = {path.name for path in (TESTS / "device").glob("test_*.py")}
    assert files == set(first_hour.TESTS)
    tune = PARTS[-1].command(tmp_path, 60.0)
    assert cli._parse(tune[3:]).report == str(tmp_path / "tune.json")


# compute-sanitizer, as a program that says what it is told to


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer that runs what it is given and adds what the file `told` holds."""
    program = tmp_path / "compute-sanitizer"
    told = tmp_path / "told"
    run_it = '[ "$1 $3" = "--tool --report-api-errors" ] || exit 9\nshift 4\n[ -e refused ] || "$@"\n'
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\n{run_it}cat {told}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(hour_work, "ALONE", (sys.executable, "-c", "print('small: all ran')"))
    return told


@pytest.mark.parametrize(
    ("told", "status", "words"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "memcheck: 0 errors; racecheck: 0 errors"),
        ("RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)", 1, "memcheck: 2 errors; racecheck: 2 errors"),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, "memcheck: 0 errors; racecheck: 0 errors"),
        ("killed", 0, "memcheck: did not run here (exit status 0: killed); racecheck: did not run here"),
    ],
)
def test_what_the_sanitizer_found_is_told(
    sanitizer: Path, told: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer.write_text(told)
    assert hour_work.sanitize(300.0) == status
    assert words in capsys.readouterr().out.splitlines()[-1]


def test_a_sanitizer_that_refuses_the_device_is_no_fault(sanitizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sanitizer.write_text("Device not supported")
    (sanitizer.parent / "refused").touch()
    assert hour_work.sanitize(300.0) == 0
    assert "memcheck: did not run here (exit status 0: Device not supported)" in capsys.readouterr().out


def test_a_missing_sanitizer_is_told_and_a_program_that_fails_without_it_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hour_work.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(hour_work, "ALONE", (sys.executable, "-c", "print('small: all ran')"))
    assert hour_work.sanitize(300.0) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ran; not checked: compute-sanitizer is not installed"
    monkeypatch.setattr(hour_work, "ALONE", (sys.executable, "-c", "raise SystemExit('no kernel image')"))
    assert hour_work.sanitize(300.0) == 1
    assert "without a sanitizer: exit status 1: no kernel image" in capsys.readouterr().out


# The page


def test_the_page_says_what_is_wrong_and_fits_a_page(tmp_path: Path) -> None:
    row = {"group": "model", "operation": "model", "workload": "448 from 32", "dtype": "float32", "pass": "forward"}
    timed = {"status": "ok", "seconds": 1e-3, "host_seconds": 5e-3, "ahead": True, "times_floor": 2.5}
    rows = [
        {**row, **timed, "backend": "anyup", "speed_up": 31.2, "difference": 3e-5, "peak_bytes": 9e8},
        {**row, **timed, "backend": "published", "ahead": False},
        {**row, "backend": "anyup, CUDA graph", "status": "wrong", "reason": "1.0e-01 of the largest value apart"},
        {**row, **timed, "backend": "anyup", "stages": {"keys": 2e-4}, "reason": "no profile"},
    ]
    failed = {"outcome": "failed", "message": "assert 1\nmore"}
    files: dict[str, Any] = {
        "machine.json": {"device": "Abacus 9000", "torch": "2.11.0", "triton": "3.6.0"},
        "results.json": {"machine": {"refused": ["kernel blur, config 8: no"]}, "rows": rows},
        "Abacus-9000.json": {"tests": {f"tests/device/test_x.py::test_{number}": failed for number in range(50)}},
    }
    output = "=== 50 failed ===\n"
    told = {"name": "tests", "description": "", "status": "failed", "well": False, "seconds": 1.0, "output": output}
    files["hour.json"] = {"parts": [told]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    page = hour_summary.page(tmp_path)
    for words in (
        "# First hour on Abacus 9000",
        "torch 2.11.0, triton 3.6.0",
        "| **failed** | 1 | 50 failed |",
        "Tests (Abacus-9000.json): 50 failed.",
        "- test_x.py::test_0: assert 1\n",
        "- and 30 more",
        "| 448 from 32, float32 | anyup | 1.00 ms | 5.00 ms | 2.50 | 900 MB | 31.2x | 3e-05 |",
        "5.00 ms, waited for",
        "| **wrong**: 1.0e-01 of the largest value apart |",
        "| 448 from 32, float32 | 0.200 ms | no profile |",
        "Refused:\n\n- kernel blur, config 8: no",
    ):
        assert words in page, words
    assert len(page.splitlines()) < 60


# The cache


COMPILES = """
import sys
from pathlib import Path
from unittest.mock import patch
from anyup import AnyUp
from anyup.bench.workloads import Workload
from anyup.kernels.launch import Launch
from benchmarks import first_hour, hour_cache
from benchmarks.modelled_gpu import model_steps
import torch

FEW = ("query_projection_forward", "window_attention_forward", "pixel_encoder_pool")
folder, workload, dtype = Path(sys.argv[1]), Workload((18, 23), (4, 5), channels=48), torch.bfloat16
"""

MAKES = """
steps = model_steps.steps_of

def few(*arguments):
    return [step for step in steps(*arguments) if step.name in FEW]

hour_cache.WORKLOADS, hour_cache.DTYPES = (workload,), (dtype,)
with patch.object(model_steps, "steps_of", few):
    assert first_hour.main(["--make-cache", str(folder)]) == 0
"""

LAUNCHES = """
from support.standin_driver import stand_in
stand_in()
launch = Launch.__call__

def launched(self):
    if self.kernel.__name__.strip("_").removesuffix("_kernel") in FEW:
        launch(self)

upsampler = AnyUp(backend="triton").to(dtype).eval()
image, features = (tensor.to(dtype) for tensor in workload.inputs())
with torch.inference_mode(), patch.object(Launch, "__call__", launched):
    upsampler(image, features)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_cache_that_is_made_without_a_card_holds_what_a_launch_looks_for(tmp_path: Path) -> None:
    made, moved = tmp_path / "made", tmp_path / "moved"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(TESTS), environment.get("PYTHONPATH", "")))
    environment["TRITON_CACHE_DIR"] = str(moved)

    def python(program: str, folder: Path) -> None:
        command = [sys.executable, "-c", COMPILES + program, str(folder)]
        subprocess.run(command, env=environment, cwd=ROOT, timeout=PATIENCE, check=True)

    def written() -> dict[str, int]:
        return {str(path.relative_to(moved)): path.stat().st_mtime_ns for path in moved.rglob("*") if path.is_file()}

    python(MAKES, made)
    made.rename(moved)
    hour_cache.settle(moved)
    before = written()
    assert sum(name.endswith(".cubin") for name in before) == 3
    python(LAUNCHES, moved)
    assert written() == before  # nothing was compiled
    shutil.rmtree(next(moved.rglob("*.cubin")).parent)
    python(LAUNCHES, moved)
    assert written() != before  # or the check above could not fail


# The parts themselves


def rehearsed(one: Part) -> Part:
    """The part where ttsem pretends the card; of the tests those of one file."""

    def command(folder: Path, seconds: float) -> Sequence[str]:
        python, *arguments = one.command(folder, seconds)
        if one.name == "tests":
            file = str(Path("tests", "device", "test_products.py"))
            results = arguments[arguments.index("--results") :][:2]
            return (python, "-m", "ttsem.sanitize", "pytest", "-p", "rehearsal", "-m", "gpu", file, *results)
        assert arguments[:2] == ["-m", "benchmarks.hour_work"]
        return (python, REHEARSED, *arguments[2:])

    return replace(one, command=command)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ttsem") is None, reason="ttsem is not installed")
def test_every_part_runs_where_a_card_is_pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), "/usr/bin", "/bin")))
    path = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "device", os.environ.get("PYTHONPATH", ""))))
    # Longer than on a card: ttsem takes its time.
    parts = [replace(rehearsed(one), seconds=1800.0) for one in PARTS if one.name != "tune"]
    found = run(tmp_path, *parts, seconds=9000.0, environment={"PYTHONPATH": path, "ANYUP_CONFIGS": "off"})
    told = {outcome.name: outcome.output for outcome in found}
    assert [outcome.status for outcome in found] == ["ok"] * 5, told
    assert "refused by a device in this process" in told["machine"]
    assert "ran; not checked: compute-sanitizer is not installed" in told["sanitizer"]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert all(row["status"] == "ok" for row in rows)
    assert {row["operation"] for row in rows} == {"model", "training_step"}
    assert {row["backend"] for row in rows} == {"anyup", "anyup, CUDA graph", "published"}
    assert any(len(row.get("kernels", ())) == 7 for row in rows) and all(row["host_seconds"] for row in rows)
    assert json.loads((tmp_path / "fake-sm90.json").read_text())["tests"]
    assert "First hour on fake-sm90" in (tmp_path / "summary.md").read_text()
    assert_fits(tmp_path)
