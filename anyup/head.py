"""A linear head applied before the upsampling instead of after it: the same result, for less work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyup.image_context import ImageContext
from anyup.model import AnyUp
from anyup.ops.precision import FLOATING

if TYPE_CHECKING:
    from anyup.limited_memory.stream import Stream


class WithHead(nn.Module):
    """An upsampler that returns `head(features)` at the output's resolution.

    The attention's weights sum to one at each pixel, so a linear head with its bias commutes with the upsampling:
    the head runs on the small grid, and only its outputs are carried.
    """

    def __init__(self, upsampler: AnyUp, head: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        if not isinstance(upsampler, AnyUp):
            raise TypeError(f"upsampler: expected an AnyUp, got {type(upsampler).__name__}")
        self.upsampler = upsampler
        self.head = head

    def forward(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: Sequence[int] | None = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
        *,
        max_memory: float | str | None = None,
        out: Any = None,
    ) -> Tensor:
        """(B, 3, Hi, Wi), (B, C, h, w) -> (B, head's outputs, H, W), in the head's output dtype.

        `image` may also be a context of `encode_image`. The other arguments are those of the upsampler's call.
        """
        self.upsampler.check(image, features, output_size=output_size, q_chunk_size=q_chunk_size)
        logits = self.logits(features)
        return self.upsampler(
            image, features, output_size, vis_attn, q_chunk_size, values=logits, max_memory=max_memory, out=out
        )

    def stream(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> Stream:
        """The head's outputs piece by piece, with the settings of `AnyUp.stream`, except `values`.

        Raises TypeError for `values`, and what `AnyUp.stream` raises.
        """
        if "values" in settings:
            raise TypeError("values: the head's outputs are carried; call the upsampler's own stream for other values")
        self.upsampler.check(image, features, output_size=output_size)
        return self.upsampler.stream(image, features, output_size, values=self.logits(features), **settings)

    def logits(self, features: Tensor) -> Tensor:
        """The head's outputs on the features' grid: (B, C, h, w) -> (B, head's outputs, h, w), in the head's dtype.

        Raises ValueError or TypeError for another number of channels, another device or dtype than the head's.
        """
        channels = self.head.in_features if isinstance(self.head, nn.Linear) else self.head.in_channels
        if features.shape[1] != channels:
            raise ValueError(f"features: expected the head's {channels} channels, got shape {tuple(features.shape)}")
        if features.device != self.head.weight.device:
            raise ValueError(f"features: expected the head's device {self.head.weight.device}, got {features.device}")
        autocasts = torch.is_autocast_enabled(features.device.type)
        if features.dtype != self.head.weight.dtype and not autocasts:
            raise TypeError(f"features: expected the head's dtype {self.head.weight.dtype}, got {features.dtype}")
        if isinstance(self.head, nn.Linear):
            logits: Tensor = self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            logits = self.head(features)
        return logits


def with_head(upsampler: AnyUp, head: nn.Conv2d | nn.Linear) -> WithHead:
    """The upsampler and a 1x1 convolution or linear layer as one module, exact and cheaper than one after the other.

    Raises:
        TypeError: a head that is neither `nn.Conv2d` nor `nn.Linear`, or not of real floating-point numbers.
        ValueError: a convolution that sees more than its pixel.
    """
    if not isinstance(head, (nn.Conv2d, nn.Linear)):
        raise TypeError(f"head: expected nn.Conv2d or nn.Linear, got {type(head).__name__}")
    if head.weight.dtype not in FLOATING:
        raise TypeError(f"head: expected floating-point weights of 16, 32 or 64 bits, got {head.weight.dtype}")
    if isinstance(head, nn.Conv2d) and (
        head.kernel_size != (1, 1) or head.stride != (1, 1) or head.padding not in ((0, 0), "valid", "same")
    ):
        raise ValueError(f"head: expected a 1x1 convolution of stride 1 without padding, got {head}")
    return WithHead(upsampler, head)
