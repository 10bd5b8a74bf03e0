"""Features of any number of channels brought to a fixed number."""

from anyup.ops.feature_unification.operator import explain_backends, unify_features

__all__ = ["explain_backends", "unify_features"]
