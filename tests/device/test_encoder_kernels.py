"""The pixel encoder's kernels on a card's path, against float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.accuracy import assert_close_enough, output_and_gradients
from support.card import DTYPES, in_dtypes
from support.encoder_statistics import assert_statistics_lose_nothing
from support.pixel_encoder_cases import PAIRS, Shape, assert_pair_accurate, encoder, parameters_of, tensors_of

from anyup.ops.pixel_encoder import explain_backends, fused_gradients, fused_passes
from anyup.ops.precision import dtype_name

pytestmark = pytest.mark.gpu

SHAPES = {
    "rotated, batch 2": Shape((9, 17), rotates=True, batch=2),
    "as wide as the input": Shape((9, 15), inputs=16),
    "no projection": Shape((7, 9), inputs=None),
    "pooled to overlapping cells": Shape((11, 9), (4, 3), inputs=16),
    "channels that are no power of two": Shape((6, 7), dim=24, rotates=True),
}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(SHAPES))
def test_the_encoder_obeys_the_error_rule(
    name: str, dtype: torch.dtype, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_passes, "multiprocessors", lambda device: 2)  # programs walk over several tiles
    assert_accurate(SHAPES[name], dtype)
    assert launched.total() == 5, launched


@pytest.mark.parametrize("name", ["as wide as the input", "pooled to overlapping cells"])
def test_products_of_many_pixels_obey_the_error_rule(
    name: str, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three of float16, on targets that take them."""
    monkeypatch.setattr(fused_passes, "MANY_PIXELS", 0)
    monkeypatch.setattr(fused_passes, "multiprocessors", lambda device: 2)
    assert_accurate(SHAPES[name], torch.float32)
    assert launched.total() == 5, launched


def assert_accurate(shape: Shape, dtype: torch.dtype) -> None:
    """Raise an AssertionError unless the encoder is the kernels, and obeys the error rule."""
    tensors = {key: tensor.to("cuda") for key, tensor in tensors_of(shape, dtype).items()}
    run = encoder(shape)
    with torch.no_grad():
        assert explain_backends(tensors["pixels"], parameters_of(tensors), output_size=shape.output).chosen == "triton"
        actual = run(backend=None, **tensors)
        reference = run(backend="reference", **{key: tensor.cpu() for key, tensor in tensors.items()})
        exact = run(backend="reference", **{key: tensor.cpu().double() for key, tensor in tensors.items()})
    assert_close_enough(actual.cpu(), reference, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_encoders_of_the_same_pixels_obey_the_error_rule(
    dtype: torch.dtype, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_passes, "multiprocessors", lambda device: 4)  # programs walk over several tiles
    assert_pair_accurate(PAIRS["batch 2"], dtype, "cuda", backend=None)
    assert launched.total() == 5, launched


def test_statistics_lose_nothing(launched: Counter[str]) -> None:
    assert_statistics_lose_nothing(1_120, 64, 2, 10.0, "cuda")
    assert launched.total() == 2


GRADIENTS = {
    "rotated, batch 2": Shape((9, 17), rotates=True, batch=2),
    "pooled to overlapping cells": Shape((11, 9), (4, 3), inputs=16),
    "channels that are no power of two": Shape((9, 8), inputs=24, dim=40),
}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(GRADIENTS))
def test_gradients_obey_the_error_rule(
    name: str, dtype: torch.dtype, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_gradients, "multiprocessors", lambda device: 2)
    assert_gradients_accurate(GRADIENTS[name], dtype)
    square = GRADIENTS[name].inputs == GRADIENTS[name].dim
    assert launched[f"pixel_encoder_backward_half, {dtype_name(dtype)}"] == 4 + square, launched


def test_gradients_whose_weights_programs_hold_obey_the_error_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import pixel_encoder_config as rules

    others, chosen = rules.encoder_configs, rules.EncoderConfig(32, num_warps=8, num_stages=2, joins=True)
    monkeypatch.setattr(rules, "encoder_configs", lambda kind, *of: [chosen] if kind == "half" else others(kind, *of))
    monkeypatch.setattr(fused_gradients, "multiprocessors", lambda device: 2)
    assert_gradients_accurate(GRADIENTS["pooled to overlapping cells"], torch.bfloat16)


def assert_gradients_accurate(shape: Shape, dtype: torch.dtype) -> None:
    """Raise an AssertionError unless the kernels' result and gradients obey the error rule."""
    tensors, run = tensors_of(shape, dtype), encoder(shape)
    actual = output_and_gradients(run, {key: tensor.cuda() for key, tensor in tensors.items()}, "triton")
    reference = output_and_gradients(run, tensors, "reference")
    exact = output_and_gradients(run, {key: tensor.double() for key, tensor in tensors.items()}, "reference")
    for key in exact:
        assert_close_enough(actual[key].cpu(), reference[key], exact[key], key)
