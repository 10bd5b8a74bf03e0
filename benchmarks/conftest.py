"""Options and fixtures of `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anyup.bench import machine
from anyup.bench.workloads import Workload

Run = Callable[..., object]

_SLOW = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line's additions."""
    group = parser.getgroup("anyup")
    group.addoption("--budget", type=float, default=60.0, help="leave out calls that would take more seconds (60)")
    group.addoption("--slow-baseline", action="store_true", help="time the baseline whatever it takes")
    group.addoption("--threads", type=int, default=None, help="torch's threads")


@pytest.fixture(scope="session")
def rate(request: pytest.FixtureRequest) -> float:
    """Operations a second of a square float32 product, with the threads of this run."""
    threads = request.config.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    return machine.matmul_rate()


@pytest.fixture
def run(benchmark: Any, request: pytest.FixtureRequest, rate: float) -> Run:
    """Time a call unless it is expected to take too long, or skip with the reason where memory runs out."""

    def run(
        call: Callable[[], object],
        workload: Workload,
        *,
        expected: float,
        baseline: bool = False,
        **notes: object,
    ) -> object:
        within_budget(request.config, expected, baseline=baseline)
        benchmark.extra_info.update(machine.describe().as_row(), workload=workload.name, matmul_rate=rate, **notes)
        # What takes minutes is called once, cold.
        slow = expected > _SLOW
        rounds = 1 if slow else max(3, min(10, int(10 / expected)))
        try:
            return benchmark.pedantic(call, rounds=rounds, warmup_rounds=0 if slow else 1)
        except (MemoryError, RuntimeError) as error:
            if "memory" in str(error).lower() or isinstance(error, MemoryError):
                pytest.skip(f"out of memory: {error}")
            raise

    return run


def within_budget(config: pytest.Config, expected: float, *, baseline: bool = False) -> None:
    """Skip the test if a call is expected to take longer than the command line allows."""
    budget = config.getoption("--budget")
    if expected > budget and not (baseline and config.getoption("--slow-baseline")):
        option = "--slow-baseline" if baseline else "--budget"
        pytest.skip(f"would take longer than {budget:.0f} s, about {expected:.0f} s ({option} runs it)")
