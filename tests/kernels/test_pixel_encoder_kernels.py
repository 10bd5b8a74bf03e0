"""The pixel encoder's Triton kernels, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate, assert_close_enough, output_and_gradients
from support.encoder_statistics import assert_statistics_lose_nothing
from support.mutations import mutate
from support.pixel_encoder_cases import PAIRS, Shape, assert_pair_accurate, encoder, pair_of, parameters_of, tensors_of
from support.pixel_encoder_cases import SHAPES as ALL
from support.recipe import INTERPRETED, fill, in_two_dtypes, wave
from torch import Tensor

from anyup import AnyUp
from anyup.ops.dispatch import BackendFailure
from anyup.ops.pixel_encoder import PAIR, describe_pair, encode_pair, explain_backends, fused, fused_pair, fused_passes
from anyup.ops.pixel_encoder.arguments import EPS
from anyup.ops.pixel_encoder.statistics import Affine, Statistics

pytestmark = INTERPRETED

# Few tiles: each program of the interpreter takes some hundredths of a second.
SHAPES = {
    **{name: shape for name, shape in ALL.items() if "several tiles" not in name},
    "several tiles, batch 2": Shape((9, 17), rotates=True, batch=2),
    "several tiles, as wide as the input": Shape((9, 17), inputs=16),
    "pooled to large cells": Shape((21, 19), (2, 3), inputs=16),
    "channels that are no power of two": Shape((6, 7), dim=24, rotates=True),
    "channels that are no power of two, pooled": Shape((6, 7), (2, 3), inputs=24, dim=40),
    "channels in pieces": Shape((5, 7), dim=64, rotates=True),
    "channels in pieces, as wide as the input, batch 2": Shape((5, 7), inputs=64, dim=64, batch=2),
    "channels in pieces, pooled": Shape((6, 7), (2, 3), inputs=64, dim=64),
    "channels in pieces that are no power of two": Shape((4, 5), inputs=40, dim=40, rotates=True),
    "channels in four pieces": Shape((3, 6), dim=128, rotates=True),
}


def assert_kernels_accurate(shape: Shape, tensors: dict[str, Tensor], **settings: Any) -> None:
    """Raise an AssertionError unless what the kernels return obeys the error rule."""
    with torch.no_grad():
        run = encoder(shape)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        actual = run(backend="triton", **tensors, **settings)
        reference, exact = (run(backend="reference", **given) for given in (tensors, wide))
    assert_close_enough(actual, reference, exact)


@pytest.mark.parametrize(("name", "dtype"), in_two_dtypes(SHAPES))
def test_kernels_obey_the_error_rule(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    assert_kernels_accurate(SHAPES[name], tensors_of(SHAPES[name], dtype))


def test_a_mean_far_from_zero_obeys_the_error_rule() -> None:
    tensors = tensors_of(SHAPES["image"])
    assert_kernels_accurate(SHAPES["image"], {**tensors, "pixels": tensors["pixels"] + 50})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "pooled"])
def test_pixels_of_any_strides_obey_the_error_rule(name: str) -> None:
    tensors = tensors_of(SHAPES[name])
    channels_first = tensors["pixels"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert_kernels_accurate(SHAPES[name], {**tensors, "pixels": channels_first})
    spread = torch.full((1, *(2 * n for n in tensors["pixels"].shape[1:])), torch.nan)[:, ::2, 1::2, ::2]
    assert_kernels_accurate(SHAPES[name], {**tensors, "pixels": spread.copy_(tensors["pixels"])})


@pytest.mark.parametrize("name", ["image", "pooled"])
def test_the_same_bits_come_from_run_to_run(name: str) -> None:
    tensors = tensors_of(SHAPES[name])
    with torch.no_grad():
        assert torch.equal(*(encoder(SHAPES[name])(backend="triton", **tensors) for _ in range(2)))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_many_pixels_lose_nothing(offset: float) -> None:
    assert_statistics_lose_nothing(5_003, 16, 1, offset)


def test_statistics_of_several_images_and_pieces_of_channels_lose_nothing() -> None:
    assert_statistics_lose_nothing(1_120, 64, 2, 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 24])
def test_a_norm_that_is_known_is_one_that_a_pass_makes(dim: int, dtype: torch.dtype) -> None:
    from anyup.kernels.pixel_encoder_passes import HalfBlock, Join, known_norm, map_source

    pixels = wave((1, 37, dim), 3, shift=5.0).to(dtype)
    weight, bias, identity = wave((dim,), 5, 0.2, 1.0), wave((dim,), 7), torch.eye(dim, dtype=dtype)
    kernels = fused_passes.Kernels(dtype, pixels.device, dim, 0)
    join = Join(kernels.measure(map_source(pixels), ())[0], weight.to(dtype), bias.to(dtype), EPS)
    made = kernels.measure(map_source(pixels), (HalfBlock(join, identity),))[1]
    statistics = Statistics(37, *(f(pixels[0].double()) for f in (_mean, _deviation)))
    affine = Affine.of(statistics, join.weight, join.bias, torch.float32)
    known = known_norm(*affine.stacked, dtype=dtype, form=kernels.form)
    torch.testing.assert_close(_applied(pixels, made, dim), _applied(pixels, known, dim), rtol=1e-5, atol=1e-5)


def _mean(pixels: Tensor) -> Tensor:
    return pixels.mean(dim=0)


def _deviation(pixels: Tensor) -> Tensor:
    return (pixels - pixels.mean(dim=0)).square().sum(dim=0)


def _applied(pixels: Tensor, norm: Tensor | None, dim: int) -> Tensor:
    """Pixels (1, n, D) normalised by (1, rows, D padded), of which each group has as many channels as it needs."""
    assert norm is not None
    scale, shift, *center = (row.view(8, -1)[:, : dim // 8].flatten() for row in norm[0])
    return (pixels.float() - center[0] if center else pixels.float()) * scale + shift


def test_only_one_map_is_allocated_beside_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.allocations import LargestTensor

    shape = Shape((40, 40))
    tensors = tensors_of(shape)
    monkeypatch.setattr("anyup.kernels.launch.Launch.__call__", lambda self: None)  # what is launched allocates nothing
    with torch.no_grad(), LargestTensor() as seen:
        out = fused.forward(tensors["pixels"], parameters_of(tensors), frequencies=None, output_size=(40, 40))
    assert seen.largest == out.numel() == 40 * 40 * 16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 136, "inputs": 3}, "the map has 136 channels, at most 128"),
        ({"inputs": 129}, "the input has 129 channels, at most 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_a_reason(change: dict[str, int], reason: str) -> None:
    shape = Shape((3, 4))._replace(**change)
    tensors = tensors_of(shape)
    explanation = explain_backends(tensors["pixels"], parameters_of(tensors), backend="triton")
    assert explanation.chosen is None and reason in str(explanation)


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "float64"), (torch.bfloat16, "bfloat16")])
def test_a_dtype_that_they_do_not_take_is_a_reason(dtype: torch.dtype, reason: str) -> None:
    tensors = tensors_of(Shape((3, 4)), dtype)
    assert f"pixels are {reason}" in str(explain_backends(tensors["pixels"], parameters_of(tensors), backend="triton"))


GRADIENTS = {
    "rotated": Shape((9, 11), rotates=True, batch=2),
    "of a map": Shape((7, 11), inputs=16, batch=2),
    "of more inputs than channels": Shape((9, 8), inputs=24),
    "no projection": Shape((9, 8), inputs=None),
    "pooled": Shape((8, 9), (3, 2), inputs=16),
    "enlarged": Shape((8, 9), (9, 12), inputs=None, dim=24),
    "groups of no power of two": Shape((9, 8), inputs=24, dim=40),
    "few pixels, whose gradients are torch's": Shape((4, 5), rotates=True),
    "no images": Shape((9, 11), batch=0, inputs=16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_obey_the_error_rule(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if GRADIENTS[name].batch > 1:  # several programs for an image
        monkeypatch.setattr("anyup.ops.pixel_encoder.fused_gradients.multiprocessors", lambda device: 3)
    assert_backend_accurate(encoder(GRADIENTS[name]), tensors_of(GRADIENTS[name], dtype), backend="triton")


@pytest.mark.slow
def test_gradients_of_groups_of_images_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyup.ops.pixel_encoder.fused_gradients.PIXELS_AT_A_TIME", 2 * 7 * 11)
    shape = Shape((7, 11), rotates=True, batch=3)
    assert_backend_accurate(encoder(shape), tensors_of(shape), backend="triton")


@pytest.mark.parametrize("name", ["of a map", "no projection", "groups of no power of two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_whose_weights_programs_hold_obey_the_error_rule(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_products(monkeypatch)
    monkeypatch.setattr("anyup.ops.pixel_encoder.fused_gradients.multiprocessors", lambda device: 3)
    assert_backend_accurate(encoder(GRADIENTS[name]), tensors_of(GRADIENTS[name], dtype), backend="triton")


def hold_products(monkeypatch: pytest.MonkeyPatch, **change: int) -> None:
    """Half blocks whose programs hold the weights' gradients, as on a card of compute capability 9.0."""
    from anyup.kernels import pixel_encoder_config as rules

    others = rules.encoder_configs
    chosen = rules.EncoderConfig(**{"pixels": 32, "num_warps": 8, **change}, joins=True)
    monkeypatch.setattr(rules, "encoder_configs", lambda kind, *of: [chosen] if kind == "half" else others(kind, *of))


@pytest.mark.slow
@pytest.mark.parametrize("config", [(16, 16, 4, 1, 1), (32, 32, 8, 2, 9)])
def test_a_config_of_the_gradients_changes_the_last_bits_alone(
    config: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyup.kernels import pixel_encoder_config as rules

    pixels, piece, warps, stages, blocks = config
    chosen, others = rules.EncoderConfig(pixels, warps, stages, piece, blocks=blocks), rules.encoder_configs
    monkeypatch.setattr(rules, "encoder_configs", lambda kind, *of: [chosen] if kind == "half" else others(kind, *of))
    tensors = tensors_of(Shape((9, 11), inputs=16), torch.float32)
    assert_backend_accurate(encoder(Shape((9, 11), inputs=16)), tensors, backend="triton")
    first, second = (output_and_gradients(encoder(Shape((9, 11), inputs=16)), tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", [{"pixels": 8}, {"piece": 24}, {"num_warps": 3}, {"num_stages": 0}, {"blocks": 0}])
def test_a_config_of_the_gradients_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    from anyup.kernels.pixel_encoder_config import EncoderConfig

    with pytest.raises(ValueError, match=next(iter(change))):
        EncoderConfig(**{"pixels": 64, "piece": 32, "num_warps": 8, **change})


GRADIENT_MUTATIONS = {
    "a program too few": ("means_kernel", "tl.range(0, programs)", "tl.range(0, programs - 1)"),
    "a mean over too many": ("means_kernel", "(CHANNELS // 8))", "CHANNELS)"),
    "no mean": ("finished", "total - mean[None, :] - z", "total - z"),
    "no slope": ("finished", "- z * slope[None, :]", ""),
    "no residual": ("finished", "total += tl.load", "total += 0 * tl.load"),
    "no outer product": ("half_kernel", "tl.trans(outer), x", "tl.trans(outer) * 0, x"),
    "what no program takes": ("thin_kernel", "more = sums + update", "more = sums + 2 * update"),
    "another slope of silu": ("half_kernel", "(1.0 + normed * (1.0 - ", "(1.0 + normed * (1.0 + "),
    "the sum of another product": ("half_kernel", "tl.sum(back * z, axis=0)", "tl.sum(back * normed, axis=0)"),
    "what was not activated": ("half_kernel", "x = (normed * sigmoid)", "x = (normed + 0 * sigmoid)"),
    "the sine of another half": ("rotation_kernel", "second_grad * second_sine", "second_grad * first_sine"),
    "cells of another row": ("held_by", "first <= position", "first < position"),
    "columns by rows": ("rotation_kernel", "first_grad * along", "first_grad * down"),
}


@pytest.mark.parametrize("mutation", GRADIENT_MUTATIONS)
def test_a_mutated_kernel_of_the_gradients_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyup.ops.pixel_encoder.fused_gradients.multiprocessors", lambda device: 3)
    kernel, *change = GRADIENT_MUTATIONS[mutation]
    name = f"_pixel_encoder_backward_{kernel}" if kernel.endswith("kernel") else f"_{kernel}"
    mutate(monkeypatch, "pixel_encoder_backward", name, *change)
    if mutation == "no outer product":
        hold_products(monkeypatch)
    shape = GRADIENTS[
        {"rotation_kernel": "rotated", "thin_kernel": "rotated", "held_by": "pooled"}.get(kernel, "of a map")
    ]
    with pytest.raises(AssertionError, match="gradient of .*: error"):
        assert_backend_accurate(encoder(shape), tensors_of(shape), backend="triton")


# Two encoders of the same pixels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_obeys_the_error_rule(
    name: str, dtype: torch.dtype, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_passes, "multiprocessors", lambda device: 4)
    assert_pair_accurate(PAIRS[name], dtype)


def test_a_pair_s_operator_keeps_to_its_schema() -> None:
    first, second = (parameters_of(own) for own in pair_of(PAIRS["batch 2"], torch.float32))
    pixels = pair_of(PAIRS["batch 2"], torch.float32)[0]["pixels"]
    flat = [[p.projection, *p.block1, *p.block2] for p in (first, second)]
    arguments = (pixels, *flat, torch.randn(4, 5, 3, 3), [3, 2], 5, 7)
    with torch.no_grad():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.anyup.pixel_encoder_pair.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sizes": [(3, 2), (5, 7)]}, "keys of 5 x 7 are not pooled from 5 x 7 pixels"),
        ({"sizes": [(6, 2)]}, "keys of 6 x 2 are not pooled"),
        ({"sizes": []}, "keys of 5 x 7 are not pooled"),
        ({"backend": "torch"}, "the pixel_encoder runs on torch"),
        ({"convolution": torch.zeros(4, 5, 3, 3, requires_grad=True)}, "a gradient is wanted"),
        ({"pixels": torch.zeros(0, 5, 7, 16)}, "there are no pixels"),
    ],
)
def test_where_encoders_do_not_run_as_a_pair_a_reason_says_so(change: dict[str, Any], reason: str) -> None:
    first, second = pair_of(PAIRS["batch 2"], torch.float32)
    arguments: dict[str, Any] = {"pixels": first["pixels"], "sizes": [(3, 2)], "output_size": (5, 7)}
    arguments |= {
        "first": parameters_of(first),
        "second": parameters_of(second),
        "convolution": torch.zeros(4, 5, 3, 3),
    }
    assert PAIR.explain(describe_pair(**arguments, backend="triton")).chosen == "triton"
    arguments = {"backend": "triton", **arguments, **change}
    assert encode_pair(**arguments) is None
    explanation = str(PAIR.explain(describe_pair(**arguments)))
    assert "one encoder after the other" in explanation and reason in explanation


def queries_and_keys(upsampler: AnyUp) -> list[Tensor]:
    with torch.no_grad():
        queries, (keys,) = upsampler.queries_and_image_keys(wave((1, 3, 6, 7), 3, 0.8), (6, 7), [(3, 2)])
    return [queries, keys]


def test_where_a_pair_fails_the_encoders_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise BackendFailure("no such instruction")

    monkeypatch.setattr(PAIR, "_failures", {})
    monkeypatch.setattr(fused_pair, "forward", fail)
    with pytest.warns(UserWarning, match="pixel_encoder_pair: backend 'triton' failed .*no such instruction"):
        found = queries_and_keys(model(backend="triton"))
    torch.testing.assert_close(found, queries_and_keys(model(backend="torch")), rtol=1e-4, atol=1e-4)


def test_a_hook_sees_an_encoder_that_would_run_in_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    forward = fused_pair.forward
    monkeypatch.setattr(fused_pair, "forward", lambda *a, **k: made.append(None) or forward(*a, **k))
    upsampler, told = model(backend="triton"), []
    expected = queries_and_keys(upsampler)
    assert made
    made.clear()
    upsampler.key_encoder.register_forward_hook(lambda *_: told.append(None))
    torch.testing.assert_close(queries_and_keys(upsampler), expected, rtol=1e-5, atol=1e-5)
    assert told and not made


def model(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("size", [None, (7, 9)])
def test_the_whole_upsampler_runs_on_kernels(size: tuple[int, int] | None) -> None:
    image, features = wave((1, 3, 14, 11), 3, 0.8), wave((1, 16, 4, 3), 7)
    with torch.no_grad():
        kernels = model(backend="triton")
        assert kernels.explain(image, features, size).chosen["pixel_encoder"] == "triton"
        narrow, exact = model(backend="reference"), model(backend="reference").double()
        actual, reference = kernels(image, features, size), narrow(image, features, size)
        assert_close_enough(actual, reference, exact(image.double(), features.double(), size))


@pytest.mark.parametrize(("filters", "encoders"), [(32, 2), (16, 1)])
def test_the_blocks_of_the_keys_run_on_kernels_where_they_keep_their_width(
    filters: int, encoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyup.kernels.launch import Launch

    passes: list[Launch] = []

    def launch(self: Launch, really: Any = Launch.__call__) -> None:
        passes.extend([self] * ("HALVES" in self.constants))
        really(self)

    monkeypatch.setattr(Launch, "__call__", launch)
    unified, joined = wave((1, filters, 4, 3), 3), wave((1, 64, 4, 3), 7)

    def blocks(backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        upsampler = fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=filters, backend=backend), 0).to(dtype)
        with torch.no_grad():
            return [
                upsampler.feature_keys(unified.to(dtype)),
                upsampler.encode(upsampler.aggregation, joined.to(dtype)),
            ]

    found = blocks("triton")
    assert len(passes) == 5 * encoders
    for made in zip(found, blocks("reference"), blocks("reference", torch.float64), strict=True):
        assert_close_enough(*made)


def test_a_model_that_asks_for_kernels_trains() -> None:
    image, features = wave((1, 3, 6, 7), 3, 0.8), wave((1, 16, 3, 2), 7)
    upsampler = model(backend="triton")
    assert upsampler.explain(image, features).chosen["pixel_encoder"] == "triton"
    upsampler(image, features).sum().backward()
    assert upsampler.key_encoder[0].weight.grad is not None


# Mutations: what the tests above must notice.


MUTATIONS = {
    "no residual": ("passes", "encoded_pixels", "(x[piece] + y[piece],)", "(y[piece],)"),
    "the same piece of a weight again": ("passes", "load_matrix", "INNER * INPUT", "0 * INPUT"),
    "a sign of the rotation": ("passes", "rotated", "cosine - y[HALF", "cosine + y[HALF"),
    "a sign of the rotation of pieces": ("passes", "rotated", "cosine - y[HALF", "cosine + y[HALF"),
    "the other sign of a cosine": ("passes", "sine_and_cosine", "(number + 1) & 2", "number & 2"),
    "a product of two channels once": (
        "moments", "_pixel_encoder_moments_kernel", "(1 if other == channel else 2)", "1",
    ),
    "a cell too high": ("pool", "_cell", "cells_high - top", "cells_high - top + 1"),
    "pixels that do not exist": (
        "pool", "_pixel_encoder_pool_kernel", "tl.where(exists[:, None], active", "tl.where(True, active",
    ),
    "pixels that do not exist in the statistics": ("passes", "away_from", "exists, 1.0, 0.0", "exists, 1.0, 1.0"),
    "programs' means for the map's": ("passes", "make_norm", "+ values * between * between", ""),
    "a pivot forgotten": ("passes", "store_sums", "pivot + offset", "offset"),
    "a centre forgotten": ("passes", "activated", "x - tl.load(norm + 2 * DIM + slot)[None, :]", "x"),
}  # fmt: skip


PAIR_MUTATIONS = {
    "the first encoder's weight": ("passes", "_pixel_encoder_pass_kernel", "weight1 = second_weight1", "pass"),
    "the first encoder's bias": ("passes", "_pixel_encoder_pass_kernel", "bias = second_bias", "pass"),
    "another image": ("passes", "_pixel_encoder_pass_kernel", "image % images if PAIR", "image // 2 if PAIR"),
    "a weight that is not arranged": ("pool", "arrange_weight", "number % TAPS * INPUTS", "number % INPUTS"),
    "the pooled encoder's weight": (
        "pool", "_pixel_encoder_pool_kernel", "ROWS * DIM, other_weight1", "ROWS * DIM, weight1",
    ),
    "the pooled encoder's norm": ("pool", "_pixel_encoder_pool_kernel", "joined * 8, other_gain", "joined * 8, gain"),
    "the encoded map pooled": ("pool", "_pixel_encoder_pool_kernel", "pixels += images", "pixels += 0 * images"),
    "a tile left out": ("pool", "_encode_map", "tl.range(tl.program_id(0)", "tl.range(tl.program_id(0) + 1"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", PAIR_MUTATIONS)
def test_a_mutated_pair_fails(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, right, wrong = PAIR_MUTATIONS[mutation]
    mutate(monkeypatch, f"pixel_encoder_{module}", name, right, wrong)
    with pytest.raises(AssertionError):
        assert_pair_accurate(PAIRS["batch 2"], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, right, wrong = MUTATIONS[mutation]
    mutate(monkeypatch, f"pixel_encoder_{module}", name, right, wrong)
    name = "pooled to overlapping cells" if module == "pool" else "several tiles, batch 2"
    shape = SHAPES["channels in pieces" if "piece" in mutation else name]
    # More programs than walk over a small map in the interpreter.
    monkeypatch.setattr(fused_passes, "multiprocessors", lambda device: 4)
    with pytest.raises(AssertionError, match="result: error"):
        assert_kernels_accurate(shape, tensors_of(shape))
