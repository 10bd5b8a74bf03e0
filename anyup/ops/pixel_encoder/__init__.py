"""The image's half of the model: encoders that see one pixel, and the whole map's statistics, at a time."""

from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.operator import encode_pixels, explain_backends
from anyup.ops.pixel_encoder.pair import OPERATION as PAIR
from anyup.ops.pixel_encoder.pair import describe_pair, encode_pair

__all__ = [
    "PAIR",
    "BlockParameters",
    "EncoderParameters",
    "describe_pair",
    "encode_pair",
    "encode_pixels",
    "explain_backends",
]
