"""What Triton's kernels run on: a device is asked once, and says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import interpreter
from torch import backends

from anyup.bench import machine
from anyup.ops import kernel_device
from anyup.ops.feature_unification import fused
from anyup.ops.kernel_device import device_reasons, dot_precision, target
from anyup.ops.precision import float32_matmul_precision
from anyup.tuning import tune

driver = pytest.importorskip("triton.runtime").driver

CACHES = (kernel_device._device_reasons, kernel_device._target, kernel_device.device_name, kernel_device.installed)


def forget() -> None:
    for function in CACHES:
        function.cache_clear()


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Two made-up cards that Triton drives, of compute capability 9.0 and 7.5; what it and torch are asked."""
    asked: Counter[str] = Counter()
    current = [0]

    def capability(device: Any) -> tuple[int, int]:
        asked["capability"] += 1
        return ((9, 0), (7, 5))[current[0] if device is None else device.index]

    class Active:
        def get_current_target(self) -> Any:
            asked["target"] += 1
            return SimpleNamespace(backend="cuda", arch=(90, 75)[current[0]])

        def get_active_torch_device(self) -> torch.device:
            asked["place"] += 1
            return torch.device("cuda", current[0])

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: Any) -> None:
            current[0] = self.before

    monkeypatch.setattr(kernel_device, "interprets", lambda: False)
    monkeypatch.setattr(type(driver), "active", property(lambda self: Active()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "device", Current)
    forget()
    yield asked
    forget()


def test_a_device_is_asked_once(questions: Counter[str]) -> None:
    card = torch.device("cuda", 0)
    for _ in range(3):
        assert device_reasons(card) == [] and target(card).arch == 90
    assert questions == {"capability": 1, "target": 2, "place": 1}


def test_each_of_two_cards_has_its_own_target_and_reasons(questions: Counter[str]) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [target(card).arch for card in (first, second, first)] == [90, 75, 90]
    assert device_reasons(first) == []
    assert device_reasons(second) == ["the card's compute capability is 7.5, at least 8.0 is needed"]


def test_tensors_elsewhere_are_a_reason(questions: Counter[str]) -> None:
    assert device_reasons(torch.device("cpu")) == ["tensors are on cpu, Triton's kernels run on cuda"]


def test_a_reason_that_is_changed_is_whole_when_asked_again(questions: Counter[str]) -> None:
    device_reasons(torch.device("cpu")).append("another")
    assert len(device_reasons(torch.device("cpu"))) == 1


def test_without_a_driver_there_is_a_reason(questions: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Any) -> Any:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(type(driver), "active", property(none))
    assert device_reasons(torch.device("cuda", 0)) == ["Triton finds no GPU that it can drive"]


def test_without_triton_there_is_a_reason_and_nothing_is_imported(
    questions: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_device, "find_spec", lambda name: None)
    monkeypatch.setattr(kernel_device, "interprets", None)
    assert device_reasons(torch.device("cuda")) == ["triton is not installed (on Linux: pip install triton)"]


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"), [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.0", "2.5.5", True)]
)
def test_an_interpreter_that_fails_with_this_numpy_is_told(
    triton: str, numpy: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    reason = interpreter.broken()
    assert runs == (reason is None)
    assert runs or f"the interpreter of triton {triton} fails with numpy {numpy}" in str(reason)


# How products of float32 are made on a card and on a CPU, by each way of saying so and by two at once.
SETTINGS: dict[str, tuple[Callable[[], object], str, str]] = {
    "nothing": (lambda: None, "highest", "highest"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "high", "high"),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), "high", "medium"),
    "allow_tf32": (lambda: setattr(backends.cuda.matmul, "allow_tf32", True), "high", "highest"),
    "products on a card": (lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"), "high", "highest"),
    "products on a CPU": (lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"), "highest", "medium"),
    "everything on a card": (lambda: setattr(backends.cudnn, "fp32_precision", "tf32"), "high", "highest"),
    "everything": (lambda: setattr(backends, "fp32_precision", "tf32"), "high", "high"),
    "convolutions": (lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"), "highest", "highest"),
    "high, but not on a card": (
        lambda: [
            torch.set_float32_matmul_precision("high"),
            setattr(backends.cuda.matmul, "fp32_precision", "ieee"),
        ],
        "highest",
        "high",
    ),
    "everything but products on a card": (
        lambda: [setattr(backends, "fp32_precision", "tf32"), setattr(backends.cuda.matmul, "fp32_precision", "ieee")],
        "highest",
        "high",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_products_of_float32_follow_torch_s_settings_old_and_new(
    name: str, precision_settings: None, questions: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, on_card, on_cpu = SETTINGS[name]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fused, "interprets", lambda: False)
    choose()
    assert (float32_matmul_precision("cuda"), float32_matmul_precision("cpu")) == (on_card, on_cpu)
    assert machine.describe("cpu")["precision"] == on_cpu
    assert dot_precision() == {"highest": "tf32x3", "high": "tf32"}[on_card]
    assert fused.planes_of(torch.float32)[0] == {"highest": 3, "high": 2}[on_card]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dot_precision() == "ieee"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_precision_to_tune_for_is_in_force_and_what_was_set_comes_back(name: str, precision_settings: None) -> None:
    choose, on_card, _ = SETTINGS[name]
    choose()
    for wanted in ("highest", "high", None):
        with tune.matmul_precision(wanted):
            assert float32_matmul_precision("cuda") == (wanted or on_card)
        assert float32_matmul_precision("cuda") == on_card
