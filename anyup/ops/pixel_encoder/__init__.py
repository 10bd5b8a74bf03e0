"""The image's half of the model: encoders that see one pixel, and the whole map's statistics, at a time."""

from anyup.ops.pixel_encoder.operator import encode_pixels, explain_backends
from anyup.ops.pixel_encoder.problem import BlockParameters, EncoderParameters

__all__ = ["BlockParameters", "EncoderParameters", "encode_pixels", "explain_backends"]
