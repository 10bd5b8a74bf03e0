"""Processes of Python beside the one that tests run in."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def in_a_process(program: str, *arguments: str) -> Any:
    """What a program prints last, in a process whose kernels Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def run_program(program: str) -> str:
    """What a program prints in this process."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(program, {})
    return text.getvalue()
