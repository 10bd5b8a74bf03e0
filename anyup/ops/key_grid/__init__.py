"""The attention's keys, from the image's keys and the features, in few launches."""

from anyup.ops.key_grid.arguments import KeyParameters, describe
from anyup.ops.key_grid.operator import make_keys

__all__ = ["KeyParameters", "describe", "make_keys"]
