"""How well held-out photographs are upsampled, beside bilinear and nearest interpolation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.images import normalize_imagenet
from anyup.model import AnyUp
from anyup.ops.feature_distance import feature_distance
from anyup.training.samples import FeatureSource

Method = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Score:
    """Means over photographs and crops: 1 - cosine similarity, and the min-max normalised squared error."""

    distance: float
    error: float


def validate(upsampler: AnyUp, source: FeatureSource, paths: Sequence[Path], device: torch.device) -> dict[str, Score]:
    """The upsampler's score for each encoder of the source, on the central view and all crops of its pool."""

    def upsample(guidance: Tensor, low: Tensor, side: int) -> Tensor:
        result: Tensor = upsampler(guidance, low, (side, side))
        return result

    training = upsampler.training
    upsampler.eval()
    try:
        return {name: _score(upsample, name, source, paths, device) for name in source.grids}
    finally:
        upsampler.train(training)


def baselines(source: FeatureSource, paths: Sequence[Path]) -> dict[str, dict[str, Score]]:
    """For each encoder, the scores of "bilinear" and "nearest"."""

    def bilinear(guidance: Tensor, low: Tensor, side: int) -> Tensor:
        return F.interpolate(low, (side, side), mode="bilinear", align_corners=False)

    def nearest(guidance: Tensor, low: Tensor, side: int) -> Tensor:
        return F.interpolate(low, (side, side), mode="nearest-exact")

    device = torch.device("cpu")
    methods: dict[str, Method] = {"bilinear": bilinear, "nearest": nearest}
    return {
        name: {method: _score(run, name, source, paths, device) for method, run in methods.items()}
        for name in source.grids
    }


@torch.no_grad()
def _score(run: Method, encoder: str, source: FeatureSource, paths: Sequence[Path], device: torch.device) -> Score:
    recipe, side = source.recipe, source.grids[encoder].image
    size = max(source.input_sizes[encoder])
    sums = torch.zeros(2, dtype=torch.float64)
    for path in paths:
        guidance = normalize_imagenet(source.guidance(path, 0)[None].float() / 255).to(device)
        features = source.features(path, encoder, 0, size, range(recipe.crops))
        targets = features.targets[None].to(device)
        out = run(guidance, features.low[None].to(device), side)
        sums += torch.cat(feature_distance(out, targets, features.places[None].to(device))).double().cpu()
    distance, error = (sums / len(paths)).tolist()
    return Score(distance, error)
