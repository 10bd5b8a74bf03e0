"""The encoded image turned into queries."""

from anyup.ops.query_projection.arguments import ProjectionParameters
from anyup.ops.query_projection.operator import explain_backends, project_queries

__all__ = ["ProjectionParameters", "explain_backends", "project_queries"]
