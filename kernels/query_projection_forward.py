"""Query projection, forward: a 3x3 convolution with zero padding, an RMS normalisation over D channels, a projection.

A program owns a rectangle of pixels and all D channels of its result: the convolution is nine products of the pixels,
each time shifted by one, with D x D weights (an implicit matrix product: nothing is copied, and the shifted loads of a
rectangle and its halo hit the caches). So the sum of squares that the normalisation needs is in the program's
registers, and the projection is one more product. The map is read once and the queries are written once, where a
convolution and separate passes read and write a map three times.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .config import Target
from .launch import Launch, strides_of
from .products import matmul

SIZES = ("height", "width", "tile_rows", "tile_columns")
"""Kernel arguments that a kernel must not be specialised on: a new image size compiles nothing."""


@dataclass(frozen=True)
class ProjectionConfig:
    """A cut: changes speed and never a result.

    Attributes:
        rows, columns: pixels of a rectangle.
        piece: channels multiplied at once.
        num_warps, num_stages: Triton's.
    """

    rows: int
    columns: int
    piece: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if name != "num_stages" and (number < 1 or number & (number - 1)):
                raise ValueError(f"{name}: expected a power of two, got {number}")
        for name, number in (("rows * columns", self.rows * self.columns), ("piece", self.piece)):
            if number < 16:
                raise ValueError(f"{name}: expected at least 16, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")


def forward_configs(dim: int, *, target: Target, half: bool) -> list[ProjectionConfig]:
    """Cuts, best first; what comes later asks less of a card.

    They were chosen by `python -m benchmarks.codegen --kernel query_projection_forward`: at 128 channels they spill
    nothing on any target.
    """
    if half:
        best = ProjectionConfig(8, 16, 32 if dim >= 32 else 16, num_warps=8, num_stages=3)
    elif target.arch in (90, 100):  # their products take an operand from shared memory, split once for all warps
        best = ProjectionConfig(8, 16, 16, num_warps=8, num_stages=2)
    else:
        best = ProjectionConfig(8, 8, 16, num_warps=4, num_stages=2)
    return [best, ProjectionConfig(4, 8, 16, num_warps=4, num_stages=1)]


@triton.jit(do_not_specialize=SIZES)
def _query_projection_forward_kernel(
    encoded, convolution, norm, weight, bias, out,
    # (B, H, W, D), (9, D, D) with the result's channels last, (D,), (D, D), (D,), (B, H, W, D)
    height, width, tile_rows, tile_columns, eps,
    encoded_image_stride, encoded_row_stride, encoded_column_stride, encoded_channel_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One rectangle of ROWS x COLUMNS pixels; grid: the rectangles of all images."""
    tile = tl.program_id(0)
    image = (tile // (tile_rows * tile_columns)).to(tl.int64)
    top = tile % (tile_rows * tile_columns) // tile_columns * ROWS
    left = tile % tile_columns * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = top + pixel // COLUMNS
    column = left + pixel % COLUMNS
    output = tl.arange(0, PADDED)
    encoded += image * encoded_image_stride
    product = tl.zeros((ROWS * COLUMNS, PADDED), tl.float32)
    PIECES: tl.constexpr = (DIM + PIECE - 1) // PIECE
    for step in tl.range(0, 9 * PIECES):
        tap = step // PIECES
        channel = step % PIECES * PIECE + tl.arange(0, PIECE)
        near_row = row + tap // 3 - 1
        near_column = column + tap % 3 - 1
        inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
        place = near_row.to(tl.int64) * encoded_row_stride + near_column.to(tl.int64) * encoded_column_stride
        place = encoded + place[:, None] + (channel.to(tl.int64) * encoded_channel_stride)[None, :]
        part = convolution + (tap * DIM + channel)[:, None] * DIM + output[None, :]
        if DIM % PIECE:
            pixels = tl.load(place, mask=inside[:, None] & (channel < DIM)[None, :], other=0.0)
        else:
            pixels = tl.load(place, mask=inside[:, None], other=0.0)
        if (DIM % PIECE) or (DIM < PADDED):
            weights = tl.load(part, mask=(channel < DIM)[:, None] & (output < DIM)[None, :], other=0.0)
        else:
            weights = tl.load(part)
        product = matmul(pixels, weights, product, PRECISION)
    # Channels that fill up are zeros, and add nothing.
    inverse = 1.0 / tl.sqrt_rn(tl.sum(product * product, axis=1) / DIM + eps)
    factor = tl.load(norm + output, mask=output < DIM, other=0.0).to(tl.float32)
    normal = (product * inverse[:, None] * factor[None, :]).to(encoded.dtype.element_ty)
    exists = (row < height) & (column < width)
    place = out + (((image * height + row) * width + column) * DIM)[:, None]
    for first in tl.range(0, PADDED, PIECE):
        taken = first + tl.arange(0, PIECE)
        part = weight + taken[:, None] * DIM + output[None, :]  # (PIECE, PADDED)
        if DIM < PADDED:
            weights = tl.load(part, mask=(taken < DIM)[:, None] & (output < DIM)[None, :], other=0.0)
        else:
            weights = tl.load(part)
        result = matmul(normal, tl.trans(weights), None, PRECISION)
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
        precision: of products of float32, Triton's `input_precision`.
        config: how to cut the work.
    """
    batch, height, width, dim = encoded.shape
    tiles = (triton.cdiv(height, config.rows), triton.cdiv(width, config.columns))
    return Launch(
        kernel=_query_projection_forward_kernel,
        grid=(batch * tiles[0] * tiles[1],),
        arguments={
            "encoded": encoded,
            "convolution": convolution,
            "norm": norm,
            "weight": weight,
            "bias": bias,
            "out": out,
            "height": height,
            "width": width,
            "tile_rows": tiles[0],
            "tile_columns": tiles[1],
            "eps": eps,
            **strides_of("encoded", encoded, "image row column channel"),
        },
        constants={
            "DIM": dim,
            "PADDED": max(16, triton.next_power_of_2(dim)),
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "PIECE": config.piece,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
