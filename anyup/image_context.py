"""The image's half of the work, stored so that calls with several feature maps share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyup.argument_checks import check_output_size, check_size

Weights = tuple[tuple[int, int | None], ...]
"""The identity of each parameter, and its version: how often it has been written to."""


@dataclass(frozen=True, eq=False)
class ImageContext:
    """What an upsampler has computed from an image; a call takes it instead of the image (`AnyUp.encode_image`).

    Attributes:
        image: (B, input_dim, Hi, Wi), a copy; a call with a grid that was not named encodes it once more.
        queries: (B, H, W, heads, head_dim), in the dtype that the upsampler computes in.
        image_keys: (B, h, w, D) for each grid (h, w) that was named.
        weights: the versions of the upsampler's weights at that time, as `weights_of` returns them.
    """

    image: Tensor
    queries: Tensor
    image_keys: Mapping[tuple[int, int], Tensor]
    weights: Weights

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W) of what calls with this context return."""
        return self.queries.shape[1], self.queries.shape[2]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The feature grids (h, w) whose image keys are stored."""
        return tuple(self.image_keys)

    def part(self, images: slice) -> ImageContext:
        """The context of some images of the batch; it shares their memory."""
        keys = {grid: keys[images] for grid, keys in self.image_keys.items()}
        return ImageContext(self.image[images], self.queries[images], keys, self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the context holds."""
        return sum(t.numel() * t.element_size() for t in (self.image, self.queries, *self.image_keys.values()))

    def __repr__(self) -> str:
        (height, width), batch = self.output_size, self.image.shape[0]
        grids = ", ".join(f"{h} x {w}" for h, w in self.grids) or "none"
        return f"ImageContext(batch {batch}, {height} x {width}, grids: {grids}, {self.nbytes / 1e6:.1f} MB)"

    def check(self, output_size: Any, dtype: torch.dtype, device: torch.device, weights: Weights | None) -> None:
        """Raise a ValueError or TypeError unless this context serves such a call; `weights` None: not compared."""
        size = self.output_size
        if output_size is not None:
            size = check_output_size(output_size, (self.image.shape[2], self.image.shape[3]))
        if size != self.output_size:
            raise ValueError(
                f"output_size: the context was made for {self.output_size}, got {size}; "
                "encode_image takes the output_size, leave it out here"
            )
        if self.queries.device != device:
            raise ValueError(f"image: the context is on {self.queries.device}, the model on {device}")
        if self.queries.dtype != dtype:
            raise TypeError(
                f"image: the context was computed in {self.queries.dtype}, this call computes in {dtype}; "
                "encode the image again after a change of dtype or of autocast"
            )
        if weights is None:
            return
        if [which for which, _ in weights] != [which for which, _ in self.weights]:
            raise ValueError("image: the context was made by another upsampler")
        if weights != self.weights:
            raise ValueError("image: the upsampler's weights have changed since the context was made")


def weights_of(parameters: Iterable[Tensor]) -> Weights:
    """A value that differs after an optimiser or `load_state_dict` has written to one of the parameters."""
    return tuple((id(p), None if p.is_inference() else p._version) for p in parameters)


def check_grids(grids: Any) -> list[tuple[int, int]]:
    """The distinct grids (h, w); raises a ValueError or TypeError that says what was expected."""
    if not isinstance(grids, Sequence) or isinstance(grids, str) or any(isinstance(grid, int) for grid in grids):
        raise TypeError(f"grids: expected a sequence of (height, width), got {grids!r}")
    return list(dict.fromkeys(check_size("grids", grid) for grid in grids))
