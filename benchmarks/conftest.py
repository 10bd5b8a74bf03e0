"""Options and fixtures of `pytest benchmarks`."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from anyup.bench import machine
from anyup.bench.clock import CudaClock
from anyup.bench.engine import Engine, Entry, Speeds
from anyup.bench.implementations import Builder
from anyup.bench.suite import Comparison
from anyup.bench.timing import host_clock

Prepare = Callable[[Comparison], dict[str, Entry]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line's additions."""
    group = parser.getgroup("anyup")
    group.addoption("--budget", type=float, default=60.0, help="leave out calls that would take more seconds (60)")
    group.addoption("--threads", type=int, default=None, help="torch's threads")


@pytest.fixture(scope="session")
def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, device: str) -> Engine:
    """What builds the calls and compares their results."""
    threads = request.config.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    clock = host_clock if device == "cpu" else CudaClock(torch.device(device)).once
    return Engine(Speeds.measure(device, clock), clock, Builder(clock), request.config.getoption("--budget"))


@pytest.fixture(scope="session")
def prepare(engine: Engine) -> Prepare:
    """The implementations of a comparison by backend and operation; those of the last one alone are kept."""
    kept: dict[Comparison, dict[str, Entry]] = {}

    def prepare(comparison: Comparison) -> dict[str, Entry]:
        if comparison not in kept:
            kept.clear()
            gc.collect()
            kept[comparison] = {comparison.identity(e.implementation): e for e in engine.prepare(comparison)}
        return kept[comparison]

    return prepare


@pytest.fixture(scope="session")
def notes(device: str, engine: Engine) -> dict[str, object]:
    """The machine, for each benchmark's extra information."""
    return {**machine.describe(device), "matmul_rate": engine.speeds.rates["float32"]}
