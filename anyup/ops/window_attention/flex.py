"""Window attention by FlexAttention: a kernel that torch.compile writes, which skips blocks outside the window.

FlexAttention computes softmax(q k^T) v for each head. Here the heads share the values and their weights are averaged,
which is the mean of the heads' outputs. Channels go through in slices and pixels in rectangles of tiles, so the output
of each head exists for one slice of one rectangle only. Which blocks of keys a tile visits comes from the window's two
tables (`blocks`), never from a mask of queries by keys.

The kernel is compiled when first used, for a dtype, a number of heads, a head width, a slice width and a scale. Another
size of image or features, batch, window or number of channels compiles nothing new.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.installing import pip_install
from anyup.ops.configs import is_refusal, summary_of
from anyup.ops.dispatch import WITHOUT_GRADIENT, BackendFailure
from anyup.ops.precision import dtype_name, working_dtype
from anyup.ops.tables import kept_for_graphs
from anyup.ops.window_attention.blocks import KEY_BLOCK, KEYS, QUERIES, QUERY_TILE, Blocks, blocks_of
from anyup.window import Part, Window, part_bounds

if TYPE_CHECKING:
    from anyup.ops.window_attention.arguments import WindowAttentionProblem

# The widest slice of channels. Each slice computes the logits again, and wider ones spill registers.
_SLICE = 128

# Values in the output of all heads for a slice of a rectangle.
_BUDGET = 2**26

# tl.dot takes no narrower head. A wider head's block of keys may not fit in shared memory together with its values.
_NARROWEST = 16
_WIDEST_HEAD = 128

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The most kernels that a process compiles.
_VARIANTS = 64

_OLDEST_GPU = (7, 0)


def unsupported(problem: WindowAttentionProblem) -> list[str]:
    """Why FlexAttention cannot run a problem, missing compilers included; empty: it can."""
    reasons = []
    if problem.points is not None:
        reasons.append("single pixels are wanted, FlexAttention multiplies tiles of pixels")
    for name, dtype in (("query", problem.query_dtype), ("value", problem.value_dtype)):
        if dtype not in _DTYPES:
            reasons.append(f"{name} is {dtype_name(dtype)}, FlexAttention takes {', '.join(map(dtype_name, _DTYPES))}")
    if problem.head_dim > _WIDEST_HEAD:
        reasons.append(f"head_dim is {problem.head_dim}, at most {_WIDEST_HEAD} fits with its values in shared memory")
    if problem.needs_gradient:
        reasons.append(f"a gradient is wanted, flex has no backward pass: {WITHOUT_GRADIENT}")
    kind = problem.device.type
    if kind == "cuda":
        reasons += _lacking_on_cuda(problem.device)
    elif kind == "cpu":
        reasons += _lacking_on_cpu()
    else:
        reasons.append(f"device is {kind}, flex runs on cuda and cpu")
    if any(os.environ.get(name) == "1" for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")):
        reasons.append("torch.compile is switched off: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE")
    return reasons


def discouraged(problem: WindowAttentionProblem) -> list[str]:
    """Why FlexAttention is not chosen for a problem that it can run unless it is asked for by name."""
    if problem.device.type == "cpu":
        return ["on a CPU it compiles for some 15 s when first used, and torch is faster even then"]
    return []


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    scale: float,
    max_queries: int | None = None,
    save_lse: bool = False,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, W, C) in the value's dtype, and the log-sum-exp (B, H, W, heads) of the scaled logits.

    At most `max_queries` pixels are computed at a time, but never fewer than two tiles of 128. The pixels may be a
    part of a map.
    """
    # Not in inference mode: torch.compile would compile the kernel once more for tensors made in it.
    with torch.inference_mode(False), torch.no_grad():
        return _forward(query, key, value, window, scale, max_queries, save_lse, part)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Always raises: `unsupported` excludes problems that want a gradient."""
    raise NotImplementedError("the flex backend has no backward pass; torch has")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    scale: float,
    max_queries: int | None,
    save_lse: bool,
    part: Part | None,
) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, head_dim = query.shape
    channels = value.shape[3]
    dtype = torch.promote_types(query.dtype, value.dtype)  # FlexAttention takes one dtype for all three
    head_width, slice_width = _padded(head_dim), min(_padded(channels), _SLICE)
    slices = -(-channels // slice_width)
    tiling = kept_for_graphs(
        blocks_of(window, (height, width), (key.shape[1], key.shape[2]), part, query.device), query.device
    )
    positions = tiling.positions()
    out = value.new_empty(batch, height, width, channels)
    lse = query.new_empty((batch, height, width, heads) if save_lse else (0,), dtype=working_dtype(query.dtype))

    # (B, heads, K, KEYS, head_width) and (B, slices, K, KEYS, slice_width)
    grid = (tiling.rows.blocks, tiling.columns.blocks)
    keys = [_tiled(image, grid, KEY_BLOCK, (heads, head_width), dtype) for image in key]
    values = [
        _tiled(image.unflatten(2, (1, channels)), grid, KEY_BLOCK, (1, slices * slice_width), dtype)[0]
        .unflatten(2, (slices, slice_width))
        .permute(2, 0, 1, 3)
        .contiguous()
        for image in value
    ]

    most_tiles = min(_BUDGET // (heads * slice_width), max_queries or _BUDGET) // QUERIES
    for rows, columns in tiling.rectangles(most_tiles):
        blocks = tiling.blocks(rows, columns)
        tiles = (rows.stop - rows.start, columns.stop - columns.start)
        pixels = tuple(
            slice(some.start * tile, min(some.stop * tile, size))
            for some, tile, size in zip((rows, columns), QUERY_TILE, (height, width), strict=True)
        )
        for image in range(batch):
            queries = _tiled(query[image][pixels], tiles, QUERY_TILE, (heads, head_width), dtype)
            for n in range(slices):
                mean, statistics = _run(
                    queries, keys[image], values[image][n], blocks, positions, scale, save_lse and n == 0
                )
                some = slice(n * slice_width, (n + 1) * slice_width)
                _put(out[image][pixels][..., some], mean, tiles)
                if statistics is not None:
                    _put(lse[image][pixels], statistics.T, tiles)
    if query.device.type == "cpu":
        _restore_nans(out, query, key, window, part)
    return out, lse


def _run(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Blocks,
    positions: Tensor,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    import torch._dynamo

    tables = (blocks.partial_count, blocks.partial_index, blocks.full_count, blocks.full_index)
    arguments = (queries, keys, values, blocks.bounds, positions, *tables)
    for tensor, dims in zip(arguments, (1, 1, 0, 1, 1, 0, (0, 1), 0, (0, 1)), strict=True):
        torch._dynamo.mark_dynamic(tensor, dims)
    # One variant for each dtype, width and scale may pass the default of 8; beyond it torch would raise an error.
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
        try:
            return _compiled()(*arguments, scale, save_lse)
        except Exception as error:
            # torch.compile wraps the error of a compiler.
            inner = getattr(error, "inner_exception", error)
            wrapped = isinstance(error, torch._dynamo.exc.TorchDynamoException)
            if is_refusal(inner) or (wrapped and not isinstance(inner, torch.OutOfMemoryError)):
                raise BackendFailure(summary_of(inner)) from error
            raise


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    # fullgraph: whatever cannot be compiled is an error, not an attention that writes out all its logits. Only what
    # `_run` marks is dynamic: with dynamic=True two sizes that are equal in the first call would stay equal.
    return torch.compile(_attend, fullgraph=True, dynamic=False)


def _attend(
    queries: Tensor,  # (heads, T, QUERIES, d)
    keys: Tensor,  # (heads, K, KEYS, d)
    values: Tensor,  # (K, KEYS, Dv)
    bounds: Tensor,  # (4, T, QUERIES)
    positions: Tensor,  # (2, K, KEYS)
    partial_count: Tensor,  # (T,)
    partial_index: Tensor,  # (T, K)
    full_count: Tensor,
    full_index: Tensor,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The mean of the heads' outputs (T * QUERIES, Dv), float32, and the log-sum-exp (heads, T * QUERIES)."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    first_row, last_row, first_column, last_column = bounds.flatten(1)
    rows, columns = positions.flatten(1)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = rows[k], columns[k]
        return (row >= first_row[q]) & (row < last_row[q]) & (column >= first_column[q]) & (column < last_column[q])

    q, k = (t.flatten(1, 2)[None] for t in (queries, keys))
    v = values.flatten(0, 1).expand(1, queries.shape[0], -1, -1)
    mask = BlockMask.from_kv_blocks(
        partial_count[None, None],
        partial_index[None, None],
        full_count[None, None],
        full_index[None, None],
        BLOCK_SIZE=(QUERIES, KEYS),
        mask_mod=sees,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,  # for a backward pass
    )
    # Left to itself FlexAttention may take 128 keys at a time, more than a block holds; in float32, 64 keys and their
    # values fill much of the shared memory of a small GPU.
    options: Any = {"BLOCK_N": 32 if q.dtype == torch.float32 else 64}
    out, statistics = flex_attention(
        q, k, v, block_mask=mask, scale=scale, kernel_options=options, return_aux=AuxRequest(lse=save_lse)
    )
    return out[0].mean(dim=0, dtype=torch.float32), None if statistics.lse is None else statistics.lse[0]


def _tiled(
    image: Tensor, tiles: tuple[int, int], tile: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(H, W, heads, d) -> (heads, tiles, pixels of a tile, d), zeros where tiles or widths reach beyond: a copy."""
    rows, columns, heads, d = image.shape
    padded = image.new_zeros(tiles[0] * tile[0], tiles[1] * tile[1], *widths, dtype=dtype)
    padded[:rows, :columns, :heads, :d] = image
    padded = padded.unflatten(1, (tiles[1], tile[1])).unflatten(0, (tiles[0], tile[0]))
    return padded.permute(4, 0, 2, 1, 3, 5).flatten(3, 4).flatten(1, 2).contiguous()


def _put(pixels: Tensor, tiled: Tensor, tiles: tuple[int, int]) -> None:
    """Write (tiles * pixels of a tile, c) into (H, W, at most c), without what reaches beyond."""
    rows, columns, channels = pixels.shape
    tiled = tiled.unflatten(0, (*tiles, *QUERY_TILE)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    pixels.copy_(tiled[:rows, :columns, :channels])


def _restore_nans(out: Tensor, query: Tensor, key: Tensor, window: Window, part: Part | None) -> None:
    """NaN for each pixel whose query, or a key that it sees, is not finite.

    The kernel for CPUs takes a block with a NaN among a row's logits for one of which the row sees nothing.
    """
    lost = ~query.isfinite().flatten(3).all(dim=3)  # (B, H, W)
    bad = ~key.isfinite().flatten(3).all(dim=3)  # (B, h, w)
    if bad.any():
        sees = []
        top, left, *whole = part or (0, 0, *lost.shape[1:])
        for queries, keys, first, total in zip(lost.shape[1:], bad.shape[1:], (top, left), whole, strict=True):
            bounds = part_bounds(window, queries, keys, first, total)
            start, stop = (torch.tensor(bound, device="cpu")[:, None] for bound in bounds)
            position = torch.arange(keys, device="cpu")
            sees.append(((position >= start) & (position < stop)).float())
        lost |= sees[0] @ bad.float() @ sees[1].T > 0
    out[lost] = torch.nan


def _padded(width: int) -> int:
    """The power of two, at least 16, that the kernel rounds a width up to."""
    return max(_NARROWEST, 1 << (width - 1).bit_length())


def _lacking_on_cuda(device: torch.device) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append(f"triton is not installed, torch.compile needs it on a GPU: {pip_install('triton')}")
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_GPU:
            had, needed = (".".join(map(str, version)) for version in (capability, _OLDEST_GPU))
            reasons.append(f"the GPU's compute capability is {had}, torch.compile needs {needed}")
    return reasons


@lru_cache(maxsize=1)
def _lacking_on_cpu() -> tuple[str, ...]:
    reasons = []
    if sys.platform == "darwin" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        reasons.append("FlexAttention on a CPU needs an x86 CPU with AVX2, and Linux or Windows")
    # As torch.compile looks for it.
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if shutil.which(compiler) is None:
        reasons.append(f"no C++ compiler {compiler!r}, torch.compile needs one on a CPU: install it or set CXX")
    return tuple(reasons)
