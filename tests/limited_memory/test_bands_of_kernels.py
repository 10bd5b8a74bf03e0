"""Bands of an image encoded by the Triton kernels, in Triton's interpreter: what a stream and a budget work on."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import INTERPRETED, wave
from test_planning import follow, upsampler

from anyup.limited_memory.plans import Bands
from anyup.ops.dispatch import BackendFailure
from anyup.ops.pixel_encoder import fused_band
from anyup.ops.pixel_encoder.operator import OPERATION

pytestmark = [INTERPRETED, pytest.mark.slow, pytest.mark.usefixtures("as_on_a_card")]

IMAGE, FEATURES = wave((1, 3, 13, 9), 3, 0.8), wave((1, 9, 4, 3), 7)
KERNELS = {"pixel_encoder": "triton"}

PLANS = {
    "nothing kept": Bands(5, 3),
    "nothing kept, one encoder after the other": Bands(5, 3, together=False),
    "the encoded image kept for some rows": Bands(4, 3, kept=8, kept_for_output=4),
    "the encoded image kept": Bands(5, 4, kept=13, kept_for_output=13),
    "one map kept for some rows": Bands(4, 5, together=False, kept=8, kept_for_output=4),
    "one map kept, the encoded image beside it": Bands(5, 3, together=False, kept=13, kept_for_output=10, encoded=5),
    "one band": Bands(13, 13),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The launches of the pixel encoder's passes, by whether they measure, store, rotate."""
    from anyup.kernels.launch import Launch

    launches: Counter[str] = Counter()
    call = Launch.__call__

    def recorded(self: Launch) -> None:
        if self.kernel.__name__ == "_pixel_encoder_pass_kernel":
            for what in ("MEASURES", "STORES", "ROTATES"):
                launches[what] += bool(self.constants[what])
        call(self)

    monkeypatch.setattr(Launch, "__call__", recorded)
    return launches


def assert_bands_accurate(
    monkeypatch: pytest.MonkeyPatch,
    bands: Bands,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    **arguments: Any,
) -> None:
    """Raise an AssertionError unless a call in these bands obeys the error rule."""
    given = [(IMAGE.to(kind), FEATURES.to(kind), size) for kind in (dtype, torch.float64)]
    with torch.no_grad():
        reference, exact = (upsampler(**arguments).to(some[0].dtype)(*some) for some in given)
        follow(monkeypatch, bands)
        actual = upsampler(backend=KERNELS, **arguments).to(dtype)(*given[0])
    assert_close_enough(actual, reference, exact)


@pytest.mark.parametrize("name", PLANS)
def test_bands_obey_the_error_rule(name: str, monkeypatch: pytest.MonkeyPatch, launched: Counter[str]) -> None:
    assert_bands_accurate(monkeypatch, PLANS[name])
    assert launched["MEASURES"] >= 12 and launched["STORES"] and launched["ROTATES"]


@pytest.mark.parametrize(("name", "size"), [("nothing kept", (6, 5)), ("one map kept for some rows", (20, 18))])
def test_an_output_of_another_size_obeys_the_error_rule(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_bands_accurate(monkeypatch, PLANS[name], size=size)


@pytest.mark.parametrize("name", ["nothing kept", "one map kept for some rows"])
def test_half_precision_obeys_the_error_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bands_accurate(monkeypatch, PLANS[name], torch.float16)


@pytest.mark.parametrize("name", ["nothing kept", "the encoded image kept", "one map kept for some rows"])
def test_an_encoder_whose_first_projection_is_not_thin_obeys_the_error_rule(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_bands_accurate(monkeypatch, PLANS[name], kernel_size=3)


def test_no_memory_is_read_that_nobody_wrote(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    assert_bands_accurate(monkeypatch, PLANS["one map kept for some rows"])


# A card that takes a kernel's first configs, and then none.


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No failure is remembered, before and after."""
    OPERATION._failures.clear()
    yield
    OPERATION._failures.clear()


def failing_after(count: int, error: Exception, times: float = math.inf) -> Callable[..., Any]:
    run, calls = fused_band.Kernels.run, [0]

    def failing(self: Any, *arguments: Any, **known: Any) -> Any:
        calls[0] += 1
        if count < calls[0] <= count + times:
            raise error
        return run(self, *arguments, **known)

    return failing


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("the encoded image kept for some rows", count) for count in (0, 8, 27)),
        *(("one map kept for some rows", count) for count in (3, 17, 40)),
    ],
)
def test_where_a_kernel_fails_the_rest_runs_on_the_next_backend(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setattr(fused_band.Kernels, "run", failing_after(count, BackendFailure("planted")))
    with torch.no_grad():
        expected = upsampler()(IMAGE, FEATURES)
        follow(monkeypatch, PLANS[name])
        model = upsampler(backend={"pixel_encoder": ("triton", "torch")})
        with pytest.warns(UserWarning, match="pixel_encoder: backend 'triton' failed on cpu .*planted"):
            actual = model(IMAGE, FEATURES)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("the encoded image kept for some rows", count) for count in (2, 25, 55, 94)),
        *(("one map kept for some rows", count) for count in (16, 46, 70)),
    ],
)
def test_work_goes_on_where_memory_did_not_suffice(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = failing_after(count, torch.OutOfMemoryError("planted"), times=1)
    monkeypatch.setattr(fused_band.Kernels, "run", failing)
    with torch.no_grad():
        expected = upsampler()(IMAGE, FEATURES)
        follow(monkeypatch, PLANS[name])
        actual = upsampler(backend=KERNELS)(IMAGE, FEATURES)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_kernels_that_were_asked_for_by_name_fail_for_good(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(fused_band.Kernels, "run", failing_after(5, BackendFailure("planted")))
    follow(monkeypatch, PLANS["nothing kept"])
    with torch.no_grad(), pytest.raises(BackendFailure, match="planted"):
        upsampler(backend=KERNELS)(IMAGE, FEATURES)


# What must fail, or the tests above say nothing.

MUTATIONS = {
    "what is kept is not copied": ("            self._trunk.copy_(self._x1)", "            pass"),
    "groups' deviations for their channels'": ("deviations / (self._dim // GROUPS)", "deviations"),
    "a normalisation too early": ("self._norms[number + 1]", "self._norms[max(number, first + 1)]"),
    "not rotated": ("rotation=angles, size=size)", "size=size)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_band_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTATIONS[name]
    source = inspect.getsource(fused_band)
    assert source.count(right) == 1
    scope = {"__name__": fused_band.__name__}
    exec(compile(source.replace(right, wrong), fused_band.__file__, "exec"), scope)
    monkeypatch.setattr(fused_band, "Band", scope["Band"])
    with pytest.raises(AssertionError):
        assert_bands_accurate(monkeypatch, PLANS["one map kept for some rows"])
