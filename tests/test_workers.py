"""How the suite runs by default: in two processes, each of which runs tests itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkouts import ROOT, our_conftest

# A worker that started workers of its own would not end: the limit on processes ends that too.
TEST = """
import os

def test_where_it_runs(request):
    assert os.environ["PYTEST_XDIST_WORKER_COUNT"] == "2"
    assert not getattr(request.config.option, "tx", None), "a worker has workers"
"""


@pytest.mark.slow
def test_the_suite_runs_in_two_processes_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nmarkers = slow: long\naddopts = -m 'not slow'\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(our_conftest())
    (tmp_path / "tests" / "test_it.py").write_text(TEST)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = path
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as run:  # fmt: skip
        try:
            told, _ = run.communicate(timeout=120)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, 9)
    assert run.returncode == 0, told
    assert "1 passed" in told and "`pytest -m ''` runs everything" in told
