"""Which samples a step takes, and the tensors that they become.

A sample's photograph follows from its number: each epoch is one pass over the photographs in an order of its own.
Its view, crops and augmentation are drawn for its number, and a step's encoder for the step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.images import normalize_imagenet, resize
from anyup.training.augmentations import augment
from anyup.training.config import Settings
from anyup.training.feature_augmentations import TURNS, draw_channels, recolour, turn, turn_places
from anyup.training.feature_cache import Features, Grid, Recipe
from anyup.training.position_targets import position_maps
from anyup.training.randomness import drawer
from anyup.training.synthetic import draw_cells, draw_width, synthetic_features

SYNTHETIC = "synthetic"
"""In place of an encoder's name; see `anyup.training.synthetic`."""


class FeatureSource(Protocol):
    """Where views and features come from: the cache, or the encoders at work."""

    recipe: Recipe
    grids: dict[str, Grid]
    input_sizes: dict[str, list[int]]
    views: int  # of a photograph
    crops: int  # of a view

    def usable(self, path: Path) -> bool: ...

    def guidance(self, path: Path, view: int) -> Tensor: ...

    def features(self, path: Path, encoder: str, view: int, input_size: int, crops: Sequence[int]) -> Features: ...


@dataclass(frozen=True)
class Sample:
    """A view of a photograph, and some crops of its pool."""

    number: int
    photograph: int
    view: int
    crops: tuple[int, ...]
    augmented: bool  # whether the self-consistency is asked of it
    turn: int = 0  # of `anyup.training.feature_augmentations.turn`
    recoloured: bool = False


@dataclass(frozen=True)
class Step:
    """What one step of the optimizer learns from.

    The `input_size` of synthetic features is in cells; of others, in pixels.
    """

    encoder: str
    input_size: int
    guidance_size: int
    samples: tuple[Sample, ...]
    number: int = 0
    smallest_share: float = 1.0  # of the encoder's channels that it takes
    known: bool = False  # whether maps known at every pixel are carried too


@dataclass(frozen=True)
class Batch:
    """The tensors of some samples: `guidance` (B, 3, G, G) and `augmented` (A, 3, G, G), of the first A of them,
    normalised; `low` (B, C, h, w); `targets` (B, K, C, hc, wc) at `places` (B, K, 2) of the (`side`, `side`) output;
    `known` (B, M, side, side), where M may be 0.
    """

    guidance: Tensor
    augmented: Tensor
    low: Tensor
    targets: Tensor
    places: Tensor
    known: Tensor
    side: int

    def to(self, device: torch.device) -> Batch:
        """With the tensors on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from while the host goes on."""
        return self._with(torch.Tensor.pin_memory)

    def copied_to(self, device: torch.device) -> Batch:
        """With tensors of its own on a device."""
        return self._with(lambda tensor: tensor.to(device, copy=True))

    def copy_(self, other: Batch) -> None:
        """Overwrite the tensors with those of a batch with the same `layout`, while the host goes on."""
        for own, given in zip(self.tensors().values(), other.tensors().values(), strict=True):
            own.copy_(given, non_blocking=True)

    @property
    def layout(self) -> Hashable:
        """What batches have in common that differ in numbers alone."""
        return (self.side, *((tuple(tensor.shape), tensor.dtype) for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _with(self, changed: Callable[[Tensor], Tensor]) -> Batch:
        made: dict[str, Any] = {name: changed(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **made)


def plan(settings: Settings, source: FeatureSource, photographs: int, number: int, first_sample: int) -> Step:
    """Step number `number`, whose samples are counted from `first_sample`."""
    draw = drawer(settings.seed, "step", number)
    encoders = list(settings.encoders)
    if settings.draw == "stride":
        stride = draw.choice(sorted({source.grids[name].stride for name in encoders}))
        encoders = [name for name in encoders if source.grids[name].stride == stride]
    encoder = draw.choice(encoders)
    input_size = draw.choice(source.input_sizes[encoder])
    guidance_size = settings.guidance.size(number)
    if draw.random() < settings.variation.synthetic:
        encoder, input_size = SYNTHETIC, draw_cells(guidance_size, settings.seed, number)
    batch = settings.optimizer.batch
    share = settings.loss.self_consistency_share if settings.loss.self_consistency else 0
    consistent = math.ceil(batch * share)
    return Step(
        encoder,
        input_size,
        guidance_size,
        tuple(_sample(settings, source, photographs, first_sample + i, i < consistent) for i in range(batch)),
        number,
        settings.variation.channels,
        settings.loss.place > 0,
    )


def _sample(settings: Settings, source: FeatureSource, photographs: int, number: int, augmented: bool) -> Sample:
    epoch, position = divmod(number, photographs)
    draw = drawer(settings.seed, "sample", number)
    view = draw.randrange(source.views)
    crops = tuple(draw.sample(range(source.crops), settings.data.crops_per_sample))
    variation = settings.variation
    return Sample(
        number,
        _order(settings.seed, epoch, photographs)[position],
        view,
        crops,
        augmented,
        draw.randrange(TURNS) if variation.turns else 0,
        draw.random() < variation.recolour,
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, photographs: int) -> list[int]:
    order = list(range(photographs))
    drawer(seed, "epoch", epoch).shuffle(order)
    return order


def assemble(step: Step, samples: Sequence[Sample], source: FeatureSource, paths: Sequence[Path], seed: int) -> Batch:
    """The tensors of some of a step's samples; those to be augmented come first."""
    samples = sorted(samples, key=lambda sample: not sample.augmented)
    chosen = [_usable(source, paths, sample.photograph) for sample in samples]
    pixels = [turn(source.guidance(path, s.view), s.turn) for path, s in zip(chosen, samples, strict=True)]
    size = (step.guidance_size, step.guidance_size)
    clean = resize(torch.stack(pixels).float() / 255, size)
    clean = torch.stack(
        [
            recolour(image, seed, sample.number) if sample.recoloured else image
            for image, sample in zip(clean, samples, strict=True)
        ]
    )
    changed = [
        augment((image * 255).round().to(torch.uint8), seed, sample.number)
        for image, sample in zip(clean, samples, strict=True)
        if sample.augmented
    ]
    guidance = normalize_imagenet(clean)
    if step.encoder == SYNTHETIC:
        features, side = _synthetic(step, samples, guidance, seed), step.guidance_size
    else:
        features, side = _encoded(step, samples, source, chosen, seed), source.grids[step.encoder].image
    return Batch(
        guidance,
        normalize_imagenet(torch.stack(changed)) if changed else clean.new_empty(0, *clean.shape[1:]),
        features.low,
        features.targets,
        features.places,
        _known(step, samples, guidance, features.low.shape[2], side, seed),
        side,
    )


def _encoded(
    step: Step, samples: Sequence[Sample], source: FeatureSource, paths: Sequence[Path], seed: int
) -> Features:
    """The features of the samples by the step's encoder, each tensor with a first axis for the sample."""
    grid = source.grids[step.encoder]
    features = [
        _turned(source.features(path, step.encoder, s.view, step.input_size, s.crops), s.turn, grid)
        for path, s in zip(paths, samples, strict=True)
    ]
    low, targets, places = (torch.stack([getattr(f, name) for f in features]) for name in ("low", "targets", "places"))
    if step.smallest_share < 1:
        channels = draw_channels(low.shape[1], step.smallest_share, drawer(seed, "channels", step.number))
        low, targets = low[:, channels], targets[:, :, channels]
    return Features(low, targets, places)


def _synthetic(step: Step, samples: Sequence[Sample], guidance: Tensor, seed: int) -> Features:
    """The same of features made of the guidance: the whole map is the one crop."""
    channels = draw_width(seed, step.number)
    made = [synthetic_features(image, channels, seed, s.number) for image, s in zip(guidance, samples, strict=True)]
    targets = torch.stack(made)
    low = F.adaptive_avg_pool2d(targets, step.input_size)
    return Features(low, targets[:, None], torch.zeros(len(samples), 1, 2, dtype=torch.long))


def _known(step: Step, samples: Sequence[Sample], guidance: Tensor, cells: int, side: int, seed: int) -> Tensor:
    """The maps of the samples that are known at every pixel, each sample's drawn for its number."""
    if not step.known:
        return guidance.new_empty(len(guidance), 0, side, side)
    return torch.stack(
        [
            position_maps(image, cells, side, seed, sample.number)
            for image, sample in zip(guidance, samples, strict=True)
        ]
    )


def _turned(features: Features, number: int, grid: Grid) -> Features:
    """The features of a view that is turned, as if the encoder saw the turned view as it saw the other."""
    places = turn_places(features.places, number, grid.image, grid.crop)
    return Features(turn(features.low, number), turn(features.targets, number), places)


def _usable(source: FeatureSource, paths: Sequence[Path], index: int) -> Path:
    """The photograph of that index, or the next that can be used."""
    for path in (*paths[index:], *paths[:index]):
        if source.usable(path):
            return path
    raise ValueError(f"data.photographs: none of {len(paths)} can be used")
