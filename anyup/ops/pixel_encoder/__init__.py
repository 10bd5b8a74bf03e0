"""The image's half of the model: encoders that see one pixel, and the whole map's statistics, at a time."""

from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.operator import encode_pixels, explain_backends

__all__ = ["BlockParameters", "EncoderParameters", "encode_pixels", "explain_backends"]
