"""The upsamplings that the self-consistency compares, beside that of a batch: what they share is made once.

Both guidance images of a sample go through the encoders in one batch. The features' part of the keys depends on no
guidance, and the clean half differs from the batch's own result in its size alone: it has the same encoded pixels and
the same keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.model import AnyUp
from anyup.ops import memory
from anyup.ops.pixel_encoder.cells import averaged
from anyup.ops.query_projection import project_queries
from anyup.training.samples import Batch


def upsampled(upsampler: AnyUp, batch: Batch, values: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's values at its own size, and the features of its first images at another, clean and augmented.

    Args:
        upsampler: what is trained.
        batch: of B samples, of which the first A have augmented guidance; A is not 0.
        values: (B, Cv, h, w), the features and what is carried with their weights.
        side: of the second size, in pixels.

    Returns:
        (B, Cv, batch.side, batch.side); and (A, C, side, side) twice, the clean one without a gradient.
    """
    samples, count = len(batch.guidance), len(batch.augmented)
    images, own, other = torch.cat((batch.guidance, batch.augmented)), (batch.side, batch.side), (side, side)
    with memory.reuse(), upsampler.threads_for(images, max(own, other), values):
        guidance = upsampler.guidance(images)
        image_keys = upsampler.encode(upsampler.key_encoder, guidance, (batch.low.shape[2], batch.low.shape[3]))
        pooled = own if own == other else None
        encoded = upsampler.encode(upsampler.query_encoder, guidance, pooled)
        del guidance
        keys = upsampler.keys(image_keys, batch.low)[0].to(encoded.dtype)
        parameters = upsampler.cross_decode.query_parameters(encoded.dtype)

        def attended(encoded: Tensor, keys: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
            backend = upsampler.backends["query_projection"]
            queries = project_queries(averaged(encoded, size), parameters, backend=backend)
            return upsampler.attend(upsampler.cross_decode.split_heads(queries), keys, values)

        # Not slices, whose gradients would be maps of the whole batch.
        maps, grids = encoded.split((samples, count)), keys.split((samples, count))
        low = batch.low[:count]
        out = attended(maps[0], grids[0], values, own)
        changed = attended(maps[1], grids[1], low, other)
        if own == other:
            return out, out[:count, : low.shape[1]].detach(), changed
        with torch.no_grad():
            clean = attended(maps[0][:count], grids[0][:count], low, other)
    return out, clean, changed
