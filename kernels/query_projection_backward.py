"""Query projection, backward: the gradients of the map, of the convolution and of the projection, in three kernels.

*Pixels*: a program owns a rectangle of pixels, as in the forward pass. It convolves it again, and takes the gradient of
the queries through the projection and the normalisation, whose sums over a pixel's channels are in its registers. It
stores the gradient of the convolved map, and the normalised map, which the projection's gradient is made of.

*Map*: the gradient of the encoded image is a 3x3 convolution too, of the convolved map's gradient with the taps turned
by half a turn and their channels exchanged.

*Weights*: the gradient of a tap is a sum over pixels of outer products, of the convolved map's gradient at a pixel and
the map at the tap: a product whose long side are the pixels. That of the projection is the same without a tap. A
program owns a block of the weights and a run of pixels, and holds the sum in its registers. Runs are added up later, in
their order, so that each call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, strides_of
from .products import matmul, padded
from .query_projection_forward import SIZES, ProjectionConfig, convolved, launch_of_rectangles, rectangle

TAPS = 9

COUNTS = ("height", "width", "pixels", "run")
"""Arguments of the weights' kernel that it is not specialised on."""


@dataclass(frozen=True)
class WeightsConfig:
    """A config of the weights' kernel: changes speed and, by the order of its sums, the last bits.

    Attributes:
        block: the most channels of either side of the weights that a program sums.
        step: pixels of one product.
        num_warps, num_stages: Triton's.
    """

    block: int
    step: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            least = 16 if name in ("block", "step") else 1
            if number < least or (name != "num_stages" and number & (number - 1)):
                raise ValueError(f"{name}: expected a power of two of at least {least}, got {number}")

    def blocks(self, dim: int) -> int:
        """Of either side of the weights."""
        return triton.cdiv(dim, min(self.block, padded(dim)))

    def run(self, pixels: int, dim: int, taps: int, multiprocessors: int) -> int:
        """The pixels of a run: with two programs for each multiprocessor, as far as there are pixels for them."""
        runs = triton.cdiv(2 * multiprocessors, taps * self.blocks(dim) ** 2)
        return triton.cdiv(triton.cdiv(pixels, runs), self.step) * self.step


def pixels_configs(dim: int, *, half: bool) -> list[ProjectionConfig]:
    """Configs of the pixels' kernel, best first. It holds two sums of all channels where the forward pass holds one.

    Chosen by `python -m benchmarks.modelled_gpu --kernel query_projection_backward_pixels`.
    """
    piece = min(32 if half else 16, max(16, dim & -dim))
    wide = dim > 128
    if half:
        best = ProjectionConfig(4 if wide else 8, 16, piece, 32, num_warps=8, num_stages=2)
    else:
        best = ProjectionConfig(4, 8 if wide else 16, piece, 16, num_warps=8, num_stages=2)
    return [best, ProjectionConfig(4, 8, 16, 16, num_warps=4, num_stages=1)]


def weights_configs(*, half: bool) -> list[WeightsConfig]:
    """Configs of the weights' kernel, best first.

    Chosen by `python -m benchmarks.modelled_gpu --kernel query_projection_backward_weights`.
    """
    return [WeightsConfig(128, 64 if half else 16, 8, 2), WeightsConfig(64, 16, 4, 1)]


@triton.jit(do_not_specialize=SIZES)
def _query_projection_backward_pixels_kernel(
    grad, encoded, convolution, norm, weight, grad_convolved, normal,
    # (B, H, W, D) twice, (9, D, D) with the result's channels last, (D,), (D, D), (B, H, W, D) twice
    height, width, tile_rows, tile_columns, eps,
    encoded_image_stride, encoded_row_stride, encoded_column_stride, encoded_channel_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One rectangle of ROWS x COLUMNS pixels; grid: the rectangles of all images."""
    image, row, column = rectangle(tile_rows, tile_columns, ROWS, COLUMNS)
    channel = tl.arange(0, PADDED)
    x = convolved(
        encoded + image * encoded_image_stride, convolution, row, column, height, width,
        encoded_row_stride, encoded_column_stride, encoded_channel_stride, DIM, PADDED, PIECE, PRECISION,
    )  # fmt: skip
    # Padding channels are zeros and add nothing.
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / DIM + eps)
    x *= inverse[:, None]
    exists = (row < height) & (column < width)
    here = exists[:, None] & (channel < DIM)[None, :]
    place = (((image * height + row) * width + column) * DIM)[:, None]
    tl.store(normal + place + channel[None, :], x, mask=here)
    back = tl.zeros((ROWS * COLUMNS, PADDED), tl.float32)
    for first in tl.range(0, PADDED, OUTPUTS):
        taken = first + tl.arange(0, OUTPUTS)
        outer = tl.load(grad + place + taken[None, :], mask=exists[:, None] & (taken < DIM)[None, :], other=0.0)
        part = weight + taken[:, None] * DIM + channel[None, :]  # (OUTPUTS, PADDED)
        weights = tl.load(part, mask=(taken < DIM)[:, None] & (channel < DIM)[None, :], other=0.0)
        back = matmul(outer, weights, back, PRECISION)
    back *= tl.load(norm + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :]
    # The part along the normalised pixel changes nothing but its length, which the normalisation takes away.
    along = tl.sum(back * x, axis=1) / DIM
    tl.store(grad_convolved + place + channel[None, :], (back - x * along[:, None]) * inverse[:, None], mask=here)


@triton.jit(do_not_specialize=SIZES)
def _query_projection_backward_map_kernel(
    grad_convolved, turned, out,
    # (B, H, W, D), (9, D, D) with the result's channels last, (B, H, W, D)
    height, width, tile_rows, tile_columns,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One rectangle of ROWS x COLUMNS pixels; grid: the rectangles of all images."""
    image, row, column = rectangle(tile_rows, tile_columns, ROWS, COLUMNS)
    channel = tl.arange(0, PADDED)
    result = convolved(
        grad_convolved + image * height * width * DIM, turned, row, column, height, width,
        width * DIM, DIM, 1, DIM, PADDED, PIECE, PRECISION,
    )  # fmt: skip
    here = ((row < height) & (column < width))[:, None] & (channel < DIM)[None, :]
    tl.store(out + (((image * height + row) * width + column) * DIM)[:, None] + channel[None, :], result, mask=here)


@triton.jit(do_not_specialize=COUNTS)
def _query_projection_backward_weights_kernel(
    grad, values, sums,
    # (B, H, W, D) twice, (runs, TAPS, D, D)
    height, width, pixels, run,
    DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of outer products of a run of pixels, for one tap; grid: blocks of the weights at each tap, runs."""
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    tap = block // (BLOCKS * BLOCKS)
    down = tap // 3 - TAPS // 9
    along = tap % 3 - TAPS // 9
    left = block // BLOCKS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    right = block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1).to(tl.int64) * run
    stop = tl.minimum(start + run, pixels)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, run, STEP):
        pixel = start + first + tl.arange(0, STEP)
        row = pixel // width % height + down
        column = pixel % width + along
        inside = (pixel < stop) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        shifted = pixel + down * width + along
        if DIM % BLOCK:
            left_mask = inside[:, None] & (left < DIM)[None, :]
            right_mask = inside[:, None] & (right < DIM)[None, :]
        else:
            left_mask = inside[:, None]
            right_mask = inside[:, None]
        outer = tl.load(grad + (pixel * DIM)[:, None] + left[None, :], mask=left_mask, other=0.0)
        value = tl.load(values + (shifted * DIM)[:, None] + right[None, :], mask=right_mask, other=0.0)
        total = matmul(tl.trans(outer), value, total, PRECISION)
    place = sums + ((tl.program_id(1).to(tl.int64) * TAPS + tap) * DIM + left)[:, None] * DIM + right[None, :]
    tl.store(place, total, mask=(left < DIM)[:, None] & (right < DIM)[None, :])


def plan_pixels(
    grad: Tensor,
    encoded: Tensor,
    convolution: Tensor,
    norm: Tensor,
    weight: Tensor,
    grad_convolved: Tensor,
    normal: Tensor,
    *,
    eps: float,
    precision: str,
    config: ProjectionConfig,
) -> Launch:
    """The launch that fills the convolved map's gradient and the normalised map, both (B, H, W, D), contiguous.

    Args:
        grad: (B, H, W, D) of the queries, contiguous.
        encoded: (B, H, W, D), any strides.
        convolution, norm, weight, eps, precision, config: as the forward pass takes them.
        grad_convolved, normal: the results.
    """
    return launch_of_rectangles(
        _query_projection_backward_pixels_kernel,
        encoded,
        {
            "grad": grad,
            "encoded": encoded,
            "convolution": convolution,
            "norm": norm,
            "weight": weight,
            "grad_convolved": grad_convolved,
            "normal": normal,
        },
        {"eps": eps, **strides_of("encoded", encoded, "image row column channel")},
        {"OUTPUTS": min(config.outputs, padded(encoded.shape[3]))},
        precision=precision,
        config=config,
    )


def plan_map(
    grad_convolved: Tensor, turned: Tensor, out: Tensor, *, precision: str, config: ProjectionConfig
) -> Launch:
    """The launch that fills `out` (B, H, W, D), the map's gradient, from that of the convolved map; all contiguous.

    `turned` is (9, D, D): the taps in reverse, from the convolution's result to its map.
    """
    return launch_of_rectangles(
        _query_projection_backward_map_kernel,
        out,
        {"grad_convolved": grad_convolved, "turned": turned, "out": out},
        {},
        {},
        precision=precision,
        config=config,
    )


def plan_weights(
    grad: Tensor, values: Tensor, sums: Tensor, *, run: int, precision: str, config: WeightsConfig
) -> Launch:
    """The launch that fills `sums` (runs, taps, D, D), float32, with those of each run of pixels.

    They are of `grad` at a pixel and `values` at each of 9 taps, or of 1, the pixel. Both are (B, H, W, D) contiguous.
    """
    batch, height, width, dim = grad.shape
    runs, taps = sums.shape[:2]
    return Launch(
        kernel=_query_projection_backward_weights_kernel,
        grid=(taps * config.blocks(dim) ** 2, runs),
        arguments={
            "grad": grad,
            "values": values,
            "sums": sums,
            "height": height,
            "width": width,
            "pixels": batch * height * width,
            "run": run,
        },
        constants={
            "DIM": dim,
            "BLOCK": min(config.block, padded(dim)),
            "STEP": config.step,
            "TAPS": taps,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
