"""The calls of `anyup bench` under pytest-benchmark, grouped by comparison: whole model and operations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anyup.bench.stored import FAULTS
from anyup.bench.suite import Comparison, Implementation, comparisons
from benchmarks.conftest import Prepare

_SECONDS = 10.0
_SLOW = 30.0

SUITE = [
    (comparison, implementation)
    for comparison in comparisons("cuda" if torch.cuda.is_available() else "cpu")
    if comparison.kind == "calls"
    for implementation in comparison.implementations
]


def name(argument: Any) -> str:
    """Of a parameter."""
    return argument.name if isinstance(argument, Comparison) else f"{argument.operation} {argument.backend}"


@pytest.mark.parametrize(("comparison", "implementation"), SUITE, ids=name)
def test_call(
    comparison: Comparison, implementation: Implementation, prepare: Prepare, notes: dict[str, object], benchmark: Any
) -> None:
    entry = prepare(comparison)[comparison.identity(implementation)]
    if entry.call is None:
        (pytest.fail if entry.row["status"] in FAULTS else pytest.skip)(f"{entry.row['status']}: {entry.row['reason']}")
    benchmark.group = comparison.name
    facts = {key: value for key, value in entry.row.items() if value is not None}
    benchmark.extra_info.update(facts, machine=notes)
    # What takes long was called once to compare it, and is called once more.
    rounds = 1 if entry.first.wall > _SLOW else max(3, min(10, int(_SECONDS / max(entry.first.wall, 1e-6))))
    benchmark.pedantic(_finished(entry.call), rounds=rounds)


def _finished(call: Callable[[], object]) -> Callable[[], object]:
    """The call until its result is there: a card works on after it has returned."""
    if not torch.cuda.is_available():
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return run
