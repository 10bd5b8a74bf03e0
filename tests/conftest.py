"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device_results import DeviceResults
from support.interpreter import broken, leave_out_what_is_in_vain

from anyup.ops.precision import working_dtype

# For `benchmarks`, which is not installed; last, so that nothing here hides another package.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Before anything imports triton: where there is no GPU its interpreter runs the kernels, on CPU tensors. ttsem brings a
# device of its own.
if not torch.cuda.is_available() and "ttsem" not in sys.modules and broken() is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    leave_out_what_is_in_vain()

# Tests run with the configs of the rule, whatever table this machine's user has.
os.environ["ANYUP_CONFIGS"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line's additions."""
    parser.addoption(
        "--results", type=Path, metavar="DIR", help="folder of what tests/device finds on a card (its results/)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two processes for the whole suite, where pytest-xdist is there; one for what is named, and for devices."""
    option = config.option
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or "gpu" in option.markexpr
    # A worker's own configuration comes here too: it must not have workers.
    alone = named or option.usepdb or "ttsem" in sys.modules or hasattr(config, "workerinput")
    if hasattr(option, "numprocesses") and option.numprocesses is None and not alone:
        option.numprocesses, option.dist = 2, "worksteal"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more of them would wait for each other


LONGEST = ("test_device_under_ttsem.py", "test_compile.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: at the end it would keep one process, and the others would have nothing to do."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left out, and how it runs."""
    if config.option.markexpr == "not slow":
        terminalreporter.write_line("Tests marked slow were left out: `pytest -m ''` runs everything.")


def pytest_configure(config: pytest.Config) -> None:
    """Gather what the tests of a card find: where workers have the tests, this is the only conftest that is loaded."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(DeviceResults(config.getoption("--results")))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch leaves uninitialised holds NaN: whoever reads it before writing is found out."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def precision_settings() -> Iterator[None]:
    """Torch's settings of how float32 is multiplied, old and new, are put back after a test that sets them."""
    of = torch.backends
    holders: list[Any] = [of, of.cudnn, of.cudnn.conv, of.cudnn.rnn, of.cuda.matmul]
    holders += [of.mkldnn, of.mkldnn.conv, of.mkldnn.rnn, of.mkldnn.matmul]
    old, new = torch.get_float32_matmul_precision(), [holder.fp32_precision for holder in holders]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        for holder, precision in zip(holders, new, strict=True):
            holder.fp32_precision = precision
    assert (torch.get_float32_matmul_precision(), [holder.fp32_precision for holder in holders]) == (old, new)


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are made as on a GPU: in the dtype that the kernels take, their convolution by products."""
    monkeypatch.setattr("anyup.network.key_dtype", lambda dtype, device: working_dtype(dtype))
    monkeypatch.setattr("anyup.ops.convolution.goes_through_convolution", lambda weight: False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch's number of threads is put back after a test that sets it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Handing pixels of so small a picture to other threads costs a hundred times what they do with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
