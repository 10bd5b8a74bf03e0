"""How far upsampled features are from the true ones, the losses of a training."""

from anyup.ops.feature_distance.operator import explain_backends, feature_distance

__all__ = ["explain_backends", "feature_distance"]
