"""How far upsampled features are from true ones, and the gradient: each map is read once in either pass.

Of a pixel's channels p and t the forward pass needs six numbers: three products, the sum of (p - t)^2, the target's
largest and smallest. They give 1 - cosine and the normalised error, and the three factors of which the gradient is
made: that of the cosine is cosine / |p|^2 p - t / (|p| |t|), that of the error 2 (p - t) / (C span^2). Windows of a map
may overlap; so backward a program has pixels of the map, not of the windows, and adds up what each window that holds
them gives, in the windows' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, strides_of

COUNTS = ("height", "width", "rows", "columns", "windows")
"""Kernel arguments that the kernels are not specialised on, so that a new image size compiles no new kernel."""


@dataclass(frozen=True)
class DistanceConfig:
    """A config: changes speed and, by the order of its sums, the last bits.

    Attributes:
        pixels: of a program.
        block: channels at a time.
        num_warps: Triton's.
    """

    pixels: int
    block: int
    num_warps: int

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if number < 1 or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, got {number}")

    def tiles(self, pixels: int) -> int:
        """Programs for so many pixels."""
        return triton.cdiv(pixels, self.pixels)


CONFIGS = (DistanceConfig(16, 128, 4), DistanceConfig(8, 64, 2))
"""Best first; what comes later asks less of a card."""


@triton.jit
def _corner(places, window):
    """The first row and column of a window, counted over all images; `places` None: of the map."""
    if places is None:
        return 0, 0
    else:
        return tl.load(places + 2 * window), tl.load(places + 2 * window + 1)


@triton.jit(do_not_specialize=COUNTS)
def _feature_distance_forward_kernel(
    prediction, target, places, parts, statistics,
    # (B, C, H, W), (B, K, C, h, w), (B, K, 2) or None, (B, K, tiles, 2), (B, K, h, w, 3) or None
    height, width, rows, columns, windows, channels,
    prediction_image_stride, prediction_channel_stride, prediction_row_stride, prediction_column_stride,
    target_image_stride, target_window_stride, target_channel_stride, target_row_stride, target_column_stride,
    scale, norm_eps, span_eps,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pixels of a window; grid: tiles of pixels, windows of all images."""
    window = tl.program_id(1).to(tl.int64)
    image = window // windows
    number = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = (number // columns).to(tl.int64), (number % columns).to(tl.int64)
    top, left = _corner(places, window)
    exists = number < rows * columns
    # A window beyond the map would be the caller's mistake, which must not read elsewhere.
    inside = exists & (top + row >= 0) & (top + row < height) & (left + column >= 0) & (left + column < width)
    of_prediction = prediction + image * prediction_image_stride
    of_prediction += (top + row) * prediction_row_stride + (left + column) * prediction_column_stride
    of_target = target + image * target_image_stride + (window % windows) * target_window_stride
    of_target += row * target_row_stride + column * target_column_stride
    dot = tl.zeros((PIXELS,), tl.float32)
    of_both = tl.zeros((PIXELS,), tl.float32)
    length = tl.zeros((PIXELS,), tl.float32)
    true_length = tl.zeros((PIXELS,), tl.float32)
    largest = tl.full((PIXELS,), float("-inf"), tl.float32)
    smallest = tl.full((PIXELS,), float("inf"), tl.float32)
    for first in tl.range(0, channels, BLOCK):
        channel = (first + tl.arange(0, BLOCK)).to(tl.int64)
        here = inside[:, None] & (channel < channels)[None, :]
        p = tl.load(of_prediction[:, None] + channel[None, :] * prediction_channel_stride, mask=here, other=0.0)
        t = tl.load(of_target[:, None] + channel[None, :] * target_channel_stride, mask=here, other=0.0)
        p = p.to(tl.float32)
        t = t.to(tl.float32)
        dot += tl.sum(p * t, axis=1)
        length += tl.sum(p * p, axis=1)
        true_length += tl.sum(t * t, axis=1)
        of_both += tl.sum((p - t) * (p - t), axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(here, t, float("-inf")), axis=1))
        smallest = tl.minimum(smallest, tl.min(tl.where(here, t, float("inf")), axis=1))
    norm = tl.sqrt_rn(length)
    inverse_product = 1.0 / (tl.maximum(norm, norm_eps) * tl.maximum(tl.sqrt_rn(true_length), norm_eps))
    cosine = dot * inverse_product
    span = largest - smallest + span_eps
    inverse = 1.0 / (span * span * channels)
    place = parts + (window * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(place, tl.sum(tl.where(exists, 1.0 - cosine, 0.0), axis=0) * scale)
    tl.store(place + 1, tl.sum(tl.where(exists, of_both * inverse, 0.0), axis=0) * scale)
    if statistics is not None:
        place = statistics + (window * rows * columns + number) * 3
        tl.store(place, inverse_product, mask=exists)
        tl.store(place + 1, tl.where(norm > norm_eps, cosine / length, 0.0), mask=exists)
        tl.store(place + 2, inverse, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def _feature_distance_backward_kernel(
    grad, prediction, target, places, statistics, out,
    # (B, 2), (B, C, H, W), (B, K, C, h, w), (B, K, 2) or None, (B, K, h, w, 3), (B, H, W, C)
    height, width, rows, columns, windows, channels,
    prediction_image_stride, prediction_channel_stride, prediction_row_stride, prediction_column_stride,
    target_image_stride, target_window_stride, target_channel_stride, target_row_stride, target_column_stride,
    scale,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some channels of some pixels of a map; grid: tiles of pixels, blocks of channels, images."""
    image = tl.program_id(2).to(tl.int64)
    number = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    exists = number < height * width
    row, column = (number // width).to(tl.int64), (number % width).to(tl.int64)
    here = exists[:, None] & (channel < channels)[None, :]
    of_prediction = prediction + image * prediction_image_stride + row * prediction_row_stride
    of_prediction += column * prediction_column_stride
    p = tl.load(of_prediction[:, None] + channel[None, :] * prediction_channel_stride, mask=here, other=0.0).to(
        tl.float32
    )
    of_cosine = tl.load(grad + 2 * image) * scale
    of_error = tl.load(grad + 2 * image + 1) * 2.0 * scale
    total = tl.zeros((PIXELS, BLOCK), tl.float32)
    for each in tl.range(0, windows):
        window = image * windows + each
        top, left = _corner(places, window)
        down, along = row - top, column - left
        inside = exists & (down >= 0) & (down < rows) & (along >= 0) & (along < columns)
        factors = statistics + ((window * rows + down) * columns + along) * 3
        inverse_product = tl.load(factors, mask=inside, other=0.0)
        slope = tl.load(factors + 1, mask=inside, other=0.0)
        inverse = tl.load(factors + 2, mask=inside, other=0.0)
        of_target = target + image * target_image_stride + each * target_window_stride
        of_target += down * target_row_stride + along * target_column_stride
        wanted = inside[:, None] & here
        t = tl.load(of_target[:, None] + channel[None, :] * target_channel_stride, mask=wanted, other=0.0).to(
            tl.float32
        )
        found = (p - t) * (of_error * inverse)[:, None]
        found += p * (of_cosine * slope)[:, None] - t * (of_cosine * inverse_product)[:, None]
        # A pixel outside may be infinite.
        total += tl.where(wanted, found, 0.0)
    place = ((image * height + row) * width + column) * channels
    tl.store(out + place[:, None] + channel[None, :], total, mask=here)


def plan_forward(
    prediction: Tensor,
    target: Tensor,
    places: Tensor | None,
    parts: Tensor,
    statistics: Tensor | None,
    *,
    norm_eps: float,
    span_eps: float,
    config: DistanceConfig,
) -> Launch:
    """The launch that fills `parts`, whose sums over windows and tiles are the means, and `statistics`.

    Args:
        prediction, target: (B, C, H, W) and (B, K, C, h, w), any strides.
        places: (B, K, 2) int64, contiguous; None: each window begins where the map does.
        parts: (B, K, tiles, 2) float32, contiguous.
        statistics: (B, K, h, w, 3) float32, contiguous, for the backward pass; None: there is none.
        norm_eps, span_eps: the least norm, and what is added to the target's range.
        config: sizes of tiles, warps.
    """
    maps = {"prediction": prediction, "target": target, "places": places, "parts": parts, "statistics": statistics}
    grid = (parts.shape[2], parts.shape[0] * parts.shape[1])
    return _launch(_feature_distance_forward_kernel, grid, maps, config, norm_eps=norm_eps, span_eps=span_eps)


def plan_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    places: Tensor | None,
    statistics: Tensor,
    out: Tensor,
    *,
    config: DistanceConfig,
) -> Launch:
    """The launch that fills `out` (B, H, W, C), contiguous, with the prediction's gradient.

    Args:
        grad: (B, 2) float32, contiguous, of the means.
        prediction, target, places, statistics: as of `plan_forward`.
        out: the result.
        config: sizes of tiles, warps.
    """
    batch, channels, height, width = prediction.shape
    maps = {"grad": grad, "prediction": prediction, "target": target, "places": places, "statistics": statistics}
    grid = (config.tiles(height * width), triton.cdiv(channels, config.block), batch)
    return _launch(_feature_distance_backward_kernel, grid, {**maps, "out": out}, config)


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: Mapping[str, Tensor | None], config: DistanceConfig, **numbers: float
) -> Launch:
    prediction, target = tensors["prediction"], tensors["target"]
    assert prediction is not None and target is not None
    return Launch(
        kernel=kernel,
        grid=grid,
        arguments={**tensors, **_sizes(prediction, target), **numbers},
        constants={"PIXELS": config.pixels, "BLOCK": config.block},
        options={"num_warps": config.num_warps, "num_stages": 1},
    )


def _sizes(prediction: Tensor, target: Tensor) -> Mapping[str, Any]:
    _, windows, channels, rows, columns = target.shape
    return {
        "height": prediction.shape[2],
        "width": prediction.shape[3],
        "rows": rows,
        "columns": columns,
        "windows": windows,
        "channels": channels,
        **strides_of("prediction", prediction, "image channel row column"),
        **strides_of("target", target, "image window channel row column"),
        "scale": 1 / (windows * rows * columns),
    }
