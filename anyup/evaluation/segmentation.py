"""The linear probe for segmentation, from a data set on disk to mIoU and accuracy of every method and seed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyup.encoders import Encoder
from anyup.evaluation.attention_weights import (
    AttentionWeights,
    BilinearWeights,
    FixedWeights,
    NearestWeights,
    averaged_weights,
    tile,
)
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.datasets import Labels, Sample, read_image, read_mask
from anyup.evaluation.probe import Example, Probes, Recipe, Scores, train_step
from anyup.evaluation.report import spread, table
from anyup.evaluation.upsamplers import Interpolation, Learned, Upsampler
from anyup.fingerprint import file_fingerprint, module_fingerprint
from anyup.images import complete_or_absent, normalize_imagenet
from anyup.progress import human_bytes
from anyup.tensor_files import read_torch
from anyup.training.reporting import Rate, Reporter, duration

_SHARE_OF_THE_DISK = 0.8


@dataclass
class Source:
    """What probes are trained and tested on: images, frozen encoder, frozen upsamplers, and what is kept of them.

    Attributes:
        size: side of the images and labels, in pixels; a multiple of the encoder's stride.
        cache: keeps features, and attention weights where `keep_attention`.
    """

    encoder: Encoder
    upsamplers: Sequence[Upsampler]
    labels: Labels
    size: int
    cache: TensorCache
    device: torch.device
    keep_attention: bool = False
    _images: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % self.encoder.stride:
            raise ValueError(
                f"size: a multiple of {self.encoder.name}'s stride of {self.encoder.stride} expected, got {self.size}"
            )
        self.encoder_digest = f"{self.encoder.name} {module_fingerprint(self.encoder)}"
        self.model_digests = {learned.name: module_fingerprint(learned.model) for learned in self.learned}

    @property
    def methods(self) -> list[str]:
        return [upsampler.name for upsampler in self.upsamplers]

    @property
    def learned(self) -> list[Learned]:
        return [upsampler for upsampler in self.upsamplers if isinstance(upsampler, Learned)]

    def image(self, sample: Sample, mirrored: bool = False) -> Tensor:
        """(1, 3, size, size) in 0..1."""
        image = read_image(sample, self.size)
        return image.flip(3) if mirrored else image

    def features(self, sample: Sample, mirrored: bool = False) -> Tensor:
        """(1, C, h, w) float32, on the CPU."""

        def make() -> Tensor:
            with torch.no_grad():
                image = self.image(sample, mirrored)
                return self.encoder(self.encoder.normalize(image).to(self.device)).float()

        return self.cache.get("features", self._describe(sample, mirrored), make)

    def mask(self, sample: Sample, mirrored: bool = False) -> Tensor:
        """(size, size) uint8 with VOID."""
        mask = read_mask(sample, self.labels, self.size)
        return mask.flip(1) if mirrored else mask

    def weights(self, upsampler: Learned, sample: Sample, mirrored: bool = False) -> Tensor:
        """The image's averaged attention weights, float16, on the CPU."""

        def make() -> Tensor:
            with torch.no_grad():
                image = normalize_imagenet(self.image(sample, mirrored)).to(self.device)
                features = self.features(sample, mirrored).to(self.device)
                return averaged_weights(upsampler.model, image, features, (self.size, self.size))

        cache = self.cache if self.keep_attention else TensorCache(None)
        return cache.get("attention", self._describe_attention(upsampler, sample, mirrored), make)

    def example(self, sample: Sample, mirrored: bool = False) -> Example:
        """What a step needs of an image, on the device."""
        features = self.features(sample, mirrored)
        size, grid = (self.size, self.size), (features.shape[2], features.shape[3])

        def fixed_weights(upsampler: Upsampler) -> FixedWeights:
            if isinstance(upsampler, Interpolation):
                return NearestWeights(size, grid) if upsampler.name == "nearest" else BilinearWeights(size, grid)
            weights = self.weights(upsampler, sample, mirrored).to(self.device)
            return AttentionWeights(tile(upsampler.model.window, size, grid), weights)

        weights = {upsampler.name: fixed_weights(upsampler) for upsampler in self.upsamplers}
        return Example(features.to(self.device), self.mask(sample, mirrored).to(self.device), weights)

    def make(self, sample: Sample, mirrored: bool) -> None:
        """Put into the cache what is kept of an image."""
        self.features(sample, mirrored)
        for upsampler in self.learned if self.keep_attention else ():
            self.weights(upsampler, sample, mirrored)

    def is_made(self, sample: Sample, mirrored: bool) -> bool:
        """Whether the cache has all that is kept of an image."""
        paths = [self.cache.path("features", self._describe(sample, mirrored))]
        if self.keep_attention:
            described = [self._describe_attention(upsampler, sample, mirrored) for upsampler in self.learned]
            paths += [self.cache.path("attention", description) for description in described]
        return all(path.is_file() for path in paths)

    def attention_bytes(self, samples: Sequence[Sample], flips: bool) -> int:
        """Bytes of the attention weights that training on these samples would add to the cache."""
        side = self.size // self.encoder.stride
        missing = 0
        for upsampler in self.learned:
            each = tile(upsampler.model.window, (self.size, self.size), (side, side)).count * 2
            for sample in samples:
                for mirrored in (False, True) if flips else (False,):
                    description = self._describe_attention(upsampler, sample, mirrored)
                    missing += each * (not self.cache.path("attention", description).is_file())
        return missing

    def _describe(self, sample: Sample, mirrored: bool) -> dict[str, Any]:
        if sample.image not in self._images:
            self._images[sample.image] = file_fingerprint(sample.image)
        described = {
            "photograph": self._images[sample.image],
            "encoder": self.encoder_digest,
            "short_side": self.size,
            "mirrored": mirrored,
        }
        return described | ({"as_stored": True} if sample.as_stored else {})

    def _describe_attention(self, upsampler: Learned, sample: Sample, mirrored: bool) -> dict[str, Any]:
        model = {"model": self.model_digests[upsampler.name], "arguments": upsampler.model.config}
        return self._describe(sample, mirrored) | model


def keep_attention(source: Source, samples: Sequence[Sample], flips: bool, wanted: str, reporter: Reporter) -> bool:
    """Whether attention weights are kept in the cache: as wanted, or for "auto" where they fit; tells the count."""
    if not source.learned or wanted == "recompute":
        return False
    if source.cache.folder is None:
        reporter.note("attention weights are computed anew in each epoch: --cache FOLDER would keep them")
        return False
    source.cache.folder.mkdir(parents=True, exist_ok=True)
    needed, free = source.attention_bytes(samples, flips), shutil.disk_usage(source.cache.folder).free
    keep = wanted == "keep" or needed <= _SHARE_OF_THE_DISK * free
    reporter.note(
        f"attention weights of {len(samples)} images and {len(source.learned)} models: {human_bytes(needed)} more in "
        f"the cache, {human_bytes(free)} free: {'kept' if keep else 'computed anew in each epoch'}"
    )
    return keep


def fill_cache(source: Source, samples: Sequence[Sample], recipe: Recipe, first: int, reporter: Reporter) -> None:
    """Make what the epochs from `first` on find in the cache and is not there yet, and tell how long that takes.

    What is made once is made before the epochs, so that each of these takes as long as the others.
    """
    if source.cache.folder is None:
        return
    epochs = [recipe.batches(len(samples), epoch) for epoch in range(first, recipe.epochs)]
    needed = sorted({pair for batches in epochs for batch in batches for pair in batch})
    missing = [(samples[i], mirrored) for i, mirrored in needed if not source.is_made(samples[i], mirrored)]
    what = "features and attention weights" if source.keep_attention else "features"
    rate = Rate()
    for count, (sample, mirrored) in enumerate(missing, 1):
        source.make(sample, mirrored)
        rate.count(count)
        left = f", {rate.left(len(missing) - count)} left" if count < len(missing) else f": {duration(rate.elapsed)}"
        reporter.tick(f"{what}, made once: {count} of {len(missing)} images{left}", last=count == len(missing))


def train(
    source: Source,
    samples: Sequence[Sample],
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    checkpoint: Path,
    resume: bool,
    reporter: Reporter,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> tuple[Probes, list[dict[str, list[float]]]]:
    """Train all probes, and return them with each epoch's mean losses {method: [of each seed]}.

    After each epoch everything is written to `checkpoint`, complete or not at all; `resume` goes on from there, where
    there is such a file, with the same bits as without the interruption (on the same machine and threads).

    Raises ValueError for a checkpoint of other settings, naming them.
    """
    channels = int(source.features(samples[0]).shape[1])
    probes = Probes(source.methods, seeds, channels, source.labels.classes).to(source.device)
    optimizer = torch.optim.AdamW(
        probes.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    settings = _settings(source, samples, recipe, seeds)
    first, history = 0, []
    if resume and checkpoint.is_file():
        state = _read_checkpoint(checkpoint, settings)
        probes.load_state_dict(state["probes"])
        optimizer.load_state_dict(state["optimizer"])
        first, history = state["epochs"], state["history"]
        reporter.note(f"{checkpoint}: {first} of {recipe.epochs} epochs are done")

    fill_cache(source, samples, recipe, first, reporter)
    in_epoch = len(recipe.batches(len(samples), 0))
    rate = Rate()
    for epoch in range(first, recipe.epochs):
        started = time.monotonic()
        total, steps = torch.zeros(len(source.methods), len(seeds), dtype=torch.float64), 0
        for number, batch in enumerate(recipe.batches(len(samples), epoch)):
            iteration = epoch * in_epoch + number
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch, iteration, recipe.epochs * in_epoch)
            mean = train_step(probes, optimizer, [source.example(samples[i], mirrored) for i, mirrored in batch])
            if mean is not None:
                total += mean
                steps += 1
            rate.count(iteration + 1 - first * in_epoch)
            left = rate.left((recipe.epochs * in_epoch) - iteration - 1)
            reporter.tick(
                f"epoch {epoch + 1} of {recipe.epochs}, batch {number + 1} of {in_epoch}, {left} left to train"
            )
        means = (total / max(steps, 1)).tolist()
        history.append(dict(zip(source.methods, means, strict=True)))
        with complete_or_absent(checkpoint) as partial:
            torch.save(
                {
                    "settings": settings,
                    "epochs": epoch + 1,
                    "probes": probes.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": history,
                },
                partial,
            )
        shown = ", ".join(f"{m} {sum(of) / len(of):.4f}" for m, of in history[-1].items())
        reporter.note(f"epoch {epoch + 1} of {recipe.epochs}: {duration(time.monotonic() - started)}, loss {shown}")
        after_epoch(epoch)
    return probes, history


def test(source: Source, samples: Sequence[Sample], probes: Probes, reporter: Reporter) -> dict[str, list[Any]]:
    """Scores of every method and seed over all samples, the upsamplers run as a user would run them."""
    scores = Scores(source.methods, probes.seeds, source.labels.classes)
    size = (source.size, source.size)
    rate = Rate()
    with torch.inference_mode():
        for count, sample in enumerate(samples, 1):
            features = source.features(sample).to(source.device)
            image = normalize_imagenet(source.image(sample)).to(source.device)
            mask = source.mask(sample)
            low = probes(features)
            for index, upsampler in enumerate(source.upsamplers):
                logits = upsampler(image, features, size, values=low[index][None])
                scores.update(upsampler.name, logits[0].unflatten(0, (len(probes.seeds), -1)), mask)
            rate.count(count)
            left = f", {rate.left(len(samples) - count)} left" if count < len(samples) else ""
            reporter.tick(f"testing: {count} of {len(samples)} images{left}", last=count == len(samples))
    return scores.compute()


def summarise(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each method: mean and spread over the seeds, and the seeds themselves."""
    return {
        method: {
            "miou": spread([s["miou"] for s in of_seeds]),
            "accuracy": spread([s["accuracy"] for s in of_seeds]),
            "seeds": list(of_seeds),
        }
        for method, of_seeds in scores.items()
    }


def as_table(results: Mapping[str, Mapping[str, Any]], history: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """The table of `summarise`, with the losses of the last epoch; percent."""
    rows = []
    for method, result in results.items():
        cells = [f"{100 * result[name]['mean']:.2f} ± {100 * result[name]['std']:.2f}" for name in ("miou", "accuracy")]
        last = spread(history[-1][method])
        rows.append([method, *cells, f"{last['mean']:.4f}"])
    return table(["method", "mIoU, %", "pixel accuracy, %", "training loss"], rows)


def _settings(source: Source, samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that a training depends on, as plain values under the names that an error shows."""
    return {
        "encoder": source.encoder_digest,
        "methods": source.methods,
        "weights": source.model_digests,
        "size": source.size,
        "classes": list(source.labels.names),
        "values": source.labels.describe(),
        "images": [sample.name for sample in samples],
        "seeds": list(seeds),
        "recipe": {name: _plain(value) for name, value in dataclasses.asdict(recipe).items()},
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _read_checkpoint(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_torch(path)
        stored = state["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of `anyup evaluate segmentation` ({error})") from error
    if other := sorted(name for name in settings if stored.get(name) != settings[name]):
        raise ValueError(f"{path}: a checkpoint of the same settings expected, got others for: {', '.join(other)}")
    return state
