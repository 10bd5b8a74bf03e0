"""A fixed random encoder of a few channels, for tests that need no real one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyup.encoders import Encoder


class TinyEncoder(Encoder):
    """One convolution over cells of `stride` pixels and its square, so that resizing does not commute with it."""

    def __init__(self, stride: int = 4, channels: int = 6, name: str = "tiny") -> None:
        super().__init__(name, channels=channels, stride=stride, patch_size=stride)
        self.calls = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.convolution = nn.Conv2d(3, channels, stride, stride=stride)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, channels, H / stride, W / stride)."""
        self.calls += 1
        cells: Tensor = self.convolution(image)
        return cells + cells.square()

    def tokens(self, image: Tensor) -> Tensor:
        """See `Encoder.tokens`: the class token is the cells' mean."""
        patches = self.features(image).flatten(2).mT
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


def make_encoder(stride: int = 4, channels: int = 6, name: str = "tiny") -> TinyEncoder:
    """The encoder as `load_encoder` gives one: frozen, in eval mode."""
    encoder = TinyEncoder(stride, channels, name)
    encoder.eval().requires_grad_(False)
    return encoder
