"""Probe3D's DPT head, without its interpolations: four blocks of an encoder, which an upsampler brings to the pixels.

The head's first layer, a 1x1 convolution of each block, is linear in each pixel, and the weights of a pixel sum to one:
so it is applied on the small grid, as a linear probe is. What follows looks at a pixel's neighbours, and comes after
the upsampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyup.encoders import Encoder
from anyup.evaluation.attention_weights import FixedWeights, HeadedWeights
from anyup.evaluation.probe import Probes

BLOCKS = 4

# Bytes of the outputs that are made at a time. Those of all pixels are 205 MB with 256 bins at 448 pixels, and so much
# memory is new to the process each time, which took a third of a step.
_AT_A_TIME = 1 << 22


class FourBlocks(Encoder):
    """Four layers of a network as one encoder, which gives their features side by side, (B, 4 C, h, w).

    Each layer is an encoder of its own, and runs from the image on: the price is at most four times the network's.
    Raises ValueError for another number, and where they differ in channels, stride, patch size or normalisation.
    """

    def __init__(self, layers: Sequence[Encoder]) -> None:
        if len(layers) != BLOCKS:
            raise ValueError(f"encoder: expected four with the head dpt, the blocks it sees, got {len(layers)}")
        first = layers[0]
        for argument in ("channels", "stride", "patch_size", "mean", "std"):
            given = [getattr(layer, argument) for layer in layers]
            if any(value != given[0] for value in given):
                raise ValueError(f"encoder: expected four with the same {argument}, got {', '.join(map(str, given))}")
        super().__init__(
            ", ".join(layer.name for layer in layers),
            channels=BLOCKS * first.channels,
            stride=first.stride,
            patch_size=first.patch_size,
            mean=first.mean,
            std=first.std,
        )
        self.blocks = nn.ModuleList(layers)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 4 C, h, w)."""
        return torch.cat([block(image) for block in self.blocks], dim=1)

    def tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1 + h * w, 4 C), the four class tokens side by side too."""
        return torch.cat([block.tokens(image) for block in self.blocks], dim=2)  # type: ignore[operator]


class _Residual(nn.Module):
    """Two 3x3 convolutions, each under a ReLU, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.layers = nn.Sequential(convolutions[0], nn.ReLU(inplace=True), convolutions[1], nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class DptHead(nn.Module):
    """The head: each block's projection to `width` channels, and what merges them, from the last block to the first.

    Args:
        channels: of the four blocks together.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, BLOCKS * width, 1, groups=BLOCKS)
        self.each = nn.ModuleList(_Residual(width) for _ in range(BLOCKS - 1))  # the last block has none of its own
        self.merged = nn.ModuleList(_Residual(width) for _ in range(BLOCKS))
        self.out = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, outputs, 3, padding=(0, 1))
        )
        self.outputs = outputs

    def merge(self, projected: Tensor, then: Callable[[Tensor], Tensor] = lambda outputs: outputs) -> Tensor:
        """(4 * width, H, W), projected and upsampled, to the outputs of some rows at a time (outputs, rows, W), and
        what `then` makes of these to (channels, H, W)."""
        blocks = projected.unflatten(0, (BLOCKS, 1, -1))
        x = self.merged[-1](blocks[-1])
        for block, each, merged in reversed(list(zip(blocks[:-1], self.each, self.merged[:-1], strict=True))):
            x = merged(each(block) + x)
        hidden = F.pad(self.out[:2](x), (0, 0, 1, 1))
        height, width = x.shape[2:]
        rows = max(1, _AT_A_TIME // (self.outputs * width * x.element_size()))
        bands = (hidden[:, :, top : top + rows + 2] for top in range(0, height, rows))
        return torch.cat([then(self.out[2](band)[0]) for band in bands], dim=1)


class DptProbes(Probes):
    """Probes that are a `DptHead` each.

    Args:
        channels: of what the heads see: the four blocks' features, and the class tokens after them where there are.
        of_block: channels of a block's features.
    """

    def __init__(
        self, methods: Sequence[str], seeds: Sequence[int], channels: int, outputs: int, *, of_block: int, width: int
    ) -> None:
        super().__init__(methods, seeds)
        self.of_block = of_block
        start = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                start.append(DptHead(channels, outputs, width))
        self.heads = nn.ModuleList(nn.ModuleList(deepcopy(start)) for _ in methods)

    def forward(self, features: Tensor) -> Tensor:
        """(1, channels, h, w) to the projections (methods, seeds * 4 * width, h, w)."""
        # A block's features and its class token side by side.
        by_block = features[0].unflatten(0, (-1, BLOCKS, self.of_block)).transpose(0, 1).flatten(0, 2)
        projected = [[head.project(by_block) for head in self._of(method)] for method in range(len(self.methods))]
        return torch.stack([torch.cat(of_method) for of_method in projected])

    def carrier(self, method: int, weights: FixedWeights) -> HeadedWeights:
        """See `Probes.carrier`."""
        return HeadedWeights(weights, [head.merge for head in self._of(method)])

    def finish(self, method: int, carried: Tensor) -> Tensor:
        """See `Probes.finish`."""
        heads = self._of(method)
        return torch.cat([h.merge(of) for h, of in zip(heads, carried.unflatten(0, (len(heads), -1)), strict=True)])

    def _of(self, method: int) -> list[DptHead]:
        return list(self.heads[method])  # type: ignore[call-overload]
