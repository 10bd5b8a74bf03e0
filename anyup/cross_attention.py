"""The cross-attention that carries the features to the output grid, under its published parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.ops.dispatch import Backend
from anyup.ops.precision import working_dtype
from anyup.ops.query_projection import ProjectionParameters, project_queries
from anyup.ops.window_attention import window_attention
from anyup.window import CellWindow, RatioWindow, check_ratio


class CrossAttention(nn.Module):
    """Norms and projections of queries and keys.

    `attention` is `nn.MultiheadAttention` for its parameters' names and initial values alone. The value rows of
    `in_proj_weight` and `out_proj` exist in every checkpoint and never influence the result.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(dim)
        self.norm_k = nn.RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)


class CrossAttentionBlock(nn.Module):
    """The 3x3 convolution of the queries, the projections of queries and keys, and the attention within a window.

    Attributes:
        window: which keys a query attends to.
    """

    def __init__(self, dim: int, num_heads: int, window: RatioWindow | CellWindow) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.cross_attn = CrossAttention(dim, num_heads)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    @property
    def window_ratio(self) -> float:
        """The window's ratio. A new value takes effect at the next call."""
        return self.window.ratio

    @window_ratio.setter
    def window_ratio(self, ratio: float) -> None:
        self.window = type(self.window)(check_ratio(ratio))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, vis_attn: bool = False, q_chunk_size: int | None = None
    ) -> Tensor:
        """Encoded queries (B, D, H, W), encoded keys (B, D, h, w) and values (B, C, h, w) to (B, C, H, W).

        `vis_attn` shows a picture of the attention too. `q_chunk_size` is as in the call of `AnyUp`.
        """
        pixels = q.permute(0, 2, 3, 1)
        queries = self.split_heads(project_queries(pixels, self.query_parameters(pixels.dtype)))
        keys = self.project_keys(k.permute(0, 2, 3, 1)).to(queries.dtype)
        if vis_attn:
            self.show_attention(queries, keys, q_chunk_size)
        return self.attend(queries, keys, v, q_chunk_size)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, q_chunk_size: int | None, backend: Backend = None
    ) -> Tensor:
        """Projected queries (B, H, W, heads, head_dim) and keys (B, h, w, ...), values (B, C, h, w): (B, C, H, W)."""
        out = window_attention(
            queries,
            keys,
            # A pixel reads all channels of a few values, so channels come last; the copy of the small grid is cheap.
            values.permute(0, 2, 3, 1).contiguous(),
            window=self.window,
            backend=backend,
            max_queries=q_chunk_size,
        )
        return out.permute(0, 3, 1, 2)

    def show_attention(self, queries: Tensor, keys: Tensor, q_chunk_size: int | None, backend: Backend = None) -> None:
        """Show where the first image's pixels look, by the colours of the keys; `queries` and `keys` are projected."""
        from anyup import visualization

        h, w = keys.shape[1:3]
        colors = visualization.key_colors(h, w, device=keys.device)[None]
        painted = self.attend(queries[:1].detach(), keys[:1].detach(), colors, q_chunk_size, backend)
        visualization.show_attention((h, w), painted[0])

    def query_parameters(self, dtype: torch.dtype) -> ProjectionParameters:
        """The tensors that turn the encoded image into queries, in a dtype."""
        dim = self.conv2d.out_channels
        attention = self.cross_attn.attention
        tensors = (
            self.conv2d.weight,
            self.cross_attn.norm_q.weight,
            attention.in_proj_weight[:dim],
            attention.in_proj_bias[:dim],
        )
        return ProjectionParameters(*(t.to(dtype) for t in tensors))

    def key_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gain (D,), weight (D, D) and bias (D,) that project encoded keys, in the dtypes of the parameters."""
        dim = self.conv2d.out_channels
        attention = self.cross_attn.attention
        rows = slice(dim, 2 * dim)
        return self.cross_attn.norm_k.weight, attention.in_proj_weight[rows], attention.in_proj_bias[rows]

    def project_keys(self, encoded: Tensor) -> Tensor:
        """Encoded keys (B, h, w, D) to keys (B, h, w, heads, head_dim) in their dtype; the norm is float32 or wider."""
        wide = working_dtype(encoded.dtype)
        gain, weight, bias = self.key_parameters()
        normed = F.rms_norm(encoded.to(wide), encoded.shape[3:], gain.to(wide)).to(encoded.dtype)
        keys = F.linear(normed, weight.to(encoded.dtype), bias.to(encoded.dtype))
        return self.split_heads(keys)

    def split_heads(self, projected: Tensor) -> Tensor:
        """(..., D) -> (..., heads, head_dim), a view."""
        return projected.unflatten(-1, (self.num_heads, -1))


def setup_cross_attention_block(
    use_natten: bool,
    qk_dim: int,
    num_heads: int,
    window_ratio: float = 0.1,
    use_params_from: nn.Module | None = None,
) -> CrossAttentionBlock:
    """A block that can replace an upsampler's `cross_decode`; name and arguments are the published ones.

    Args:
        use_natten: attend within the window of each query's cell; NATTEN is not needed.
        qk_dim, num_heads, window_ratio: as of `AnyUp`.
        use_params_from: a block whose weights the new block copies; None: new weights.
    """
    kind = CellWindow if use_natten else RatioWindow
    block = CrossAttentionBlock(qk_dim, num_heads, kind(check_ratio(window_ratio)))
    if use_params_from is not None:
        block.load_state_dict(use_params_from.state_dict())
    return block
