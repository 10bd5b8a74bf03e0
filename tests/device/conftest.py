"""Where the kernels run that these tests launch, a list of the launches, and what was measured on a real card."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from card import description, first_stage_only, no_card, no_device, pretended

if TYPE_CHECKING:
    from anyup.kernels.launch import Launch

_launches: Counter[str] = Counter()
_outcomes: dict[str, dict[str, Any]] = {}
_results = Path(__file__).parent / "results"


@pytest.fixture(scope="session")
def _device_or_skip() -> Iterator[None]:
    pytest.importorskip("triton", reason="triton is not installed")
    reason = no_device()
    if reason is not None:
        pytest.skip(f"no GPU: {reason}; on a CPU run `python -m ttsem.sanitize pytest tests/device`")
    with pytest.MonkeyPatch.context() as patch:
        if pretended():
            from triton import knobs

            patch.setattr(knobs.runtime, "add_stages_inspection_hook", first_stage_only)
            # A card that is pretended has no memory to ask about.
            patch.setattr("anyup.budget.free_memory", lambda device: None)
        yield


@pytest.fixture(autouse=True)
def launched(_device_or_skip: None) -> Iterator[Counter[str]]:
    """The launches of a test: how many of "kernel, cut, dtype of the queries and of the values"."""
    from anyup.kernels.launch import Launch

    launches: Counter[str] = Counter()
    launch = Launch.__call__

    def recorded(self: Launch) -> None:
        launches[_described(self)] += bool(all(self.grid))
        launch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", recorded)
        yield launches
    _launches.update(+launches)


def _described(launch: Launch) -> str:
    name = launch.kernel.__name__.removeprefix("_window_attention_").removesuffix("_kernel")
    if "RESIDENT_BLOCKS" in launch.constants:
        name += " resident" if launch.constants["RESIDENT_BLOCKS"] else " streamed"
    if "PARTS" in launch.constants:
        name += " in parts" if launch.constants["PARTS"] > 1 else " whole"
    if "query" not in launch.arguments:  # of another operation
        first = next(argument for argument in launch.arguments.values() if isinstance(argument, torch.Tensor))
        return f"{name.strip('_')}, {str(first.dtype).removeprefix('torch.')}"
    carried = launch.arguments["grad" if "grad" in launch.arguments else "out"]
    dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in (launch.arguments["query"], carried))
    return ", ".join((name, *dtypes))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test measures, to be stored beside its outcome."""
    return _outcomes.setdefault(request.node.name, {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" and not report.skipped:
        _outcomes.setdefault(item.name, {})["outcome"] = report.outcome
    return report


def _asked_for_a_card(config: pytest.Config) -> str | None:
    """Why there is none for `pytest -m gpu`; None: there is one, or nobody asked."""
    if config.option.markexpr.strip() != "gpu":
        return None
    return no_card() if importlib.util.find_spec("triton") else "triton is not installed"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Skipped tests are no failure of a run of all tests, but they are of one that asks for these alone."""
    if _asked_for_a_card(session.config) is not None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was launched: a run that launched nothing has shown nothing."""
    for name, number in sorted(_launches.items()):
        terminalreporter.write_line(f"launched: {name}: {number}")
    reason = _asked_for_a_card(config)
    if reason is not None:
        terminalreporter.write_line(f"failed: -m gpu asks for a real card: {reason}", red=True)
    elif _launches and no_card() is None and not pretended():
        card = description()
        _results.mkdir(exist_ok=True)
        path = _results / f"{card['device'].replace(' ', '-')}.json"
        path.write_text(json.dumps({**card, "launches": _launches, "tests": _outcomes}, indent=1) + "\n")
        terminalreporter.write_line(f"results: {path}")
