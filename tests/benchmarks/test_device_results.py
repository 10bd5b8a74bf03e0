"""What `pytest --results DIR` stores of the tests of a card: with pytest-xdist too, and where a card is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.checkouts import ROOT, our_conftest
from support.patience import PATIENCE

pytestmark = pytest.mark.slow

ON_A_CARD = """
from support import device_results
device_results.description = lambda: {"device": "Abacus 9000/B"}
device_results.no_device = lambda: None
"""

DEVICE = """
import pytest

@pytest.fixture(scope="session")
def _device_or_skip():
    yield
"""

TESTS = """
import pytest
import torch

dead = False

def synchronize():
    if dead:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.mark.parametrize("number", range(3))
def test_before(number, launched, measured):
    launched["blur, float16"] += 2
    measured["relative error"] = 0.5

def test_that_takes_the_card_along():
    global dead
    dead = True
    raise AssertionError("illegal memory access")

@pytest.mark.parametrize("number", range(6))
def test_after(number):
    assert not dead

def test_of_another_kind():
    pytest.skip("no such thing here")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tests beside conftests that are ours, where a card is pretended."""
    device = tmp_path / "tests" / "device"
    device.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (device.parent / "conftest.py").write_text(our_conftest() + ON_A_CARD)
    (device / "conftest.py").write_text(our_conftest("tests/device") + DEVICE)
    (device / "test_card.py").write_text(TESTS)
    return tmp_path


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--results", "out/found"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status of pytest there, and the one file that it stored."""
    done = pytest_in(folder, *arguments)
    stored = list((folder / "out").rglob("*"))
    assert [path.name for path in stored] == ["found", "Abacus-9000-B.json"], (stored, done.stdout, done.stderr)
    return done.returncode, json.loads(stored[1].read_text())


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {name.split("::")[1]: test["outcome"] for name, test in found["tests"].items()}


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_workers_store_one_file_and_a_test_that_takes_the_card_along_fails_alone(folder: Path) -> None:
    status, found = run(folder, "-n", "2", "--dist", "load", "--maxschedchunk", "1")
    told = outcomes(found)
    assert status == 1 and len(told) == 3 + 1 + 6 + 1
    assert {name for name, outcome in told.items() if outcome not in ("passed", "skipped")} == {
        "test_that_takes_the_card_along"
    }
    assert found["launches"] == {"blur, float16": 6} and found["device"] == "Abacus 9000/B"
    tests = {name.split("::")[1]: test for name, test in found["tests"].items()}
    assert tests["test_before[0]"]["relative error"] == 0.5 and tests["test_before[0]"]["seconds"] >= 0
    assert "illegal memory access" in tests["test_that_takes_the_card_along"]["message"]
    assert tests["test_of_another_kind"]["message"] == "Skipped: no such thing here"


def test_without_a_card_nothing_is_stored_and_nothing_breaks(folder: Path) -> None:
    conftest = folder / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text().removesuffix(ON_A_CARD))
    done = pytest_in(folder, "-k", "before")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    assert not (folder / "out").exists()


def test_in_one_process_the_run_ends_with_the_card(folder: Path) -> None:
    status, found = run(folder)
    assert status == 1
    assert list(outcomes(found).values()) == ["passed"] * 3 + ["failed"]
