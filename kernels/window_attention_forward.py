"""Window attention, forward: out(x) = sum_j P(x, j) v(j), P the mean over heads of each head's softmax over a window.

One averaged P carries all channels, so the heads cannot share an online softmax. A program first takes each head's
largest logit and sum of exponentials over the keys of its tile, then makes the averaged weights, and multiplies them
with the values. The idea that makes it fast: neighbouring pixels see nearly the same keys, so a tile's keys are few,
and no mask, table or copied key is read from memory.

Where the keys are few, all weights of a tile stay in registers (`window_attention_resident.py`), and the channels go
by slice by slice. Where they are many, they are kept in memory (`window_attention_kept.py`), or, where one run of
channel slices is all there is or the keys are too many for that, made anew for each run, a block of keys at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import PART, SIZES, Launch, part_arguments, size_arguments, strides_of
from .products import LOG2_E, matmul
from .window_attention_config import ForwardConfig, MostKeys
from .window_attention_kept import _window_attention_kept_kernel
from .window_attention_resident import resident_weights, run_offsets, side_by_side
from .window_attention_tile import (
    Keys,
    grid_offsets,
    head_statistics,
    key_block,
    load_channels,
    mean_weights,
    open_queries,
    pixel_windows,
    store_channels,
    tile_keys,
    tile_pixels,
)
from .window_bounds import WindowRule


@triton.jit(do_not_specialize=(*SIZES, *PART))
def _window_attention_forward_kernel(
    query, key, value, out, lse,
    # (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), (B, H, W, C), (B, H, W, heads)
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_image_stride, value_row_stride, value_column_stride, value_channel_stride,
    exponent_scale, opaque_zero,
    part_row, part_column, whole_height, whole_width,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    RESIDENT_BLOCKS: tl.constexpr, SLICES: tl.constexpr, LOAD_ONCE: tl.constexpr, ROW_PARTIALS: tl.constexpr,
    TAIL: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS pixels, all channels; grid: the tiles of all images.

    With RESIDENT_BLOCKS no tile sees more than RESIDENT_BLOCKS * BLOCK + TAIL keys; at 0 any number, and SLICES channel
    slices are worked on at once. WHOLE says that these divide the channels.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    image, top, left, pixel_row, pixel_column, pixel_exists = tile_pixels(
        tl.program_id(0), tile_rows, tile_columns, sizes, ROWS, COLUMNS
    )
    position = None
    if part_row is not None:
        position = (part_row, part_column, whole_height, whole_width)
    rectangle = tile_keys(top, left, sizes, rule, ROWS, COLUMNS, WINDOW, position)
    windows = pixel_windows(pixel_row, pixel_column, sizes, rule, WINDOW, position)
    keys = Keys(key + image * key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride)
    value += image * value_image_stride
    offset = pixel_row.to(tl.int64) * query_row_stride + pixel_column.to(tl.int64) * query_column_stride
    query += image * query_image_stride
    pixel = (image * height + pixel_row) * width + pixel_column  # int64, as the image is
    if RESIDENT_BLOCKS:
        place = query + offset[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * query_channel_stride
        blocks = resident_weights(
            place, query_head_stride, keys, rectangle, windows, exponent_scale, lse + pixel * HEADS, pixel_exists,
            opaque_zero,
            HEADS=HEADS, WIDTH=WIDTH, PIXELS=PIXELS, BLOCK=BLOCK, BLOCKS=RESIDENT_BLOCKS, TAIL=TAIL, GROUP=GROUP,
            PRECISION=PRECISION, ROW_PARTIALS=ROW_PARTIALS, SAVE_LSE=SAVE_LSE,
            KEPT=tl.float16 if value.dtype.element_ty.primitive_bitwidth == 16 else tl.float32,
        )  # fmt: skip
        weights = ()  # of the keys in runs, (PIXELS, keys)
        for block in tl.static_range(len(blocks)):
            weights = weights + (blocks[block].to(value.dtype.element_ty),)
        weights = side_by_side(weights, RESIDENT_BLOCKS)
        near = run_offsets(rectangle, value_row_stride, value_column_stride, opaque_zero, BLOCK, RESIDENT_BLOCKS, TAIL)
        for first in tl.range(0, channels, SLICE):
            product = tl.zeros((PIXELS, SLICE), tl.float32)
            for run in tl.static_range(len(near)):
                carried = load_channels(value, near[run], first, channels, value_channel_stride, SLICE, WHOLE)
                product = matmul(weights[run], carried, product, PRECISION)
            store_channels(out, product, pixel, pixel_exists, first, channels, SLICE, WHOLE)
    else:
        queries = open_queries(query, offset, query_head_stride, query_channel_stride, HEADS, PIECE, LOAD_ONCE)
        m_i, l_i = head_statistics(
            queries, query_channel_stride, keys, rectangle, windows, exponent_scale, opaque_zero,
            HEADS=HEADS, WIDTH=WIDTH, PIECE=PIECE, PIXELS=PIXELS, BLOCK=BLOCK, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            ROW_PARTIALS=ROW_PARTIALS,
        )  # fmt: skip
        inv_l = ()
        for head in tl.static_range(HEADS):
            if SAVE_LSE:
                place = lse + pixel * HEADS + head
                tl.store(place, (m_i[head] + tl.math.log2(l_i[head])) / LOG2_E, mask=pixel_exists)
            inv_l = inv_l + (1.0 / (l_i[head] * HEADS),)
        for first in tl.range(0, channels, SLICE * SLICES):
            products = ()  # SLICES x (PIXELS, SLICE)
            for _slice in tl.static_range(SLICES):
                products = products + (tl.zeros((PIXELS, SLICE), tl.float32),)
            for block in tl.range(0, tl.cdiv(rectangle.count, BLOCK)):
                averaged = mean_weights(
                    queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i, inv_l,
                    opaque_zero,
                    HEADS=HEADS, WIDTH=WIDTH, PIECE=PIECE, PIXELS=PIXELS, BLOCK=BLOCK, PRECISION=PRECISION,
                    LOAD_ONCE=LOAD_ONCE,
                ).to(value.dtype.element_ty)  # fmt: skip
                row, column, _ = key_block(block * BLOCK, rectangle, BLOCK)
                near = grid_offsets(row, column, value_row_stride, value_column_stride)
                updated = ()
                for piece in tl.static_range(SLICES):
                    carried = load_channels(
                        value, near, first + piece * SLICE, channels, value_channel_stride, SLICE, WHOLE
                    )
                    updated = updated + (matmul(averaged, carried, products[piece], PRECISION),)
                products = updated
            for piece in tl.static_range(SLICES):
                store_channels(out, products[piece], pixel, pixel_exists, first + piece * SLICE, channels, SLICE, WHOLE)


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    window: WindowRule,
    scale: float,
    precision: str,
    config: ForwardConfig,
    part: tuple[int, int, int, int] | None = None,
    kept: Tensor | None = None,
) -> Launch:
    """The launch that fills `out` (B, H, W, C) and, unless it is empty, `lse` (B, H, W, heads).

    Args:
        query, key, value: (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), any strides.
        out, lse: contiguous; `lse` float32, in natural units.
        window: the rule of the window for these sizes.
        scale: of the logits, positive.
        precision: of products of float32, Triton's `input_precision`.
        config: sizes of tiles, warps, stages; its resident blocks, if any, must hold the keys of every tile.
        part: where the pixels lie in a larger output, whose windows they have: first row, first column, the larger
            output's height and width. None: they are all of it.
        kept: memory for the programs' weights, of `allocate_kept`, with a config that keeps them there.
    """
    batch, height, width, heads, head_dim = query.shape
    tiles = (-(-height // config.rows), -(-width // config.columns))  # triton.cdiv takes as long as all else here
    number = batch * tiles[0] * tiles[1]
    if (kept is None) != (config.kept_programs == 0):
        raise ValueError(f"kept: expected memory just where a config keeps weights there, got {kept} with {config}")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "out": out,
        "lse": lse,
        **size_arguments(query, key, tiles),
        "channels": value.shape[3],
        **window.arguments(),
        **strides_of("query", query, "image row column head channel"),
        **strides_of("key", key, "image row column head channel"),
        **strides_of("value", value, "image row column channel"),
        "exponent_scale": scale * LOG2_E.value,
        "opaque_zero": 0,
        **part_arguments(part),
    }
    constants = {
        "WINDOW": window.kind,
        "HEADS": heads,
        "WIDTH": head_dim,
        "SAVE_LSE": lse.numel() > 0,
        "PRECISION": precision,
        "PIECE": head_dim if config.load_once else min(head_dim, config.piece),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "BLOCK": config.block_keys,
        "SLICE": config.channel_slice,
        "RESIDENT_BLOCKS": config.resident_blocks,
        "SLICES": config.slices,
        "LOAD_ONCE": config.load_once,
        "ROW_PARTIALS": config.row_partials,
        "TAIL": config.tail_keys,
        "GROUP": config.group_blocks,
        "WHOLE": value.shape[3] % (config.channel_slice * (1 if config.resident_blocks else config.slices)) == 0,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kept is not None:
        arguments |= {"kept": kept, "most_blocks": kept.shape[1], "tiles": number}
        for of_resident_weights in ("RESIDENT_BLOCKS", "TAIL", "GROUP"):
            del constants[of_resident_weights]
        return Launch(_window_attention_kept_kernel, (min(number, kept.shape[0]),), arguments, constants, options)
    return Launch(_window_attention_forward_kernel, (number,), arguments, constants, options)


def allocate_kept(value: Tensor, *, most_keys: MostKeys, multiprocessors: int, config: ForwardConfig) -> Tensor | None:
    """Memory for the weights of the tiles that are worked on at a time, (programs, blocks, pixels, keys of a block).

    None with a config that keeps them elsewhere.
    """
    if not config.kept_programs:
        return None
    blocks = -(-most_keys(config.rows, config.columns) // config.block_keys)
    programs = config.kept_programs * multiprocessors
    return value.new_empty(programs, blocks, config.rows * config.columns, config.block_keys)
