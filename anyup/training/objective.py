"""One forward pass of the training: the upsampler and the terms of its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.model import AnyUp
from anyup.ops.dispatch import Backend, preferring
from anyup.ops.feature_distance import feature_distance
from anyup.training.config import Loss
from anyup.training.losses import squared_error
from anyup.training.samples import Batch
from anyup.training.shared_passes import upsampled


class Objective(nn.Module):
    """The upsampler with its loss: one module, so that an engine for several processes sees one forward pass.

    A `backend` is preferred for the distances, as the upsampler prefers it for its operations.
    """

    def __init__(self, upsampler: AnyUp, loss: Loss, backend: Backend = None) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.loss = loss
        self._backend = preferring(backend)
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
        values = batch.low
        if batch.known.shape[1]:
            known = F.adaptive_avg_pool2d(batch.known, (batch.low.shape[2], batch.low.shape[3]))
            values = torch.cat((values, known), 1)
        compared = bool(loss.self_consistency and len(batch.augmented))
        if compared:
            whole, clean, changed = upsampled(self.upsampler, batch, values, loss.self_consistency_size or batch.side)
        else:
            whole = self.upsampler(batch.guidance, batch.low, (batch.side, batch.side), values=values)
        # What is known at every pixel is carried with the features' weights.
        channels = (batch.low.shape[1], batch.known.shape[1])
        out, carried = whole.split(channels, dim=1) if channels[1] else (whole, batch.known)
        cosine, error = feature_distance(out, batch.targets, batch.places, backend=self._backend)
        terms = {"cosine": cosine.sum() * (loss.cosine / images), "mse": error.sum() * (loss.mse / images)}
        if loss.input_consistency:
            small = F.adaptive_avg_pool2d(out, (batch.low.shape[2], batch.low.shape[3]))
            terms["input"] = self._distance(small, batch.low) * (loss.input_consistency / images)
        if loss.place:
            terms["place"] = squared_error(carried, batch.known).sum() * (loss.place / images)
        if compared:
            terms["self"] = self._distance(changed, clean) * (loss.self_consistency / augmented)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Both distances of maps, weighted, summed over the images."""
        cosine, error = feature_distance(prediction, target, backend=self._backend)
        return (cosine * self.loss.cosine + error * self.loss.mse).sum()
