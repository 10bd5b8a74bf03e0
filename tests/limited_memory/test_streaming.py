"""Streams and regions: the plain call's output piece by piece, from bands of the image that are never joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.limited_memory import bands, executor, prediction
from anyup.ops.dispatch import Operation
from anyup.ops.pixel_encoder import eager
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.statistics import Statistics

IMAGE, FEATURES = wave((2, 3, 23, 17), 3, 0.8), wave((2, 9, 6, 5), 7)


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of five image rows, so that a small image has several."""
    monkeypatch.setattr(prediction, "BAND_PIXELS", 5 * 17)


def joined(model: AnyUp, image: Any, features: Tensor, size: tuple[int, int] | None = None, **settings: Any) -> Tensor:
    """The pieces of a stream in their places, NaN where there is none."""
    (height, width), carried = size or IMAGE.shape[2:], settings.get("values", features)
    out = carried.new_full((carried.shape[0], carried.shape[1], height, width), torch.nan, dtype=settings.get("dtype"))
    with torch.no_grad():
        for rows, columns, piece in model.stream(image, features, size, **settings):
            assert out[:, :, rows, columns].isnan().all(), "a pixel came twice"
            out[:, :, rows, columns] = piece
    return out


def assert_streams_exactly(
    arguments: dict[str, Any],
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,  # where the rule is strict
    crop: Callable[[Tensor], Tensor] = lambda out: out,
    **settings: Any,
) -> None:
    """Raise an AssertionError unless a stream obeys the error rule where `crop` looks."""
    image, features = IMAGE.to(dtype), FEATURES.to(dtype)
    actual = joined(upsampler(**arguments).to(dtype), image, features, size, **settings)
    with torch.no_grad():
        reference = upsampler(**arguments, backend="reference").to(dtype)
        assert_close_enough(
            crop(actual),
            crop(reference(image, features, size)),
            crop(reference.double()(image.double(), features.double(), size)),
        )


SIZES = [None, (9, 13), (46, 34), (40, 11), (12, 40), (1, 1), (3, 17)]


ARGUMENTS: list[dict[str, Any]] = [{}, {"window": "cell"}, {"kernel_size": 3}, {"kernel_size": 2}]
# A size changes which rows a band needs, whatever the model. Kernels move the ends of the image's bands, windows those
# of the attention: each meets the size of the image and, by turns, two others.
CALLS = [
    (arguments, size)
    for turn, arguments in enumerate(ARGUMENTS)
    for number, size in enumerate(SIZES)
    if not turn or not number or number % 3 == turn - 1
]


@pytest.mark.parametrize(("arguments", "size"), CALLS, ids=str)
def test_a_stream_is_the_plain_call(arguments: dict[str, Any], size: tuple[int, int] | None) -> None:
    assert_streams_exactly(arguments, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stream_obeys_the_error_rule_in_every_dtype(dtype: torch.dtype) -> None:
    assert_streams_exactly({}, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "size"), [(1, (9, 13)), (17, None), (17, (30, 40)), (2**16, None), (2**16, (30, 40))], ids=str
)
def test_bands_of_one_row_and_of_all_rows_give_the_same(
    pixels: int, size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "BAND_PIXELS", pixels)
    assert_streams_exactly({"kernel_size": 5}, size)


@pytest.mark.parametrize("tile", [1, 4, (7, 3), (23, 17), (100, 100)])
def test_tiles_of_any_size_give_the_same(tile: Any) -> None:
    assert_streams_exactly({}, tile=tile)


REGIONS = [(0, 0, 4, 3), (22, 16, 1, 1), (7, 5, 9, 8), (0, 14, 5, 3), (20, 0, 3, 17), (0, 0, 23, 17)]


# Other kernels at two corners, where the image ends, and inside.
@pytest.mark.parametrize(
    ("region", "kernel_size"),
    [(each, 1) for each in REGIONS] + [(each, size) for size in (3, 4) for each in REGIONS[:3]],
)
def test_a_region_is_that_part_of_the_output(region: tuple[int, int, int, int], kernel_size: int) -> None:
    top, left, height, width = region
    assert_streams_exactly(
        {"kernel_size": kernel_size},
        region=region,
        tile=(4, 5),
        crop=lambda out: out[:, :, top : top + height, left : left + width],
    )


def test_a_region_brings_nothing_else() -> None:
    out = joined(upsampler(), IMAGE, FEATURES, region=(7, 5, 9, 8))
    assert int(out.isfinite().all(dim=1).all(dim=0).sum()) == 9 * 8


def test_pieces_come_in_order_and_in_the_size_asked_for() -> None:
    with torch.no_grad():
        pieces = list(upsampler().stream(IMAGE, FEATURES, region=(1, 2, 5, 9), tile=(3, 6)))
    assert [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns, _ in pieces] == [
        (1, 4, 2, 8), (1, 4, 8, 11), (4, 6, 2, 8), (4, 6, 8, 11)
    ]  # fmt: skip
    assert [tuple(piece.shape) for _, _, piece in pieces] == [(2, 9, 3, 6), (2, 9, 3, 3), (2, 9, 2, 6), (2, 9, 2, 3)]


def test_values_and_a_dtype_are_carried() -> None:
    model, values = upsampler(), FEATURES[:, :2].double()
    with torch.no_grad():
        expected = model(IMAGE, FEATURES, values=values)
    actual = joined(model, IMAGE, FEATURES, values=values)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    half = joined(model, IMAGE, FEATURES, values=values, dtype=torch.float16)
    torch.testing.assert_close(half, expected.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [None, (9, 13)])
def test_a_context_streams_too(size: tuple[int, int] | None) -> None:
    model = upsampler().double()
    image, features = IMAGE.double(), FEATURES.double()
    with torch.no_grad():
        context, expected = model.encode_image(image, size), model(image, features, size)
    torch.testing.assert_close(joined(model, context, features, size), expected, rtol=1e-10, atol=1e-10)


def test_under_autocast_a_stream_computes_in_autocast_s_dtype() -> None:
    model = upsampler()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(IMAGE, FEATURES)
        stream = model.stream(IMAGE, FEATURES, tile=23)
    _, _, actual = next(stream)  # outside
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        assert not torch.equal(actual, model(IMAGE, FEATURES))


def test_no_map_of_the_image_s_size_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Noted(eager.Band):
        def __init__(self, pixels: Tensor, *args: Any, **more: Any) -> None:
            seen.append(pixels.shape[0])
            super().__init__(pixels, *args, **more)

    monkeypatch.setattr(eager, "Band", Noted)
    joined(upsampler(), IMAGE, FEATURES)
    assert max(seen) <= (5 + 2) * 17  # a band and the rows that the convolution needs beyond it


def test_nothing_is_computed_before_a_piece_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        stream = upsampler().stream(IMAGE, FEATURES)
    monkeypatch.setattr(bands, "BandedEncoder", None)
    with pytest.raises(TypeError):
        next(stream)


def test_gradients_are_off_inside_and_as_they_were_outside() -> None:
    with torch.no_grad():
        stream = upsampler().stream(IMAGE, FEATURES, tile=8)
    for _, _, piece in stream:
        assert torch.is_grad_enabled()
        assert not piece.requires_grad


def test_an_empty_batch_gives_empty_pieces() -> None:
    assert joined(upsampler(), IMAGE[:0], FEATURES[:0]).shape == (0, 9, 23, 17)


# Mutations: what these tests must notice.


def test_a_halo_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "HALO", 0)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_streams_exactly({})


def test_statistics_of_one_band_alone_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Statistics, "merge", staticmethod(lambda several: several[0]))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_streams_exactly({})


def test_windows_of_a_band_as_if_it_were_the_map_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = executor.window_attention
    monkeypatch.setattr(executor, "window_attention", lambda *args, part, **kwargs: attend(*args, **kwargs))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_streams_exactly({})


# Mistakes.

MISTAKES = [
    ({"tile": 0}, ValueError, "tile: .*0"),
    ({"tile": (4, -1)}, ValueError, "tile: .*-1"),
    ({"tile": 2.5}, ValueError, "tile: expected two positive integers .*2.5"),
    ({"tile": (4, 2.5)}, TypeError, "tile: .*2.5"),
    ({"tile": True}, (TypeError, ValueError), "tile: .*True"),
    ({"region": (0, 0, 24, 17)}, ValueError, r"region: .*inside the output of \(23, 17\), got \(0, 0, 24, 17\)"),
    ({"region": (-1, 0, 4, 4)}, ValueError, "region: .*-1"),
    ({"region": (0, 0, 0, 4)}, ValueError, "region: "),
    ({"region": (0, 0, 4)}, ValueError, "region: expected .top, left, height, width."),
    ({"region": (0, 0, 4, 4.0)}, TypeError, "region: expected integers, got 4.0"),
    ({"dtype": torch.int32}, TypeError, "dtype: .*int32"),
    ({"dtype": "float16"}, TypeError, "dtype: .*'float16'"),
    ({"values": FEATURES[:, :, :3]}, ValueError, r"values: expected the features' grid \(6, 5\), got \(3, 5\)"),
    ({"output_size": (0, 3)}, ValueError, "output_size: .*0"),
    ({"features": FEATURES[:1]}, ValueError, "features: expected the image's batch of 2, got 1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISTAKES)
def test_a_mistake_is_named_when_the_stream_is_made(arguments: dict[str, Any], error: Any, message: str) -> None:
    with torch.no_grad(), pytest.raises(error, match=message):
        upsampler().stream(**{"image": IMAGE, "features": FEATURES, **arguments})


def test_a_gradient_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operation, "run", None)
    model = upsampler()
    with pytest.raises(RuntimeError, match=r"stream does not differentiate: .*torch.no_grad\(\)"):
        model.stream(IMAGE, FEATURES)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not differentiate"):
        model.stream(IMAGE.clone().requires_grad_(), FEATURES)
    model.stream(IMAGE, FEATURES)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"window_attention": "flex"}, "not flex: query is float64"),
        ({"pixel_encoder": "reference"}, "bands of pixels are encoded by triton or torch, got 'reference'"),
    ],
)
def test_a_backend_that_cannot_is_refused_when_the_stream_is_made(backend: dict[str, str], message: str) -> None:
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        upsampler(backend=backend).double().stream(IMAGE.double(), FEATURES.double())


# The cells of adaptive pooling.


@pytest.mark.parametrize(("count", "length"), [(5, 23), (6, 24), (23, 5), (7, 7), (1, 9), (9, 1), (10, 7)])
def test_some_cells_are_those_of_adaptive_pooling(count: int, length: int) -> None:
    line = wave((1, length, 3), 1).double()
    expected = torch.nn.functional.adaptive_avg_pool1d(line[0].T[None], count)[0].T
    for first in range(count):
        for stop in range(first + 1, count + 1):
            cells = Cells(first, stop, count, length)
            actual = cells.mean(torch.float64, line.device)(line[:, cells.pixels])
            torch.testing.assert_close(actual, expected[first:stop])
