"""Trying a kernel's configs: what gives way to the next config, and what must not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from anyup.ops import configs, refusals
from anyup.ops.configs import run_first
from anyup.ops.dispatch import BackendFailure

triton_errors = pytest.importorskip("triton.compiler.errors")
PTXASError = pytest.importorskip("triton.runtime.errors").PTXASError


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_refused", {})
    monkeypatch.setattr(refusals, "_remembered", {})


def failing(error: Exception, tried: list[int], most: int = 100) -> Callable[[int], str]:
    """A kernel whose configs raise an error, up to a number of threads."""

    def run(threads: int) -> str:
        tried.append(threads)
        if threads > most:
            raise error
        return f"with {threads}"

    return run


REFUSALS = {
    "PassManager::run failed": RuntimeError("PassManager::run failed"),
    "too many resources requested for launch": RuntimeError(
        "Triton Error [CUDA]: too many resources requested for launch"
    ),
    "invalid argument": RuntimeError("Triton Error [CUDA]: invalid argument"),
    "no kernel image is available": RuntimeError(
        "Triton Error [CUDA]: no kernel image is available for execution on the device"
    ),
    "failed to translate module to LLVM IR": RuntimeError("failed to translate module to LLVM IR"),
    "Internal Triton PTX codegen error": PTXASError("Internal Triton PTX codegen error\nRepro command: ptxas"),
    "Failed to find C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "returned non-zero exit status 1": subprocess.CalledProcessError(1, ["gcc"]),
    "Permission denied": PermissionError(13, "Permission denied", "/cache"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_refused_config_gives_way_to_the_next_and_the_last_refusal_is_the_backend_s(message: str) -> None:
    tried: list[int] = []
    assert run_first(failing(REFUSALS[message], tried, most=2), [8, 4, 2, 1]) == "with 2"
    assert tried == [8, 4, 2]
    with pytest.raises(BackendFailure, match=message) as raised:
        run_first(failing(REFUSALS[message], tried, most=0), [8, 4])
    assert str(raised.value).count(message) == 2 and raised.value.__cause__ is REFUSALS[message]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
        RuntimeError("Triton Error [CUDA]: operation not supported on global/shared address space"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
        RuntimeError("Triton Error [HIP]:  Code: 700, Messsage: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
        NotImplementedError("no such kernel"),
        ValueError("rows: expected a power of two"),
        TypeError("dynamic_func() missing 1 required positional argument"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:60]}",
)
def test_what_no_other_config_can_help_is_raised_at_once(error: Exception) -> None:
    tried: list[int] = []
    with pytest.raises(type(error)) as raised:
        run_first(failing(error, tried, most=4), [8, 4])
    assert raised.value is error and tried == [8]


def test_an_interruption_is_no_refusal() -> None:
    def run(threads: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_first(run, [8, 4])


def test_a_refused_config_is_not_tried_again_for_the_same_kernel() -> None:
    tried: list[int] = []
    run = failing(RuntimeError("PassManager::run failed"), tried, most=4)
    for kernel in ("blur", "blur", "sharpen"):
        assert run_first(run, [8, 4], kernel=kernel) == "with 4"
    assert tried == [8, 4, 4, 8, 4]
    run_first(run, [8, 4])  # a kernel without a name
    assert tried[-2:] == [8, 4]


def test_refusals_that_are_remembered_are_told_again() -> None:
    tried: list[int] = []
    run = failing(RuntimeError("PassManager::run failed"), tried, most=0)
    for _ in range(2):
        with pytest.raises(BackendFailure, match="^RuntimeError: PassManager::run failed; RuntimeError: PassManager"):
            run_first(run, [8, 4], kernel="blur")
    assert tried == [8, 4]


def test_each_refusal_is_told_once_with_the_kernel_and_its_config() -> None:
    run = failing(RuntimeError("PassManager::run failed\nin detail"), [], most=4)
    for _ in range(2):
        run_first(run, [16, 8, 4], kernel=("blur", torch.float16, torch.device("cpu")))
    run_first(run, [8, 4])
    assert refusals.remembered() == (
        "kernel blur float16 cpu, config 16: RuntimeError: PassManager::run failed",
        "kernel blur float16 cpu, config 8: RuntimeError: PassManager::run failed",
        "kernel of no name, config 8: RuntimeError: PassManager::run failed",
    )


def test_a_compiler_s_error_is_told_by_its_last_line() -> None:
    error = triton_errors.CompilationError("def kernel():\n    x\n", None, "x is not defined")
    assert configs.summary_of(error) == "CompilationError: x is not defined"
    assert configs.summary_of(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert configs.summary_of(OSError()) == "OSError: "
