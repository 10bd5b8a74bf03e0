"""One forward pass of the training: the upsampler and the terms of its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.model import AnyUp
from anyup.ops.feature_distance import feature_distance
from anyup.training.config import Loss
from anyup.training.losses import squared_error
from anyup.training.samples import Batch


class Objective(nn.Module):
    """The upsampler with its loss: one module, so that an engine for several processes sees one forward pass."""

    def __init__(self, upsampler: AnyUp, loss: Loss) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.loss = loss
        terms = {
            "cosine": 1.0,
            "mse": 1.0,
            "input": loss.input_consistency,
            "place": loss.place,
            "self": loss.self_consistency,
        }
        self.names = (*(name for name, weight in terms.items() if weight), "loss")

    def forward(self, batch: Batch, images: float, augmented: float) -> dict[str, Tensor]:
        """The terms of the loss of a batch, weighted, and their sum under "loss".

        `images` and `augmented` are what the sums over the batch's images are divided by: the numbers of the whole
        step, where a batch is a part of it.
        """
        loss = self.loss
        out, carried = self._upsample(batch)
        cosine, error = feature_distance(out, batch.targets, batch.places)
        terms = {"cosine": cosine.sum() * (loss.cosine / images), "mse": error.sum() * (loss.mse / images)}
        if loss.input_consistency:
            small = F.adaptive_avg_pool2d(out, (batch.low.shape[2], batch.low.shape[3]))
            terms["input"] = self._distance(small, batch.low) * (loss.input_consistency / images)
        if loss.place:
            terms["place"] = squared_error(carried, batch.known).sum() * (loss.place / images)
        if loss.self_consistency and len(batch.augmented):
            count = len(batch.augmented)
            clean = self._clean(out, batch, count)
            changed = self.upsampler(batch.augmented, batch.low[:count], clean.shape[2:])
            terms["self"] = self._distance(changed, clean) * (loss.self_consistency / augmented)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms

    def _upsample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The features and the known maps, carried by the same weights."""
        size = (batch.side, batch.side)
        if not batch.known.shape[1]:
            return self.upsampler(batch.guidance, batch.low, size), batch.known
        known = F.adaptive_avg_pool2d(batch.known, (batch.low.shape[2], batch.low.shape[3]))
        out: Tensor = self.upsampler(batch.guidance, batch.low, size, values=torch.cat((batch.low, known), 1))
        channels = batch.low.shape[1]
        return out[:, :channels], out[:, channels:]

    def _clean(self, out: Tensor, batch: Batch, count: int) -> Tensor:
        """What the maps of the augmented guidance are held against; no gradient flows there."""
        side = self.loss.self_consistency_size
        if side in (0, out.shape[2]):
            return out[:count].detach()
        with torch.no_grad():
            clean: Tensor = self.upsampler(batch.guidance[:count], batch.low[:count], (side, side))
        return clean

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Both distances of maps, weighted, summed over the images."""
        cosine, error = feature_distance(prediction, target)
        return (cosine * self.loss.cosine + error * self.loss.mse).sum()
