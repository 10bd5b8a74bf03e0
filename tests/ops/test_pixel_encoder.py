"""The pixel encoder: every backend against the reference, its statistics, and its bands."""

from __future__ import annotations

import random
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import (
    BACKENDS,
    DTYPES,
    assert_backend_accurate,
    assert_backend_accurate_over_draws,
    assert_close_enough,
    output_and_gradients,
)
from support.allocations import LargestTensor
from support.pixel_encoder_cases import SHAPES, Shape, encoder, parameters_of, tensors_of
from torch import Tensor

from anyup.ops.linear import linear
from anyup.ops.pixel_encoder import (
    eager,
    explain_backends,
    reference,
)
from anyup.ops.pixel_encoder.gradients import Spread
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import Affine, Statistics, TileStatistics
from anyup.ops.pixel_encoder.thin import ThinProjection


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_backend_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_backend_accurate_over_draws(encoder(SHAPES[name]), lambda seed: tensors_of(SHAPES[name], dtype, seed))


@pytest.mark.parametrize("name", ["several tiles", "pooled, several tiles", "enlarged", "no projection"])
def test_torch_backend_reads_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    assert_backend_accurate(encoder(SHAPES[name]), tensors_of(SHAPES[name]))


@pytest.mark.parametrize("inputs", [3, 24, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pixels_far_from_zero_obey_the_error_rule(inputs: int | None, dtype: torch.dtype) -> None:
    shape = Shape((96, 100), inputs=inputs)
    tensors = tensors_of(shape, dtype)
    tensors["pixels"] = tensors["pixels"] * 0.1 + 20  # statistics from raw moments would cancel
    assert_backend_accurate(encoder(shape), tensors, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_constant_image_obeys_the_error_rule(dtype: torch.dtype) -> None:
    shape = SHAPES["odd image"]
    tensors = tensors_of(shape, dtype)
    tensors["pixels"] = torch.ones_like(tensors["pixels"]) * torch.tensor([0.3, -1.1, 2.0], dtype=dtype)
    assert_backend_accurate(encoder(shape), tensors, gradients=False)


@pytest.mark.parametrize("name", ["odd image", "pooled to overlapping cells", "batch 2"])
def test_strides_change_nothing(name: str) -> None:
    shape = SHAPES[name]
    tensors = tensors_of(shape)
    expected = output_and_gradients(encoder(shape), tensors, "torch")
    pixels = tensors["pixels"]
    for moved in (
        pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.stack((pixels, pixels), 2)[:, :, 0],
        pixels.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not moved.is_contiguous()
        actual = output_and_gradients(encoder(shape), {**tensors, "pixels": moved}, "torch")
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape((3, 4), dim=8, rotates=True),
        Shape((3, 4), (2, 3), inputs=None, dim=8),
        Shape((3, 2), (4, 3), inputs=2, dim=8),
    ],
)
def test_gradients_are_those_of_finite_differences(shape: Shape, backend: str) -> None:
    tensors = tensors_of(shape, torch.float64)
    names, inputs = list(tensors), tuple(t.requires_grad_() for t in tensors.values())

    def run(*values: Tensor) -> Tensor:
        return encoder(shape)(backend=backend, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def draw(shape: Shape, dtype: torch.dtype, seed: int, n: int) -> dict[str, Tensor]:
    """The n-th of three draws of the inputs."""
    return tensors_of(shape, dtype, 3 * seed + n)


@pytest.mark.parametrize("count", [15, pytest.param(75, marks=pytest.mark.slow)])
def test_random_shapes_obey_the_error_rule(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        size, dim = (rng.randint(1, 40), rng.randint(1, 40)), rng.choice([8, 16, 40])
        shape = Shape(
            size,
            rng.choice([None, (rng.randint(1, 12), rng.randint(1, 12)), (rng.randint(1, 60), rng.randint(1, 60))]),
            # One input makes all channels multiples of each other; in groups of one channel rounding decides then.
            rng.choice([None, 3, 20] if dim == 8 else [None, 1, 3, 20]),
            dim,
            rng.random() < 0.5,
            rng.randint(1, 2),
        )
        dtype = rng.choice(DTYPES)
        try:
            assert_backend_accurate_over_draws(encoder(shape), partial(draw, shape, dtype, seed))
        except AssertionError as error:
            raise AssertionError(f"{shape}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize("measures", [True, False])
@pytest.mark.parametrize("inputs", [3, 24])
def test_nothing_that_a_tile_makes_outlives_it(
    inputs: int, measures: bool, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    torch.set_num_threads(1)
    tensors = tensors_of(Shape((100, 250), inputs=inputs))
    pixels, parameters = tensors["pixels"][0].flatten(0, 1), parameters_of(tensors)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noted(*given: Any) -> Tensor:
        result = linear(*given)
        made.append(weakref.ref(result))
        alive.append(sum(each() is not None for each in made))
        return result

    monkeypatch.setattr(eager, "linear", noted)
    norm = Affine(torch.ones(16), torch.zeros(16), None)
    band = eager.Band(pixels, parameters)
    for step in range(4):
        (band.advance if measures else band.apply)(norm if step else None)
    band.finish(norm)
    assert len(alive) > 20 and max(alive) <= 2


@pytest.mark.parametrize("threads_now", [1, 2, 5])
@pytest.mark.parametrize("name", ["several tiles", "pooled, several tiles"])
def test_result_does_not_depend_on_the_number_of_threads(name: str, threads_now: int, threads: None) -> None:
    torch.set_num_threads(threads_now)
    assert_backend_accurate(encoder(SHAPES[name]), tensors_of(SHAPES[name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs", [3, 24, None])
def test_bands_with_merged_statistics_are_the_whole_map(inputs: int | None, dtype: torch.dtype) -> None:
    shape = Shape((37, 20), inputs=inputs)
    tensors = tensors_of(shape, dtype)
    parameters = parameters_of(tensors)
    rows = tensors["pixels"][0]
    bands = [eager.Band(part.flatten(0, 1), parameters) for part in (rows[:1], rows[1:20], rows[20:])]
    norm = None
    for block in (parameters.block1, parameters.block2):
        for weight, bias in ((block.norm1_weight, block.norm1_bias), (block.norm2_weight, block.norm2_bias)):
            statistics = Statistics.merge([band.advance(norm) for band in bands])
            assert statistics.count == 37 * 20
            norm = Affine.of(statistics, weight, bias, dtype)
    assert norm is not None
    out = torch.cat([band.finish(norm) for band in bands]).view(1, 37, 20, -1)
    wide = {k: t.double() for k, t in tensors.items()}
    run = encoder(shape)
    assert_close_enough(out, run(backend="reference", **tensors), run(backend="reference", **wide))


def statistics_of(*tiles: Tensor) -> Statistics:
    found = TileStatistics(len(tiles), tiles[0].shape[1], tiles[0].dtype, tiles[0].device)
    for index, tile in enumerate(tiles):
        found.take(index, tile)
    return found.statistics()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_are_those_of_all_pixels(offset: float) -> None:
    pixels = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) + offset
    expected_variance, expected_mean = torch.var_mean(pixels.double(), dim=0, correction=0)
    tiles = pixels.split([1, 399, 600])
    bands = [statistics_of(tile) for tile in tiles]
    for statistics in (
        statistics_of(pixels),
        statistics_of(tiles[2], tiles[0], tiles[1]),
        statistics_of(*pixels.split(3)),
        Statistics.merge(bands),
        Statistics.merge(bands[::-1]),
    ):
        assert statistics.count == 1000 and statistics.mean.dtype == torch.float64
        torch.testing.assert_close(statistics.mean, expected_mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            statistics.deviation / 1000, expected_variance, rtol=2e-4 if offset else 1e-5, atol=0
        )


def test_statistics_of_a_projection_are_those_of_the_projected_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, weight = torch.randn(500, 3, generator=generator) + 30, torch.randn(16, 3, generator=generator)
    expected = statistics_of(pixels.double() @ weight.double().T)
    thin = ThinProjection(pixels, weight, torch.float32)
    actual = thin.statistics([thin.moments(slice(0, 123)), thin.moments(slice(123, 500))])
    torch.testing.assert_close(actual.mean, expected.mean)
    torch.testing.assert_close(actual.deviation, expected.deviation)


@pytest.mark.parametrize("center", [None, torch.arange(16.0)])
def test_a_thin_projection_is_normalised_by_its_weight(center: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, weight = torch.randn(500, 3, generator=generator) + 30, torch.randn(16, 3, generator=generator)
    norm = Affine(*(torch.randn(16, generator=generator) for _ in range(2)), center)
    thin = ThinProjection(pixels, weight, torch.float32)
    tile = slice(100, 300)
    expected = norm((pixels.double() @ weight.double().T)[tile]).float()
    torch.testing.assert_close(thin.project(tile, thin.normalised(norm)), expected, rtol=1e-5, atol=1e-5)
    plain = thin.add(tile, thin.offset.repeat(200, 1))
    torch.testing.assert_close(plain.double(), pixels[tile].double() @ weight.double().T, rtol=1e-6, atol=1e-5)


def test_statistics_of_half_precision_maps_are_taken_before_rounding() -> None:
    tensors = tensors_of(SHAPES["several tiles"], torch.bfloat16)
    out = encoder(SHAPES["several tiles"])(backend="torch", **tensors)
    exact = encoder(SHAPES["several tiles"])(backend="reference", **{k: t.double() for k, t in tensors.items()})
    assert (out - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_keeps_the_length_of_each_pair_when_the_frequencies_agree(backend: str) -> None:
    shape = Shape((9, 13), rotates=True)
    tensors = tensors_of(shape, torch.float64)
    tensors["frequencies"] = tensors["frequencies"][:, :8].repeat(1, 2)  # both halves turn by one angle
    rotated = encoder(shape)(backend=backend, **tensors)
    plain = encoder(shape)(backend=backend, **{**tensors, "frequencies": torch.zeros(2, 16, dtype=torch.float64)})
    lengths = (torch.hypot(*t.chunk(2, dim=-1)) for t in (rotated, plain))
    torch.testing.assert_close(*lengths)
    torch.testing.assert_close(rotated[:, 0, 0], plain[:, 0, 0])  # coordinate 0, 0
    row, column = tensors["frequencies"]
    angle = row[:8] * (4 / 8) + column[:8] * (9 / 12)
    a, b = plain[0, 4, 9].chunk(2)
    turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    torch.testing.assert_close(rotated[0, 4, 9], turned)


@pytest.mark.parametrize("output", [(4, 3), (5, 7), (13, 2), (1, 1)])
def test_a_spread_gradient_is_that_of_torch_s_pooling(output: tuple[int, int]) -> None:
    x = torch.randn(1, 8, 12, 9, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*output, 8, dtype=torch.float64)
    (expected,) = torch.autograd.grad(F.adaptive_avg_pool2d(x, output), x, grad.permute(2, 0, 1)[None])
    spread = Spread((12, 9), output, torch.float64, x.device)
    wide = spread.over_columns(grad)
    parts = [spread.over_rows(wide, slice(9 * first, 9 * last)) for first, last in ((0, 5), (5, 12))]
    torch.testing.assert_close(torch.cat(parts), expected[0].permute(1, 2, 0).flatten(0, 1))


@pytest.mark.parametrize("output", [(4, 3), (5, 7), (13, 2), (1, 1)])
def test_a_spread_pools_as_torch_does(output: tuple[int, int]) -> None:
    x = torch.randn(12, 9, 8, dtype=torch.float64)
    spread = Spread((12, 9), output, torch.float64, x.device)
    bands = [slice(9 * first, 9 * last) for first, last in ((0, 5), (5, 12))]
    rows = torch.stack([spread.pool_rows(x.flatten(0, 1)[band], band) for band in bands]).sum(dim=0)
    expected = F.adaptive_avg_pool2d(x.permute(2, 0, 1), output).permute(1, 2, 0)
    torch.testing.assert_close(spread.pool_columns(rows), expected)


def test_gradients_of_a_rotation_are_autograd_s_in_any_bands() -> None:
    frequencies = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6 * 5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6 * 5, 8, dtype=torch.float64)
    bands = [slice(0, 10), slice(10, 30)]
    row, column = torch.arange(6.0).double() / 5, torch.arange(5.0).double() / 4
    angle = (row[:, None, None] * frequencies[0] + column[:, None] * frequencies[1]).flatten(0, 1)
    turned = x * angle.cos() + torch.cat((-x[:, 4:], x[:, :4]), dim=1) * angle.sin()
    expected = torch.autograd.grad(turned, (x, frequencies), grad)
    rotation = Rotation((6, 5), frequencies.detach())
    parts = [rotation.backward(grad[band], x.detach()[band], band) for band in bands]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), expected[0])
    torch.testing.assert_close(parts[0][1] + parts[1][1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [(5, 4), (30, 9), (1, 1)])
def test_pooling_is_torch_s(output: tuple[int, int], backend: str) -> None:
    shape = Shape((12, 9), output)
    tensors = tensors_of(shape, torch.float64)
    whole = encoder(shape._replace(output=None))(backend=backend, **tensors).permute(0, 3, 1, 2)
    pooled = encoder(shape)(backend=backend, **tensors)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(whole, output).permute(0, 2, 3, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["image", "pooled", "enlarged", "one pixel"])
def test_output_is_contiguous_in_the_pixels_dtype(name: str, backend: str) -> None:
    out = encoder(SHAPES[name])(backend=backend, **tensors_of(SHAPES[name], torch.bfloat16))
    assert out.is_contiguous() and out.dtype == torch.bfloat16


def test_two_maps_and_a_tile_are_the_most_that_is_alive(threads: None) -> None:
    torch.set_num_threads(1)  # the tiles of other threads are not seen
    shape = Shape((160, 160))
    tensors = tensors_of(shape)
    with LargestTensor() as seen:
        eager.forward(tensors["pixels"], parameters_of(tensors), frequencies=None, output_size=(160, 160))
    assert seen.largest == 160 * 160 * 16


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pixels": torch.ones(4, 4, 3)}, ValueError, r"pixels: .*\(4, 4, 3\)"),
        ({"pixels": torch.ones(1, 4, 4, 4)}, ValueError, r"pixels: expected 3 channels, got 4"),
        ({"pixels": torch.ones(1, 4, 4, 3).int()}, TypeError, r"pixels: .*int32"),
        ({"projection": torch.ones(16, 3).half()}, ValueError, r"projection: .*float16"),
        ({"frequencies": torch.ones(2, 16).double()}, ValueError, r"frequencies: .*float64"),
        ({"block2_norm2_bias": torch.ones(16).double()}, ValueError, r"norm2_bias: .*float64"),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    shape = Shape((4, 4))
    with pytest.raises(error, match=message):
        encoder(shape)(backend="torch", **{**tensors_of(shape), **changed})


def test_explanation_names_the_chosen_backend() -> None:
    tensors = tensors_of(SHAPES["pooled"])
    explanation = explain_backends(tensors["pixels"], parameters_of(tensors), output_size=(6, 5))
    assert explanation.chosen == "torch" and "24 x 20 to 6 x 5" in str(explanation)


def test_reference_is_built_from_torch_s_own_group_norm() -> None:
    shape = Shape((7, 6), inputs=None)
    tensors = tensors_of(shape, torch.float64)
    block = parameters_of(tensors).block1
    x = tensors["pixels"].permute(0, 3, 1, 2)
    norm1, norm2 = (torch.nn.GroupNorm(8, 16).double() for _ in range(2))
    for norm, weight, bias in (
        (norm1, block.norm1_weight, block.norm1_bias),
        (norm2, block.norm2_weight, block.norm2_bias),
    ):
        norm.load_state_dict({"weight": weight, "bias": bias})
    y = torch.einsum("oi,bihw->bohw", block.weight1, F.silu(norm1(x)))
    y = x + torch.einsum("oi,bihw->bohw", block.weight2, F.silu(norm2(y)))
    torch.testing.assert_close(reference._residual_block(x, block), y)
