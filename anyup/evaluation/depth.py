"""Depth by Probe3D's protocol: heads, loss and metrics, as functions of maps.

Depth is in metres; a target of 0 (or beyond the largest depth, which its reader sets to 0) is unknown and counts for
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyup.evaluation.attention_weights import some_tiles

BINS, SMALLEST, LARGEST = 256, 0.001, 10.0
METRICS = ("delta1", "delta2", "delta3", "rmse")
_OFFSET = 0.1  # of a bin after its ReLU, so that their sum is never zero
_EPSILON = 0.001  # metres, added within logarithms
_LEAST = 1e-12  # of what a root is taken of: at a perfect fit its gradient would be infinite


def depth_of_bins(logits: Tensor, largest: float = LARGEST) -> Tensor:
    """Depth as the mean of bins that are spread evenly over SMALLEST to `largest`, weighted by relu(logits) + 0.1.

    logits (N, bins, pixels) to (N, 1, pixels).
    """
    moments = _moments(logits, largest)
    sums = moments @ logits.relu() + _OFFSET * moments.sum(dim=1)[:, None]
    return sums[:, 1:] / sums[:, :1]


class CarriedDepth(torch.autograd.Function):
    """`depth_of_bins` of logits that are carried to pixels, without the logits of all pixels at once.

    `near` (tiles, bins, keys) and `weights` (tiles, pixels, keys), whose product over the keys are the logits, give
    (tiles, 1, pixels). The logits are made for some tiles at a time, so that they stay in a processor's cache, and
    again in the backward pass. The weights have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, near: Tensor, weights: Tensor, largest: float) -> Tensor:
        moments = _moments(near, largest)
        sums = torch.cat([moments @ logits.relu_() for _, logits in some_tiles(near, weights)])
        sums += _OFFSET * moments.sum(dim=1)[:, None]
        shares, result = sums[:, :1], sums[:, 1:] / sums[:, :1]
        ctx.save_for_backward(near, weights, shares, result)
        ctx.largest = largest
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        near, weights, shares, depth = ctx.saved_tensors
        bins = _moments(near, ctx.largest)[1][:, None]
        found = torch.empty_like(near, memory_format=torch.contiguous_format)
        keys = near.shape[2]
        for tiles, logits in some_tiles(near, weights):
            # The depth's derivative by an active bin's logit is (bin - depth) over the sum of the shares: a matrix of
            # zeros and ones, of the active bins, times what pixels alone decide.
            over_sum = (gradient[tiles] / shares[tiles]).transpose(1, 2)
            by_pixel = weights[tiles] * over_sum
            both = logits.gt_(0) @ torch.cat([by_pixel, by_pixel * depth[tiles].transpose(1, 2)], dim=2)
            torch.addcmul(both[..., keys:].neg(), bins, both[..., :keys], out=found[tiles])
        return found, None, None


def _moments(like: Tensor, largest: float) -> Tensor:
    """(2, bins), for what has as many bins in its second dimension: ones, and the bins' depths.

    Their product with a pixel's shares of the bins is the sum of its shares, and that of its shares' depths.
    """
    bins = torch.linspace(SMALLEST, largest, like.shape[1], dtype=like.dtype, device=like.device)
    return torch.stack([torch.ones_like(bins), bins])


def depth_of_sigmoid(logits: Tensor, largest: float = LARGEST) -> Tensor:
    """Depth between SMALLEST and `largest`, of any shape: the direct head, one output a pixel."""
    return SMALLEST + (largest - SMALLEST) * logits.sigmoid()


def depth_loss(prediction: Tensor, target: Tensor, *, published_gradient: bool = False) -> Tensor:
    """10 times the scale-invariant loss and half the gradient loss: (N,) of predictions (N, B, H, W), target (B, H, W).

    A known pixel at least is expected. `published_gradient`: see `gradient_loss`.
    """
    return 10 * scale_invariant_loss(prediction, target) + 0.5 * gradient_loss(
        prediction, target, published=published_gradient
    )


def _log_ratio(prediction: Tensor, target: Tensor) -> Tensor:
    """log(d + 0.001) - log(t + 0.001) where the target is known, else 0."""
    known = target > 0
    ratio = torch.log(prediction + _EPSILON) - torch.log(torch.where(known, target, 1) + _EPSILON)
    return ratio.masked_fill(~known, 0)


def scale_invariant_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """sqrt(mean(g^2) - 0.85 mean(g)^2), g the log ratio, over all known pixels of a batch.

    Predictions (N, B, H, W), target (B, H, W) to (N,).
    """
    ratio = _log_ratio(prediction, target).flatten(1)
    known = (target > 0).sum()
    mean, square = ratio.sum(dim=1) / known, ratio.square().sum(dim=1) / known
    return (square - 0.85 * mean.square()).clamp(min=_LEAST).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor, *, published: bool = False) -> Tensor:
    """Differences of the log ratio between pixels two apart, along both axes, where both are known.

    Predictions (N, B, H, W), target (B, H, W) to (N,): summed over the whole map and every second, fourth and sixth
    pixel of it, each divided by how many of its pixels are known.

    `published`: Probe3D's code before November 2025 took the axes of the batch and of the channel, of which there is
    one, for those of the map: it compares images two apart in the batch, and no neighbours.
    """
    axes = (1,) if published else (2, 3)
    total = prediction.new_zeros(len(prediction))
    for stride in (1, 2, 4, 6):
        thinned, truth = prediction, target
        for axis in axes:
            kept = torch.arange(0, prediction.shape[axis], stride, device=prediction.device)
            thinned, truth = thinned.index_select(axis, kept), truth.index_select(axis - 1, kept)
        ratio, known = _log_ratio(thinned, truth), truth > 0
        count = known.sum().clamp(min=1)
        for axis in axes:
            apart = ratio.shape[axis] - 2
            if apart > 0:
                both = known.narrow(axis - 1, 0, apart) & known.narrow(axis - 1, 2, apart)
                difference = (ratio.narrow(axis, 0, apart) - ratio.narrow(axis, 2, apart)).abs()
                total = total + (difference * both).flatten(1).sum(dim=1) / count
    return total


def scaled_and_shifted(prediction: Tensor, target: Tensor) -> Tensor:
    """The prediction times a scale plus a shift, of least squares over the known pixels; both (H, W).

    A prediction of one value has no scale: it is shifted to the target's mean.
    """
    known = target > 0
    of, to = prediction[known].double(), target[known].double()
    centred = of - of.mean()
    energy = centred.square().sum()
    scale = (centred * to).sum() / energy if float(energy) > 0 else torch.ones_like(energy)
    return (prediction.double() - of.mean()) * scale + to.mean()


def relative_depth(depth: Tensor) -> Tensor:
    """Of an image's depth (H, W), 0 unknown: from 0.01 at its nearest known point to 1 at its farthest, 0 unknown.

    As Probe3D has it for objects, whose depth varies by less than they are away. Depths that differ by less than 10 mm
    in all are not stretched to the whole range.
    """
    known = depth > 0
    if not known.any():
        return depth
    nearest = depth[known].min()
    share = (depth - nearest) / (depth.max() - nearest).clamp(min=0.01)
    return torch.where(known, (0.01 + 0.99 * share).clamp(max=1), 0)


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Of one image, over the known pixels of (H, W): `delta1` to `delta3`, the shares of pixels whose depth is wrong by
    a factor below 1.25, 1.25^2 and 1.25^3, and `rmse` in metres. Summed in float64."""
    known = target > 0
    of, to = prediction[known].double(), target[known].double()
    # What is not positive, as after a shift, is wrong by any factor.
    factor = torch.where(of > 0, torch.maximum(of / to, to / of), torch.inf)
    shares = {f"delta{power}": float((factor < 1.25**power).double().mean()) for power in (1, 2, 3)}
    return {**shares, "rmse": float((of - to).square().mean().sqrt())}
