"""A 3x3 convolution with 16 products where its definition has 36: Winograd's F(2x2, 3x3).

Four pixels of the output, 2 x 2, see 4 x 4 pixels of the input. Sums and differences of these, and of the nine taps,
turn the convolution into 16 products over the channels alone (Lavin and Gray, Fast Algorithms for Convolutional Neural
Networks, CVPR 2016, section 4.1). A product's sum is no longer than the channels, so that in float32 the result is
about as exact as that of nine products, one for each tap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""What the three taps along an axis become."""


class WinogradConvolution:
    """The cross-correlation of padded pixels with a weight (Cout, Cin, 3, 3), for work that does not differentiate."""

    def __init__(self, weight: Tensor) -> None:
        taps = torch.tensor(_TAPS, dtype=torch.float64, device=weight.device)
        weights = torch.einsum("cb,ra,oiab->crio", taps, taps, weight.double())
        weights[3].neg_()  # so that its product is added to another
        self._weights = weights.to(weight.dtype).contiguous()

    def __call__(self, padded: Tensor) -> Tensor:
        """(H + 2, W + 2, Cin) in the weight's dtype to (H, W, Cout)."""
        height, width = (length - 2 for length in padded.shape[:2])
        if height % 2 or width % 2:
            padded = F.pad(padded, (0, 0, 0, width % 2, 0, height % 2))
        first, second, third, fourth = _neighbours(padded, 0)
        by_row = torch.stack((first - third, second + third, third - second, second - fourth))
        first, second, third, fourth = _neighbours(by_row, 2)
        pairs = first.shape[1:3]  # of rows, of columns
        weights = self._weights
        left, right = (second + third).flatten(1, 2) @ weights[1], (third - second).flatten(1, 2) @ weights[2]
        by_column = torch.stack((left + right, left.sub_(right)))  # (2 columns, 4 rows, pairs, Cout)
        by_column[0].baddbmm_((first - third).flatten(1, 2), weights[0])
        by_column[1].baddbmm_((second - fourth).flatten(1, 2), weights[3])
        first, second, third, fourth = by_column.unbind(1)
        out = torch.stack(((first + second).add_(third), (second - third).sub_(fourth)))  # (2 rows, 2 columns, ...)
        out = out.unflatten(2, pairs).permute(2, 0, 3, 1, 4)
        return out.flatten(0, 1).flatten(1, 2)[:height, :width]


def _neighbours(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Each four neighbours along an axis of even length, from every second one on."""
    pairs = x.unflatten(dim, (-1, 2))
    near, beyond = (pairs.narrow(dim, start, pairs.shape[dim] - 1) for start in (0, 1))
    return *near.unbind(dim + 1), *beyond.unbind(dim + 1)
