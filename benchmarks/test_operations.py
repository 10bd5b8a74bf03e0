"""Each heavy operation alone on each backend, and a linear head before the upsampling and after it."""

from __future__ import annotations

from typing import Any

import pytest

from anyup.bench import cases, machine, memory, parity
from anyup.bench.workloads import UNIFICATION, Workload, square
from benchmarks.conftest import Run

BACKENDS = ("torch", "reference")

SIZES = (square(224, 16), square(448, 32))

_IN_IMAGE_SPACE = tuple(name for name in cases.OPERATIONS if name != "feature_unification")


def name(workload: Workload) -> str:
    """Of a parameter."""
    return workload.name


def expected_seconds(workload: Workload, rate: float) -> float:
    """Generous: no operation alone takes longer than the model ought to."""
    return 3 * machine.floor_seconds(workload, rate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workload", SIZES, ids=name)
@pytest.mark.parametrize("operation", _IN_IMAGE_SPACE)
def test_operation(operation: str, workload: Workload, backend: str, run: Run, rate: float, benchmark: Any) -> None:
    benchmark.group = f"{operation}, {workload.name}"
    call = cases.build(f"{operation}/{backend}", workload)
    if backend != "reference":
        parity.check(call(), cases.build(f"{operation}/reference", workload)(), benchmark.group)
    run(call, workload, expected=expected_seconds(workload, rate), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_unification(backend: str, run: Run, rate: float, benchmark: Any) -> None:
    workload = UNIFICATION
    benchmark.group = f"feature_unification, C {workload.channels}, {workload.grid[0]} x {workload.grid[1]}"
    case = f"feature_unification/{backend}"
    call = cases.build(case, workload)
    if backend != "reference":
        parity.check(call(), cases.build("feature_unification/reference", workload)(), benchmark.group)
    peak = memory.measure(case, workload).peak_bytes
    run(call, workload, expected=expected_seconds(workload, rate), backend=backend, peak_bytes=peak)


@pytest.mark.parametrize("case", ["anyup", "head_after", "head_before", "classes_as_values"])
@pytest.mark.parametrize("workload", SIZES, ids=name)
def test_head(case: str, workload: Workload, run: Run, rate: float, benchmark: Any) -> None:
    benchmark.group = f"{workload.channels} to {cases.CLASSES} channels, {workload.name}"
    call = cases.build(case, workload)
    output = call()
    if case != "anyup":
        parity.check(output, cases.build("head_after", workload)(), benchmark.group)
    written = output.numel() * output.element_size()
    del output
    run(call, workload, expected=expected_seconds(workload, rate), output_bytes=written)
