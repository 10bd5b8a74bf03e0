"""Local window cross-attention between grids of different resolution."""

from anyup.ops.window_attention.operator import explain_backends, window_attention

__all__ = ["explain_backends", "window_attention"]
