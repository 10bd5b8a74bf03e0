"""What every encoder is: an image in, a feature map out, and what it says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyup.finite import check_map
from anyup.ops.precision import FLOATING, check_dense

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError naming the map, its image and its first channel where it holds a NaN or an infinity.

    A NaN in a feature map spreads over the whole image through the global normalisations of the upsampler.
    Values are looked at on CPU tensors only, and never while a graph is compiled. ``tensor``: (B, C, h, w).
    """
    if not torch.compiler.is_compiling() and tensor.device.type == "cpu":
        check_map(tensor, name)


@dataclass(frozen=True)
class Layer:
    """A layer whose output an encoder can give.

    Attributes:
        name: what stands behind the colon of the encoder's name.
        channels: of its features.
        stride: pixels of one of its cells.
    """

    name: str
    channels: int
    stride: int


class Encoder(nn.Module):
    """A network that turns a normalised image (B, 3, H, W) into features (B, C, h, w).

    Attributes: ``name``; ``channels``, the C of the features; ``stride``, the pixels of one feature cell;
    ``patch_size``, whose multiples the height and the width must be (None: any size); ``mean`` and ``std`` of
    the normalisation that the network was trained with, per channel of an RGB image in 0..1. Subclasses
    implement `features`.
    """

    def __init__(
        self,
        name: str,
        *,
        channels: int,
        stride: int,
        patch_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        layers: Sequence[tuple[int, int]] = (),  # channels and stride of each, counted from 0
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self.stride = stride
        self.patch_size = patch_size
        self.mean = mean
        self.std = std
        self._layers = [Layer(str(number), *size) for number, size in enumerate(layers)]

    def list_layers(self) -> list[Layer]:
        """The layers among which its name, or an argument of what builds it, chooses; empty where it has one alone."""
        return list(self._layers)

    def normalize(self, rgb01: Tensor) -> Tensor:
        """Normalise an RGB image (B, 3, H, W) with values in 0..1 as this network wants it.

        Keeps shape and dtype. Raises TypeError for integers, ValueError for another shape or (on the CPU)
        values far outside 0..1.
        """
        self._check_image(rgb01, "rgb01")
        if not torch.compiler.is_compiling() and rgb01.device.type == "cpu":
            low, high = (float(v) for v in torch.aminmax(rgb01))
            if low < -0.5 or high > 1.5:
                raise ValueError(f"rgb01: expected an image with values in 0..1, got values from {low:g} to {high:g}")
        mean = torch.tensor(self.mean, dtype=rgb01.dtype, device=rgb01.device)[:, None, None]
        std = torch.tensor(self.std, dtype=rgb01.dtype, device=rgb01.device)[:, None, None]
        return (rgb01 - mean) / std

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, C, h, w) of a normalised image (B, 3, H, W), in the dtype of the network.

        Raises TypeError for integers; ValueError for another shape, for sides that are no multiple of the
        patch, and (on the CPU) for a NaN or an infinity, naming the map that holds it.
        """
        self._check(image)
        features = self.features(image)
        require_finite(features, f"{self.name}: features")
        return features

    def with_class_token(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) and the class token (B, C) of a normalised image (B, 3, H, W), both of one pass.

        Raises ValueError for a network without a class token, and otherwise what `forward` raises.
        """
        self._check(image)
        tokens = self.tokens(image)
        grid = (image.shape[2] // self.stride, image.shape[3] // self.stride)
        features, token = tokens_to_map(tokens, grid, self.name), tokens[:, 0]
        require_finite(features, f"{self.name}: features")
        return features, token

    def features(self, image: Tensor) -> Tensor:
        """Run the network: (B, 3, H, W), checked and normalised, to (B, C, h, w)."""
        raise NotImplementedError

    def tokens(self, image: Tensor) -> Tensor:
        """Run a transformer: (B, 3, H, W), checked and normalised, to its tokens (B, 1 + h * w, C), class token first.

        Raises ValueError for a network without a class token.
        """
        raise ValueError(f"{self.name}: expected a network with a class token, got {type(self).__name__}")

    def extra_repr(self) -> str:
        """The line that ``print`` shows."""
        size = f"channels={self.channels}, stride={self.stride}, patch_size={self.patch_size}"
        return f"name={self.name!r}, {size}"

    def _check(self, image: Tensor) -> None:
        self._check_image(image, "image")
        self._check_size(image)
        require_finite(image, f"{self.name}: image")

    def _check_image(self, image: Tensor, argument: str) -> None:
        check_dense(argument, image)
        if image.dtype not in FLOATING:
            raise TypeError(f"{argument}: expected floating point values of 16, 32 or 64 bits, got {image.dtype}")
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"{argument}: expected a non-empty (B, 3, H, W) tensor, got {tuple(image.shape)}")

    def _check_size(self, image: Tensor) -> None:
        patch = self.patch_size
        if patch is None:
            return
        height, width = image.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"image: {self.name} works on patches of {patch} pixels; expected height and width to be "
                f"multiples of {patch}, got {height} x {width}. "
                f"Nearest: height {_nearest(height, patch)}, width {_nearest(width, patch)}"
            )


def tokens_to_map(tokens: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Lay the patch tokens (B, N, C) out as (B, C, h, w); tokens before them (class, registers) are dropped.

    Raises ValueError where there are fewer tokens than cells.
    """
    height, width = grid
    extra = tokens.shape[1] - height * width
    if extra < 0:
        raise ValueError(f"{name}: {tokens.shape[1]} tokens do not fill a grid of {height} x {width}")
    return tokens[:, extra:].mT.unflatten(2, (height, width)).contiguous()


def _nearest(size: int, patch: int) -> str:
    """The multiples of the patch on either side of a size, in words."""
    below = size // patch * patch
    if below == size:
        return str(size)
    return f"{below} or {below + patch}" if below else str(patch)
