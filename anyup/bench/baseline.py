"""The published forward: the baseline, doing the work that the published implementation does.

A dense query-by-key mask built whole before anything else, encoders at full resolution and pooled afterwards,
the feature unification's tensor of M*C*h*w values, `nn.MultiheadAttention` asked for its averaged weights, as
many queries at a time as `q_chunk_size` says. Written for this benchmark from the model's definition; it runs
torch's modules and the parameters of one of our models, and none of its operations.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup import AnyUp
from anyup.bench.timing import Clock, host_clock
from anyup.bench.workloads import Workload
from anyup.layers import Encoder, ResBlock
from anyup.ops.ieee import in_ieee
from anyup.window import Window, axis_bounds

_FITTED_RATES = (130e9, 187e9)
"""Operations a second of a square float32 product of 2048 on the CPU of the fit, the lowest and the highest seen."""

CHUNKS = (512, 1024, 2048, 4096, 8192, 16384)
"""Chunk sizes among which the best is looked for; the whole output at once is another where it is small."""

_SAMPLE = 2**15
_SMALL_OUTPUT = 2**16


class Published:
    """The published forward with a model's weights.

    The last mask is kept, as the published code keeps its own. Float32 is multiplied as float32: on a GPU torch's
    convolutions would otherwise be of TF32, a thousand times less exact.
    """

    def __init__(self, model: AnyUp) -> None:
        self.model = model
        self._mask: tuple[tuple[int, ...], Tensor] | None = None

    @in_ieee
    def __call__(
        self,
        image: Tensor,
        features: Tensor,
        q_chunk_size: int | None = None,
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, 3, Hi, Wi), (B, C, h, w) -> (B, C, H, W), a permuted view as the published code returns it."""
        with image.device:
            return self._run(image, features, q_chunk_size, output_size or (image.shape[2], image.shape[3]))

    def _run(self, image: Tensor, features: Tensor, q_chunk_size: int | None, size: tuple[int, int]) -> Tensor:
        height, width = size
        mask = self.mask(size, (features.shape[2], features.shape[3]))
        query, key = self.encode(image, features, size)
        out = self.attend(query, key, features, mask, q_chunk_size)
        return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def mask(self, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """(H*W, h*w) bool, True where a query must not see a key."""
        sizes = (*size, *grid)
        if self._mask is None or self._mask[0] != sizes:
            self._mask = None  # not two of them at once
            rows, columns = _outside(self.model.window, size, grid)
            whole = rows[:, None, :, None] | columns[None, :, None, :]
            self._mask = (sizes, whole.reshape(size[0] * size[1], grid[0] * grid[1]))
        return self._mask[1]

    def encode(self, image: Tensor, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries (B, H*W, D) and keys (B, h*w, D), normalised, not projected."""
        model = self.model
        grid = (features.shape[2], features.shape[3])
        encoded = rotate(run_encoder(model.image_encoder, image), model.rope.freqs)
        query = F.adaptive_avg_pool2d(run_encoder(model.query_encoder, encoded), size)
        image_key = F.adaptive_avg_pool2d(run_encoder(model.key_encoder, encoded), grid)
        unification, *blocks = cast(Any, model.key_features_encoder)
        feature_key = unify(F.normalize(features, dim=1), unification.basis)
        for block in blocks:
            feature_key = run_block(block, feature_key)
        key = run_encoder(model.aggregation, torch.cat((image_key, feature_key), dim=1))
        query = model.cross_decode.conv2d(query)
        attention = model.cross_decode.cross_attn
        return (
            attention.norm_q(query.flatten(2).transpose(1, 2)),
            attention.norm_k(key.flatten(2).transpose(1, 2)),
        )

    def attend(self, query: Tensor, key: Tensor, features: Tensor, mask: Tensor, q_chunk_size: int | None) -> Tensor:
        """(B, Q, D), (B, h*w, D), (B, C, h, w), (Q, h*w) -> (B, Q, C)."""
        attention = self.model.cross_decode.cross_attn.attention
        value = features.flatten(2).transpose(1, 2)
        outputs = []
        step = q_chunk_size or query.shape[1]
        for first in range(0, query.shape[1], step):
            part = slice(first, first + step)
            # The module wants a value of its own width and projects it; only the weights are used.
            _, weights = attention(
                query[:, part], key, key, attn_mask=mask[part], need_weights=True, average_attn_weights=True
            )
            outputs.append(weights @ value)
        return torch.cat(outputs, dim=1)

    @in_ieee
    def at(self, image: Tensor, features: Tensor, pixels: Tensor, chunk: int = 1024) -> Tensor:
        """The output (B, C, N) at N pixels (flat indices): all of the encoding, little attention."""
        size, grid = (image.shape[2], image.shape[3]), (features.shape[2], features.shape[3])
        with image.device:
            rows, columns = _outside(self.model.window, size, grid)
            mask = rows[pixels // size[1], :, None] | columns[pixels % size[1], None, :]
            query, key = self.encode(image, features, size)
            return self.attend(query[:, pixels], key, features, mask.flatten(1), chunk).transpose(1, 2)

    def chunk_times(self, workload: Workload, clock: Clock = host_clock) -> dict[int | None, float]:
        """Seconds that the attention takes with each candidate chunk size, for the same sample of queries.

        None stands for the whole output at once, tried where the output is small.
        """
        like = self.model.rope.freqs
        whole = workload.size[0] * workload.size[1]
        features = workload.inputs()[1].to(like)
        sample = whole if whole <= _SMALL_OUTPUT else _SAMPLE
        with like.device:
            mask = self.mask(workload.size, workload.grid)[:sample]
        dim = self.model.config["qk_dim"]
        # The time does not depend on the numbers, so nothing is encoded.
        query, key = (torch.randn(workload.batch, n, dim).to(like) for n in (sample, workload.keys))
        times: dict[int | None, float] = {}
        candidates: list[int | None] = [chunk for chunk in CHUNKS if chunk <= sample]
        if sample == whole:
            candidates.append(None)
        for chunk in 2 * candidates:  # in turn; the faster of two
            seconds = clock(functools.partial(self.attend, query, key, features, mask, chunk)).seconds
            times[chunk] = min(seconds, times.get(chunk, math.inf))
        return times


def run_encoder(encoder: Encoder, x: Tensor) -> Tensor:
    """(B, in, H, W) -> (B, D, H, W): a convolution that pads by reflection, then two residual blocks."""
    conv, *blocks = cast(Any, encoder)
    half = conv.kernel_size[0] // 2
    if half:
        # By replication along an axis too short to reflect, where the published code fails.
        for length, padding in ((x.shape[2], (0, 0, half, half)), (x.shape[3], (half, half, 0, 0))):
            x = F.pad(x, padding, mode="reflect" if length > half else "replicate")
    x = F.conv2d(x, conv.weight)
    for block in blocks:
        x = run_block(block, x)
    return x


def run_block(block: ResBlock, x: Tensor) -> Tensor:
    """(B, in, H, W) -> (B, out, H, W), by the block's own modules as torch runs them."""
    return block.block(x) + block.shortcut(x)


def unify(features: Tensor, basis: Tensor) -> Tensor:
    """The feature unification as its definition reads: (B, C, h, w), (M, 1, s, s) -> (B, M, h, w)."""
    batch, channels, h, w = features.shape
    filters, _, size, _ = basis.shape
    maps = F.conv2d(features.reshape(batch * channels, 1, h, w), basis, padding=size // 2)
    taps = F.conv2d(features.new_ones(1, 1, h, w), features.new_ones(1, 1, size, size), padding=size // 2)
    maps = (maps / taps).reshape(batch, filters, channels, h, w)  # channel-major maps, read again as (M, C)
    return torch.softmax(maps, dim=1).mean(dim=2)


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """The rotary embedding of (B, D, H, W), angles linear in row and column."""
    rows, columns = (torch.linspace(0, 1, n, dtype=frequencies.dtype) for n in x.shape[2:])
    angle = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1) @ frequencies
    angle = angle.permute(2, 0, 1)
    first, second = x.chunk(2, dim=1)
    return x * angle.cos() + torch.cat((-second, first), dim=1) * angle.sin()


def best_chunk(times: dict[int | None, float]) -> int | None:
    """The chunk size of the shortest time."""
    return min(times, key=lambda chunk: times[chunk])


def expected_seconds(workload: Workload, rate: float) -> float:
    """About what the baseline takes where a matrix product runs at `rate` operations a second.

    A constant for each pixel's encoding and one for each query-key pair, fitted to what the published code took in
    float32 (1.85 s at 224 from 16, 15.9 s at 448 from 32, 186 s at 1024 from 64) where products ran at these rates.
    """
    return workload.pixels * (33e-6 + 0.036e-6 * workload.keys) * (sum(_FITTED_RATES) / 2) / rate


def least_bytes(workload: Workload, *, dim: int = 128) -> int:
    """A lower bound of the baseline's memory: the mask, and three encoder maps or two outputs."""
    mask = workload.size[0] * workload.size[1] * workload.keys
    return mask + max(3 * 4 * dim * workload.pixels, 2 * workload.output_bytes)


def unchunked_bytes(workload: Workload, *, heads: int = 4) -> int:
    """What the attention takes beside that with the whole output at once: logits and weights of all heads."""
    return 2 * 4 * heads * workload.pixels * workload.keys


def _outside(window: Window, size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """For rows (H, h) and columns (W, w): True where a query's window does not hold a key."""
    axes = []
    for queries, keys in zip(size, grid, strict=True):
        start, stop = (torch.tensor(bound)[:, None] for bound in axis_bounds(window, queries, keys))
        position = torch.arange(keys)
        axes.append((position < start) | (position >= stop))
    return axes[0], axes[1]
