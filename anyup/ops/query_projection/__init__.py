"""The encoded image turned into queries."""

from anyup.ops.query_projection.operator import explain_backends, project_queries
from anyup.ops.query_projection.problem import ProjectionParameters

__all__ = ["ProjectionParameters", "explain_backends", "project_queries"]
