"""The attention's keys, from the image's keys and the features, in few launches."""

from anyup.ops.key_grid.arguments import KeyGridProblem, KeyParameters, describe
from anyup.ops.key_grid.operator import OPERATION, make_keys

__all__ = ["OPERATION", "KeyGridProblem", "KeyParameters", "describe", "make_keys"]
