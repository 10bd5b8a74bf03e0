"""Budgets of memory: every plan gives the plain call's result, and takes the memory that it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_close_enough
from recipe import fill, wave

from anyup import AnyUp, planning, streaming
from anyup.banded import Bands
from anyup.planning import Plan, Task

IMAGE, FEATURES = wave((2, 3, 23, 17), 3, 0.8), wave((2, 9, 6, 5), 7)


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


def follow(monkeypatch: pytest.MonkeyPatch, bands: Bands | None, one_by_one: bool = False) -> None:
    """Every call and stream from now on follows this plan."""

    def chosen(task: Task, limit: int | None) -> Plan:
        if bands is None:
            return planning._whole(task, limit, one_by_one)
        return planning._banded(task, bands, limit)

    monkeypatch.setattr(streaming, "choose", chosen)


def assert_calls_exactly(arguments: dict[str, Any], size: tuple[int, int] | None, dtype: torch.dtype) -> None:
    image, features = IMAGE.to(dtype), FEATURES.to(dtype)
    with torch.no_grad():
        reference = upsampler(**arguments, backend="reference").to(dtype)
        expected = reference._upsample(image, features, size or (23, 17), False, None, None)
        exact = reference.double()._upsample(image.double(), features.double(), size or (23, 17), False, None, None)
        assert_close_enough(upsampler(**arguments).to(dtype)(image, features, size), expected, exact)


KEPT = [
    Bands(5, 3),
    Bands(5, 3, together=True, kept=10, kept_for_output=5),
    Bands(5, 3, together=True, kept=23, kept_for_output=23),
    Bands(23, 30, together=True, kept=23),
    Bands(5, 3, together=False),
    Bands(5, 4, together=False, kept=10, kept_for_output=10),
    Bands(5, 3, together=False, kept=15, kept_for_output=5, encoded=10),
    Bands(5, 3, together=False, kept=23, kept_for_output=23, encoded=23),
    Bands(1, 1, together=False, kept=20, kept_for_output=0, encoded=3),
]


@pytest.mark.parametrize("bands", KEPT, ids=str)
@pytest.mark.parametrize("size", [None, (9, 13), (40, 34)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"kernel_size": 3, "window": "cell"}], ids=str)
def test_whatever_is_kept_the_result_is_the_plain_call_s(
    arguments: dict[str, Any], size: tuple[int, int] | None, bands: Bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, bands)
    assert_calls_exactly(arguments, size, torch.float64)
