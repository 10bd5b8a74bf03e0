"""Where the kernels run that these tests launch; their reports carry the launches and what was measured on a card."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.card import as_pretended, no_device, pretended

if TYPE_CHECKING:
    from anyup.kernels.launch import Launch


@pytest.fixture(scope="session")
def _device_or_skip() -> Iterator[None]:
    pytest.importorskip("triton", reason="triton is not installed")
    reason = no_device()
    if reason is not None:
        pytest.skip(f"no GPU: {reason}; on a CPU run `python -m ttsem.sanitize pytest tests/device`")
    with pytest.MonkeyPatch.context() as patch:
        if pretended():
            as_pretended(patch)
        yield


@pytest.fixture(autouse=True)
def launched(_device_or_skip: None, request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """The launches of a test: how many of "kernel, config, dtype of the queries and of the values"."""
    from anyup.kernels.launch import Launch

    launches: Counter[str] = Counter()
    launch = Launch.__call__

    def recorded(self: Launch) -> None:
        launches[_described(self)] += bool(all(self.grid))
        launch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", recorded)
        yield launches
    request.node.user_properties.append(("launches", dict(+launches)))


def _described(launch: Launch) -> str:
    name = launch.kernel.__name__.removeprefix("_window_attention_").removesuffix("_kernel")
    if "RESIDENT_BLOCKS" in launch.constants:
        name += " resident" if launch.constants["RESIDENT_BLOCKS"] else " streamed"
    if "kept" in launch.arguments:
        name = "forward kept"
    if "PARTIALS" in launch.constants:
        name += " in parts" if launch.constants["PARTIALS"] > 1 else " whole"
    if "query" not in launch.arguments:  # of another operation
        named = launch.arguments.get("prediction")  # of a distance, whose gradient comes first and in float32
        tensors = (argument for argument in launch.arguments.values() if isinstance(argument, torch.Tensor))
        first = next(tensors) if named is None else named
        return f"{name.strip('_')}, {str(first.dtype).removeprefix('torch.')}"
    carried = launch.arguments["grad" if "grad" in launch.arguments else "out"]
    dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in (launch.arguments["query"], carried))
    return ", ".join((name, *dtypes))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test measures, to be stored beside its outcome."""
    found: dict[str, Any] = {}
    request.node.user_properties.append(("measured", found))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Leave a process whose card a test has taken along: what ran after it would fail too, whatever it is."""
    done = yield
    if item.session.testsfailed and not _card_answers():
        if hasattr(item.config, "workerinput"):
            os._exit(3)  # pytest-xdist reports it, and goes on in a new process
        pytest.exit(f"the card does not answer any more after {item.nodeid}", returncode=pytest.ExitCode.TESTS_FAILED)
    return done


def _card_answers() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
