"""What a call on a card costs the host, by part: `pytest benchmarks -k host`; no card is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.host import report

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="Triton's launcher needs a C compiler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_host_time_of_a_call(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.host", "--json", "--dtype", dtype]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{report(result)}")
    assert result["repeated"] < result["call"] and result["counts"]["waits"] == 0
