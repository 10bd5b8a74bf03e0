"""Query projection, forward: a 3x3 convolution with zero padding, an RMS normalisation over D channels, a projection.

A program owns a rectangle of pixels and all D channels of its result. The convolution is nine products of the pixels,
shifted to the nine taps, with D x D weights (an implicit matrix product: nothing is copied). The nine shifted loads go
through L1, which holds one piece of the rectangle's channels, with the halo, until the last load. So L2 is asked for
each pixel little more than once, and for the weights once for 128 pixels. All channels of a pixel are in the program's
registers, so the sum of squares for the normalisation is too, and the projection is one more product. The map is read
once and the queries are written once, where a convolution and separate passes read and write a map three times. The
queries are stored with the default cache policy, because the window attention reads them next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Target, strides_of
from .products import padded, split_matmul

SIZES = ("height", "width", "tile_rows", "tile_columns")
"""Kernel arguments that the kernel is not specialised on, so that a new image size compiles no new kernel."""


@dataclass(frozen=True)
class ProjectionConfig:
    """A config: changes speed and never a result.

    Attributes:
        rows, columns: pixels of a rectangle.
        piece: the channels of the map in one product.
        outputs: the most channels of the result in one product of the projection.
        num_warps, num_stages: Triton's.
    """

    rows: int
    columns: int
    piece: int
    outputs: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if name != "num_stages" and (number < 1 or number & (number - 1)):
                raise ValueError(f"{name}: expected a power of two, got {number}")
        numbers = {"rows * columns": self.rows * self.columns, "piece": self.piece, "outputs": self.outputs}
        for name, number in numbers.items():
            if number < 16:
                raise ValueError(f"{name}: expected at least 16, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")


def forward_configs(dim: int, *, target: Target, half: bool, precision: str = "") -> list[ProjectionConfig]:
    """Configs, best first; what comes later asks less of a card. `precision` is that of products of float32.

    Chosen by `python -m benchmarks.modelled_gpu --kernel query_projection_forward`: at 128 channels they spill nothing
    on any target, at 256 nothing in half precision.
    """
    wide = dim > 128
    rows = 8 if wide else 16  # with more rows the pixels' sums would not fit AMD's registers
    if half and target.arch in (80, 90, 100):
        # Two programs on a multiprocessor, each with three stages of 32 KB; L1 has room for rectangles with their halo.
        warps, stages = 8 if wide or target.arch == 100 else 4, 2 if wide and target.arch == 100 else 3
        best = ProjectionConfig(8, 16, 64, 64, num_warps=warps, num_stages=stages)
    elif half and target.backend == "hip":
        best = ProjectionConfig(rows, 16, 32, 32, num_warps=8, num_stages=2)
    elif half:  # the same in half of their shared memory
        best = ProjectionConfig(8, 16, 32, 32, num_warps=8 if wide else 4, num_stages=2)
    elif precision == "float16x3" and target.arch in (80, 90) and not wide:  # two programs on a multiprocessor
        columns, piece = (16, 16) if target.arch == 80 else (8, 32)
        best = ProjectionConfig(8, columns, piece, piece, num_warps=4, num_stages=2)
    elif target.arch in (90, 100):  # one operand is in shared memory, split once for all warps
        best = ProjectionConfig(8, 16, 32, 16, num_warps=8, num_stages=2)
    elif target.backend == "hip":
        best = ProjectionConfig(8, rows, 16, 16, num_warps=rows // 2, num_stages=2)
    else:
        best = ProjectionConfig(8, 8, 16, 16, num_warps=4, num_stages=2)
    best = replace(best, piece=min(best.piece, max(16, dim & -dim)))
    return [best, ProjectionConfig(4, 8, 16, 16, num_warps=4, num_stages=1)]


@triton.jit
def rectangle(tile_rows, tile_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's image, and the row and the column of each pixel of its rectangle; see `launch_of_rectangles`."""
    tile = tl.program_id(0)
    image = (tile // (tile_rows * tile_columns)).to(tl.int64)
    top = tile % (tile_rows * tile_columns) // tile_columns * ROWS
    left = tile % tile_columns * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = top + pixel // COLUMNS
    column = left + pixel % COLUMNS
    return image, row, column


@triton.jit
def convolved(
    encoded, convolution, row, column, height, width,
    encoded_row_stride, encoded_column_stride, encoded_channel_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The 3x3 convolution (pixels, PADDED) of one image at these pixels, in float32; padding channels are 0."""
    output = tl.arange(0, PADDED)
    centre = encoded + row.to(tl.int64) * encoded_row_stride + column.to(tl.int64) * encoded_column_stride
    product = tl.zeros((row.shape[0], PADDED), tl.float32)
    PIECES: tl.constexpr = (DIM + PIECE - 1) // PIECE
    for step in tl.range(0, 9 * PIECES):
        # All taps of one piece of the channels before the next piece, so that the piece's pixels stay in L1.
        tap = step % 9
        channel = step // 9 * PIECE + tl.arange(0, PIECE)
        down = tap // 3 - 1
        along = tap % 3 - 1
        # As unsigned numbers, negative positions are beyond the last one, so one comparison tests both ends.
        inside = ((row + down).to(tl.uint32) < height) & ((column + along).to(tl.uint32) < width)
        shift = down.to(tl.int64) * encoded_row_stride + along.to(tl.int64) * encoded_column_stride
        place = (centre + shift)[:, None] + (channel.to(tl.int64) * encoded_channel_stride)[None, :]
        part = convolution + (tap * DIM + channel)[:, None] * DIM + output[None, :]
        if DIM % PIECE:
            here = inside[:, None] & (channel < DIM)[None, :]
            pixels = tl.load(place, mask=here, other=0.0, cache_modifier=".ca")
        else:
            pixels = tl.load(place, mask=inside[:, None], other=0.0, cache_modifier=".ca")
        if (DIM % PIECE) or (DIM < PADDED):
            weights = tl.load(part, mask=(channel < DIM)[:, None] & (output < DIM)[None, :], other=0.0)
        else:
            weights = tl.load(part)
        product = split_matmul(pixels, weights, None, product, PRECISION)
    return product


@triton.jit(do_not_specialize=SIZES)
def _query_projection_forward_kernel(
    encoded, convolution, norm, weight, bias, out,
    # (B, H, W, D), (9, D, D) with the result's channels last, (D,), (D, D), (D,), (B, H, W, D)
    height, width, tile_rows, tile_columns, eps,
    encoded_image_stride, encoded_row_stride, encoded_column_stride, encoded_channel_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One rectangle of ROWS x COLUMNS pixels; grid: the rectangles of all images."""
    image, row, column = rectangle(tile_rows, tile_columns, ROWS, COLUMNS)
    output = tl.arange(0, PADDED)
    encoded += image * encoded_image_stride
    product = convolved(
        encoded, convolution, row, column, height, width,
        encoded_row_stride, encoded_column_stride, encoded_channel_stride, DIM, PADDED, PIECE, PRECISION,
    )  # fmt: skip
    # Padding channels are zeros and add nothing.
    inverse = 1.0 / tl.sqrt_rn(tl.sum(product * product, axis=1) / DIM + eps)
    factor = tl.load(norm + output, mask=output < DIM, other=0.0).to(tl.float32)
    normal = (product * inverse[:, None] * factor[None, :]).to(encoded.dtype.element_ty)
    exists = (row < height) & (column < width)
    place = out + (((image * height + row) * width + column) * DIM)[:, None]
    for first in tl.range(0, PADDED, OUTPUTS):
        taken = first + tl.arange(0, OUTPUTS)
        part = weight + taken[:, None] * DIM + output[None, :]  # (OUTPUTS, PADDED)
        if DIM < PADDED:
            weights = tl.load(part, mask=(taken < DIM)[:, None] & (output < DIM)[None, :], other=0.0)
        else:
            weights = tl.load(part)
        result = split_matmul(normal, tl.trans(weights), None, None, PRECISION)
        result += tl.load(bias + taken, mask=taken < DIM, other=0.0).to(tl.float32)[None, :]
        if DIM < PADDED:
            tl.store(place + taken[None, :], result, mask=exists[:, None] & (taken < DIM)[None, :])
        else:
            tl.store(place + taken[None, :], result, mask=exists[:, None])


def plan_forward(
    encoded: Tensor,
    convolution: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    eps: float,
    precision: str,
    config: ProjectionConfig,
) -> Launch:
    """The launch that fills `out` (B, H, W, D), contiguous.

    Args:
        encoded: (B, H, W, D), any strides.
        convolution: (9, D, D), contiguous: tap by tap, from the map's channels to the result's.
        norm, weight, bias: (D,), (D, D), (D,), contiguous.
        out: the result.
        eps: of the normalisation.
        precision: of products of float32, see `products`.
        config: sizes of tiles, warps, stages.
    """
    return launch_of_rectangles(
        _query_projection_forward_kernel,
        encoded,
        {
            "encoded": encoded,
            "convolution": convolution,
            "norm": norm,
            "weight": weight,
            "bias": bias,
            "out": out,
        },
        {"eps": eps, **strides_of("encoded", encoded, "image row column channel")},
        {"OUTPUTS": min(config.outputs, padded(encoded.shape[3]))},
        precision=precision,
        config=config,
    )


def launch_of_rectangles(
    kernel: Any,
    maps: Tensor,
    tensors: dict[str, Tensor],
    numbers: dict[str, int | float],
    constants: dict[str, int],
    *,
    precision: str,
    config: ProjectionConfig,
) -> Launch:
    """The launch of a kernel whose programs own a `rectangle` each of maps (B, H, W, D)."""
    batch, height, width, dim = maps.shape
    tiles = (triton.cdiv(height, config.rows), triton.cdiv(width, config.columns))
    sizes = {"height": height, "width": width, "tile_rows": tiles[0], "tile_columns": tiles[1]}
    return Launch(
        kernel=kernel,
        grid=(batch * tiles[0] * tiles[1],),
        arguments={**tensors, **sizes, **numbers},
        constants={
            "DIM": dim,
            "PADDED": padded(dim),
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "PIECE": config.piece,
            **constants,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
