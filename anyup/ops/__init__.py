"""The heavy operations, each with a reference and its backends behind one dispatcher."""

from anyup.ops.window_attention import explain_backends, window_attention

__all__ = ["explain_backends", "window_attention"]
