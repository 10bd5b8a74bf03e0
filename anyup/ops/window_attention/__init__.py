"""Local window cross-attention between grids of different resolution."""

from anyup.ops.window_attention.operator import explain_backends, window_attention
from anyup.ops.window_attention.points import attend_points, explain_points

__all__ = ["attend_points", "explain_backends", "explain_points", "window_attention"]
