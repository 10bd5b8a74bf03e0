"""What the making of keys takes: its problem and its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend
from anyup.ops.feature_unification.arguments import FeatureUnificationProblem
from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters, PixelEncoderProblem

_BLOCK = len(BlockParameters._fields)


class KeyParameters(NamedTuple):
    """All that turns features (B, C, h, w) and image keys (B, h, w, D) into the attention's keys (B, h, w, D)."""

    basis: Tensor  # (D, 1, s, s), of the unification
    features: EncoderParameters  # the blocks of the unified features
    convolution: Tensor  # (D, 2 D, 3, 3), of the image's and the features' keys, whose border is reflected
    aggregation: EncoderParameters  # the blocks behind it
    gain: Tensor  # (D,), of the RMS normalisation
    weight: Tensor  # (D, D), of the projection
    bias: Tensor  # (D,)

    def flat(self) -> list[Tensor]:
        """As an operator takes them."""
        blocks = (*self.features.block1, *self.features.block2, *self.aggregation.block1, *self.aggregation.block2)
        return [*blocks, self.basis, self.convolution, self.gain, self.weight, self.bias]

    @staticmethod
    def of(flat: list[Tensor]) -> KeyParameters:
        """The inverse of `flat`."""
        blocks = [BlockParameters(*flat[_BLOCK * number :][:_BLOCK]) for number in range(4)]
        basis, convolution, gain, weight, bias = flat[4 * _BLOCK :]
        features, aggregation = (EncoderParameters(None, *blocks[first:][:2]) for first in (0, 2))
        return KeyParameters(basis, features, convolution, aggregation, gain, weight, bias)


@dataclass(frozen=True)
class KeyGridProblem:
    """Everything a backend needs to know to say whether it can make keys: the operations that it would stand for.

    Attributes:
        unification, blocks: their problems.
        unification_backend, blocks_backend: what was asked for of them.
        device: of the tensors.
    """

    unification: FeatureUnificationProblem
    blocks: PixelEncoderProblem
    unification_backend: Backend
    blocks_backend: Backend
    device: torch.device

    def __str__(self) -> str:
        return str(self.unification)


def describe(
    features: Tensor,
    parameters: KeyParameters,
    *,
    dtype: torch.dtype,
    needs_gradient: bool,
    unification_backend: Backend = None,
    blocks_backend: Backend = None,
) -> KeyGridProblem:
    """The problem that these tensors pose, where keys are made in a dtype."""
    batch, channels, *grid = features.shape
    filters, _, size, _ = parameters.basis.shape
    height, width = grid
    common: dict[str, Any] = {
        "batch": batch,
        "dtype": dtype,
        "device": features.device,
        "needs_gradient": needs_gradient,
    }
    return KeyGridProblem(
        FeatureUnificationProblem(
            grid_size=(height, width), channels=channels, filters=filters, kernel_size=size, **common
        ),
        PixelEncoderProblem(
            size=(height, width),
            output_size=(height, width),
            input_dim=filters,
            dim=len(parameters.gain),
            rotates=False,
            **common,
        ),
        unification_backend,
        blocks_backend,
        features.device,
    )
