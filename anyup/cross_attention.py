"""The cross-attention that carries the features to the output grid, under its published parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.ops.precision import working_dtype
from anyup.ops.query_projection import ProjectionParameters


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
    """The 3x3 convolution of the queries, and how queries and keys are projected."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cross_attn = CrossAttention(dim, num_heads)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

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

    def project_keys(self, encoded: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, heads, head_dim), in the same dtype; the norm runs in float32 at least."""
        dim = encoded.shape[3]
        wide = working_dtype(encoded.dtype)
        attention = self.cross_attn.attention
        normed = F.rms_norm(encoded.to(wide), (dim,), self.cross_attn.norm_k.weight.to(wide)).to(encoded.dtype)
        weight, bias = attention.in_proj_weight[dim : 2 * dim], attention.in_proj_bias[dim : 2 * dim]
        keys = F.linear(normed, weight.to(encoded.dtype), bias.to(encoded.dtype))
        return self.split_heads(keys)

    def split_heads(self, projected: Tensor) -> Tensor:
        """(..., D) -> (..., heads, head_dim), a view."""
        return projected.unflatten(-1, (self.num_heads, -1))
