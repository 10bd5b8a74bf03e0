"""The tests in `device/` on a CPU: ttsem executes what the compiler makes of each launch.

An access outside a tensor, two programs at one element or an undefined value fails the test that launched it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from packaging.version import Version
from support.checkouts import ROOT
from support.patience import PATIENCE


def no_ttsem() -> str | None:
    """Why ttsem executes no kernel here; None: it does."""
    if find_spec("ttsem") is None:
        return "ttsem is not installed (pip install --no-deps --ignore-requires-python ttsem==0.1.0)"
    if Version(version("triton")) < Version("3.8"):
        return f"ttsem does not read what triton {version('triton')} prints: it takes triton 3.8"
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(no_ttsem() is not None, reason=str(no_ttsem()))]

TESTS = ROOT / "tests"


def run_under_ttsem(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """pytest as ttsem runs it, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = (str(ROOT), str(TESTS), str(TESTS / "device"), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )


def number_of(outcome: str, output: str) -> int:
    """How many tests pytest's last line says to have had an outcome."""
    found = re.search(rf"(\d+) {outcome}\b", output.strip().splitlines()[-1])
    return int(found.group(1)) if found else 0


def test_the_device_tests_pass_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_under_ttsem("tests/device", "-rs")
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert "too large to be checked for races" not in run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith(("SKIPPED", "launched: "))]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    assert skipped and all("test_on_a_card" in line and "needs a real card" in line for line in skipped), skipped
    assert number_of("passed", run.stdout) >= 80, run.stdout[-2_000:]
    launched = "\n".join(lines)
    for dtype in ("float32", "float16", "bfloat16"):
        for kernel in (
            *(f"{name} {weights}" for name in ("forward", "backward_query") for weights in ("resident", "streamed")),
            "forward kept",
            "points",
            *(f"backward_{of} {split}" for of in ("key", "value", "key_value") for split in ("whole", "in parts")),
        ):
            assert f"launched: {kernel}, {dtype}, {dtype}: " in launched, f"{kernel} in {dtype} was not launched"
        for kernel in (
            "feature_unification_arrange", "key_grid_convolution", "query_projection_forward",
            "feature_distance_forward", "feature_distance_backward",
        ):  # fmt: skip
            assert f"launched: {kernel}, {dtype}: " in launched, f"{kernel} in {dtype} was not launched"
    with capsys.disabled():  # a number that a reader of the log should see
        launches = sum(int(line.rsplit(": ", 1)[1]) for line in lines if line not in skipped)
        print(f"\n{run.stdout.strip().splitlines()[-1]}, {launches} launches under ttsem")


def test_what_needs_a_real_card_is_rehearsed() -> None:
    run = run_under_ttsem("-p", "rehearsal", "tests/device/test_on_a_card.py")
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert number_of("passed", run.stdout) >= 23 and not number_of("skipped", run.stdout), run.stdout[-2_000:]


def test_who_asks_for_a_card_alone_is_told_that_there_is_none() -> None:
    run = run_under_ttsem("-m", "gpu", "tests/device/test_products.py")
    assert run.returncode == 1 and number_of("passed", run.stdout), run.stdout[-20_000:] + run.stderr[-5_000:]
    assert "failed: -m gpu asks for a real card: " in run.stdout


# Faults planted in a copy of the kernels: what ttsem must notice, or the test above says nothing.


class Fault(NamedTuple):
    """A change of a kernel's source, and what ttsem says of it.

    `line` starts the source line that is named; ttsem has none for what is inlined into the kernel, only the kernel.
    """

    file: str
    right: str
    wrong: str
    kernel: str
    message: str
    line: str | None = None


PLANTED = {
    "a store without its mask": Fault(
        "window_attention_backward_grid.py",
        "tl.store(place, total, mask=key_exists[:, None] & (channel < channels)[None, :])",
        "tl.store(place, total)",
        "_window_attention_backward_value_kernel",
        "an operation with an undefined result: two lanes of one store wrote",
        line="tl.store(place, total)",
    ),
    "a store without its mask, of keys and values at once": Fault(
        "window_attention_backward_key_value.py",
        "tl.trans(value_sums[piece]), mask=key_exists[:, None] & (channel < channels)[None, :])",
        "tl.trans(value_sums[piece]))",
        "_window_attention_backward_key_value_kernel",
        "an operation with an undefined result: two lanes of one store wrote",
        line="tl.store(place, tl.trans(value_sums[piece]))",
    ),
    "gradients stored one key too far": Fault(
        "window_attention_keys_tile.py",
        "* grid_columns + column, exists",
        "* grid_columns + column + 1, exists",
        "_window_attention_backward_key_kernel",
        "past the end of the tensor passed as `grad_key`",
        line="tl.store(place, tl.trans(gradient)",
    ),
    "parts that write to one place": Fault(
        "window_attention_keys_tile.py",
        "((partial * images + image) * grid_rows",
        "(image * grid_rows",
        "_window_attention_backward_key_kernel",
        "both touch element 0 of `grad_key`",
        line="tl.store(place, tl.trans(gradient)",
    ),
    "keys numbered beyond the last": Fault(
        "window_attention_tile.py",
        "    number = tl.minimum(number, rectangle.count - 1)\n",
        "",
        "_window_attention_forward_kernel",
        "past the end of the tensor passed as `key`",
    ),
}

PLANTED_TEST = """
import importlib
import sys

import pytest
import torch
from support.card import as_pretended
from support.recipe import AttentionShape

import anyup.kernels

@pytest.mark.parametrize("folder", {folders!r})
def test_passes(folder, monkeypatch):
    as_pretended(monkeypatch)
    for name in [name for name in sys.modules if name == "passes" or name.startswith("anyup.kernels.")]:
        del sys.modules[name]
        vars(anyup.kernels).pop(name.rpartition(".")[2], None)
    anyup.kernels.__path__[:] = [folder]
    passes = importlib.import_module("passes")
    shape = AttentionShape((5, 9), (4, 5), channels=21, head_dim=16)
    tensors = passes.device_tensors(shape, torch.float32, torch.float32)
    passes.run_passes(**tensors, window=shape.window, configs=passes.shipped_configs(shape, half=False)[1])
"""


def planted(folder: Path, fault: Fault | None) -> Path:
    """A copy of the kernels in a new folder, with a fault or none."""
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        source = (folder / fault.file).read_text()
        assert fault.right in source, "what the fault changes is no longer there"
        (folder / fault.file).write_text(source.replace(fault.right, fault.wrong))
    return folder


def assert_named(fault: Fault, folder: Path, failure: str) -> None:
    """Raise an AssertionError unless what pytest says of a failure names the kernel, the fault and its line."""
    told = next(line for line in failure.splitlines() if "KernelFault: " in line)
    assert f"kernel `{fault.kernel}`" in told and fault.message in told
    if fault.line is not None:
        named = re.search(r"`(\w+\.py):(\d+): (.*?)`", told)
        assert named is not None, told
        source = (folder / named[1]).read_text().splitlines()
        assert source[int(named[2]) - 1].strip() == named[3] and named[3].startswith(fault.line)


def test_each_planted_fault_fails_and_is_named_and_a_copy_without_one_passes(tmp_path: Path) -> None:
    """In one process, because to start one takes as long as to run a copy's kernels."""
    faults: list[Fault | None] = [None, *PLANTED.values()]
    folders = [planted(tmp_path / f"copy{number}", fault) for number, fault in enumerate(faults)]
    (tmp_path / "test_planted.py").write_text(PLANTED_TEST.format(folders=list(map(str, folders))))
    run = run_under_ttsem("test_planted.py", "--rootdir", str(tmp_path), "--junitxml=out.xml", cwd=tmp_path)
    output = run.stdout[-5_000:] + run.stderr[-2_000:]
    assert number_of("passed", run.stdout) == 1 and number_of("failed", run.stdout) == len(PLANTED), output
    cases = list(ElementTree.parse(tmp_path / "out.xml").iter("testcase"))
    failures = [case.find("failure") for case in cases]
    assert failures[0] is None, output
    for fault, folder, failure in zip(PLANTED.values(), folders[1:], failures[1:], strict=True):
        assert failure is not None, fault
        assert_named(fault, folder, failure.text or "")
