"""The whole model and the published forward, grouped by workload."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from anyup.bench import cases, machine, parity, published
from anyup.bench.workloads import REACH, WORKLOADS, Workload, square
from benchmarks.conftest import Run, within_budget

BASELINES = (*REACH, square(448, 28), square(518, 37), square(2048, 128))

# Times of the floor, to say beforehand what would take too long.
_EXPECTED = 3.0


def name(workload: Workload) -> str:
    """Of a parameter."""
    return workload.name


@functools.cache
def agrees(workload: Workload) -> float:
    """The relative difference of model and baseline at a sample of pixels; raises where they differ."""
    return parity.check_sample(cases.model(), workload)


@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
def test_anyup(workload: Workload, run: Run, rate: float, request: pytest.FixtureRequest, benchmark: Any) -> None:
    floor = machine.floor_seconds(workload, rate)
    within_budget(request.config, _EXPECTED * floor)
    benchmark.group = workload.name
    difference = agrees(workload)
    call = cases.build("anyup", workload)
    run(call, workload, expected=_EXPECTED * floor, floor_seconds=floor, difference=difference)


@pytest.mark.parametrize("workload", BASELINES, ids=name)
def test_published(workload: Workload, run: Run, rate: float, request: pytest.FixtureRequest, benchmark: Any) -> None:
    expected = published.expected_seconds(workload, rate)
    needed, available = published.least_bytes(workload), machine.available_bytes()
    if available is not None and needed > available:
        pytest.skip(f"out of memory: needs over {needed / 1e9:.0f} GB of {available / 1e9:.0f} GB available")
    within_budget(request.config, expected, baseline=True)
    benchmark.group = workload.name
    difference = agrees(workload)
    times = published.Published(cases.model()).chunk_times(workload)
    chunk = published.best_chunk(times)
    call = cases.build("published", workload, chunk=chunk)
    run(call, workload, expected=expected, baseline=True, chunk=str(chunk), difference=difference)
