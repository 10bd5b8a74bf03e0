"""Training linear probes on a data set: what is made once of each image, the epochs, and going on after a stop.

A `Task` says what is learned; everything else is the same for segmentation, depth and normals.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from anyup.evaluation.datasets import square_image
from anyup.evaluation.dpt import BLOCKS, DptProbes
from anyup.evaluation.probe import Example, LinearProbes, Objective, Probes, Recipe, View, train_step
from anyup.evaluation.upsamplers import Interpolation, Learned, Upsampler
from anyup.fingerprint import module_fingerprint, tensor_fingerprint
from anyup.images import complete_or_absent, normalize_imagenet, resize
from anyup.progress import human_bytes
from anyup.reporting import Rate, Reporter, duration
from anyup.tensor_files import read_torch

_SHARE_OF_THE_DISK = 0.8
_AS_IT_IS = View()


class Item(Protocol):
    """One image of a data set: a `datasets.Sample` or a `depth_datasets.Frame`."""

    @property
    def name(self) -> str: ...

    def photo(self) -> Tensor:
        """(1, 3, H, W) in 0..1."""

    def fingerprint(self) -> str:
        """Hash of the image."""

    def variant(self) -> Mapping[str, object]:
        """What else decides how the image is read, for a cache."""


class Task(Objective, Protocol):
    """What probes learn, and from what."""

    def target(self, sample: Any, size: int) -> Tensor:
        """(..., size, size): what is known of a sample, on the geometry of `datasets.square_image`."""

    def settings(self) -> dict[str, Any]:
        """All that decides the targets and the loss, as plain values."""


class Evaluation(Protocol):
    """A task, and what is made of a data set before and after training."""

    @property
    def task(self) -> Task: ...

    def check(self, samples: Sequence[Any], size: int, split: str, reporter: Reporter) -> list[Any]:
        """The samples that can be used, once all files have been read."""

    def test(self, source: Source, samples: Sequence[Any], probes: Probes, reporter: Reporter) -> dict[str, Any]:
        """The results of each method."""

    def table(self, results: Mapping[str, Any], history: Sequence[Mapping[str, Sequence[float]]]) -> str:
        """The results for people."""


class Encoded(NamedTuple):
    """What a frozen encoder makes of an image, float32."""

    features: Tensor  # (1, C, h, w), what upsamplers take
    probed: Tensor  # (1, C, h, w), what probes see; (1, 2 C, h, w) with the class token, the same in every cell


@dataclass
class Source:
    """What probes are trained and tested on: images, frozen encoder, frozen upsamplers, and what is kept of them.

    Attributes:
        size: side of the images that guide, and of the targets, in pixels.
        cache: keeps features, and attention weights where `keep_attention`.
        encoder_size: side of the images that the encoder sees, a multiple of its stride; 0: `size`.
        class_token: whether probes see the encoder's class token beside the features.
    """

    encoder: Encoder
    upsamplers: Sequence[Upsampler]
    task: Task
    size: int
    cache: TensorCache
    device: torch.device
    keep_attention: bool = False
    encoder_size: int = 0
    class_token: bool = False
    _images: dict[Item, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        argument = "encoder_size" if self.encoder_size else "size"
        self.encoder_size = self.encoder_size or self.size
        if self.encoder_size < 1 or self.encoder_size % self.encoder.stride:
            raise ValueError(
                f"{argument}: expected a multiple of {self.encoder.name}'s stride of {self.encoder.stride}, got "
                f"{self.encoder_size}"
            )
        if self.class_token:  # asked of two by two cells, so that a network without one is refused now
            two_cells = torch.zeros(1, 3, *[2 * self.encoder.stride] * 2, device=self.device)
            try:
                with torch.no_grad():
                    self.encoder.with_class_token(two_cells)
            except ValueError as error:
                raise ValueError(f"class_token: {error}") from error
        self.encoder_digest = f"{self.encoder.name} {module_fingerprint(self.encoder)}"
        self.model_digests = {learned.name: module_fingerprint(learned.model) for learned in self.learned}

    @property
    def methods(self) -> list[str]:
        return [upsampler.name for upsampler in self.upsamplers]

    @property
    def learned(self) -> list[Learned]:
        return [upsampler for upsampler in self.upsamplers if isinstance(upsampler, Learned)]

    def image(self, sample: Item, view: View = _AS_IT_IS) -> Tensor:
        """(1, 3, size, size) in 0..1."""
        return view.image(square_image(sample.photo(), self.size))

    def encoded(self, sample: Item, view: View = _AS_IT_IS) -> Encoded:
        """On the CPU."""

        def make() -> Tensor:
            with torch.no_grad():
                image = resize(self.image(sample, view), (self.encoder_size, self.encoder_size))
                image = self.encoder.normalize(image).to(self.device)
                if not self.class_token:
                    return self.encoder(image).float()
                features, token = self.encoder.with_class_token(image)
                return torch.cat([token[:, :, None], features.flatten(2)], dim=2).float()

        cache = self.cache if view.is_seen_again else TensorCache(None)
        made = cache.get("features", self._describe_features(sample, view), make)
        if not self.class_token:
            return Encoded(made, made)
        features = made[:, :, 1:].unflatten(2, self.grid)
        return Encoded(features, torch.cat([features, made[:, :, :1, None].expand_as(features)], dim=1))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the features."""
        side = self.encoder_size // self.encoder.stride
        return side, side

    def target(self, sample: Item, view: View = _AS_IT_IS) -> Tensor:
        """(..., size, size), as the task gives it."""
        return view.target(self.task.target(sample, self.size))

    def weights(self, upsampler: Learned, sample: Item, view: View = _AS_IT_IS) -> Tensor:
        """The image's averaged attention weights, float16, on the CPU."""

        def make() -> Tensor:
            with torch.no_grad():
                image = normalize_imagenet(self.image(sample, view)).to(self.device)
                features = self.encoded(sample, view).features.to(self.device)
                return averaged_weights(upsampler.model, image, features, (self.size, self.size))

        cache = self.cache if self.keep_attention and view.is_seen_again else TensorCache(None)
        return cache.get("attention", self._describe_attention(upsampler, sample, view), make)

    def example(self, sample: Item, view: View = _AS_IT_IS) -> Example:
        """What a step needs of an image, on the device."""
        probed = self.encoded(sample, view).probed
        size, grid = (self.size, self.size), (probed.shape[2], probed.shape[3])

        def fixed_weights(upsampler: Upsampler) -> FixedWeights:
            if isinstance(upsampler, Interpolation):
                return NearestWeights(size, grid) if upsampler.name == "nearest" else BilinearWeights(size, grid)
            weights = self.weights(upsampler, sample, view).to(self.device)
            return AttentionWeights(tile(upsampler.model.window, size, grid), weights)

        weights = {upsampler.name: fixed_weights(upsampler) for upsampler in self.upsamplers}
        return Example(probed.to(self.device), self.target(sample, view).to(self.device), weights)

    def make(self, sample: Item, view: View) -> None:
        """Put into the cache what is kept of an image."""
        self.encoded(sample, view)
        for upsampler in self.learned if self.keep_attention else ():
            self.weights(upsampler, sample, view)

    def is_made(self, sample: Item, view: View) -> bool:
        """Whether the cache has all that is kept of an image."""
        paths = [self.cache.path("features", self._describe_features(sample, view))]
        if self.keep_attention:
            described = [self._describe_attention(upsampler, sample, view) for upsampler in self.learned]
            paths += [self.cache.path("attention", description) for description in described]
        return all(path.is_file() for path in paths)

    def attention_bytes(self, samples: Sequence[Item], flips: bool) -> int:
        """Bytes of the attention weights that training on these samples would add to the cache."""
        missing = 0
        for upsampler in self.learned:
            each = tile(upsampler.model.window, (self.size, self.size), self.grid).count * 2
            for sample in samples:
                for view in (_AS_IT_IS, View(mirrored=True)) if flips else (_AS_IT_IS,):
                    description = self._describe_attention(upsampler, sample, view)
                    missing += each * (not self.cache.path("attention", description).is_file())
        return missing

    def described(self, sample: Item, view: View = _AS_IT_IS) -> dict[str, Any]:
        """What an image and its features depend on, for a cache."""
        if sample not in self._images:
            self._images[sample] = {"photograph": sample.fingerprint(), **sample.variant()}
        return {
            **self._images[sample],
            "encoder": self.encoder_digest,
            "short_side": self.size,
            "mirrored": view.mirrored,
            **({} if self.encoder_size == self.size else {"encoder_size": self.encoder_size}),
        }

    def _describe_features(self, sample: Item, view: View) -> dict[str, Any]:
        return self.described(sample, view) | ({"class_token": True} if self.class_token else {})

    def _describe_attention(self, upsampler: Learned, sample: Item, view: View) -> dict[str, Any]:
        model = {"model": self.model_digests[upsampler.name], "arguments": upsampler.model.config}
        return self.described(sample, view) | model

    @property
    def model_arguments(self) -> dict[str, dict[str, Any]]:
        """Of each upsampler, what beside its weights its results depend on, such as the window."""
        return {learned.name: learned.model.config for learned in self.learned}


def keep_attention(source: Source, samples: Sequence[Item], recipe: Recipe, wanted: str, reporter: Reporter) -> bool:
    """Whether attention weights are kept in the cache: as wanted, or for "auto" where they fit; tells the count."""
    if recipe.augment:
        reporter.note("augmented images are seen once each: features and attention weights are computed in each epoch")
        return False
    if not source.learned or wanted == "recompute":
        return False
    if source.cache.folder is None:
        reporter.note("attention weights are computed anew in each epoch: --cache FOLDER would keep them")
        return False
    source.cache.folder.mkdir(parents=True, exist_ok=True)
    needed, free = source.attention_bytes(samples, recipe.flips), shutil.disk_usage(source.cache.folder).free
    keep = wanted == "keep" or needed <= _SHARE_OF_THE_DISK * free
    reporter.note(
        f"attention weights of {len(samples)} images and {len(source.learned)} models: {human_bytes(needed)} more in "
        f"the cache, {human_bytes(free)} free: {'kept' if keep else 'computed anew in each epoch'}"
    )
    return keep


def fill_cache(source: Source, samples: Sequence[Item], recipe: Recipe, first: int, reporter: Reporter) -> None:
    """Make what the epochs from `first` on find in the cache and is not there yet, and tell how long that takes.

    What is made once is made before the epochs, so that each of these takes as long as the others.
    """
    if source.cache.folder is None or recipe.augment:
        return
    epochs = [recipe.batches(len(samples), epoch) for epoch in range(first, recipe.epochs)]
    needed = sorted({pair for batches in epochs for batch in batches for pair in batch})
    missing = [(samples[i], view) for i, view in needed if not source.is_made(samples[i], view)]
    what = "features and attention weights" if source.keep_attention else "features"
    rate = Rate()
    for count, (sample, view) in enumerate(missing, 1):
        source.make(sample, view)
        left = rate.count_of(count, len(missing)) or f": {duration(rate.elapsed)}"
        reporter.tick(f"{what}, made once: {count} of {len(missing)} images{left}", last=count == len(missing))


def train(
    source: Source,
    samples: Sequence[Item],
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
    probes = _probes(source, recipe, seeds).to(source.device)
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
            mean = train_step(probes, optimizer, [source.example(samples[i], view) for i, view in batch], source.task)
            if mean is not None:
                total += mean
                steps += 1
            rate.count(iteration + 1 - first * in_epoch)
            left = rate.time_left(recipe.epochs * in_epoch - iteration - 1)
            reporter.tick(f"epoch {epoch + 1} of {recipe.epochs}, batch {number + 1} of {in_epoch}{left}")
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


def _probes(source: Source, recipe: Recipe, seeds: Sequence[int]) -> Probes:
    of_encoder, outputs = source.encoder.channels, source.task.outputs
    channels = of_encoder * (2 if source.class_token else 1)
    if recipe.head == "linear":
        return LinearProbes(source.methods, seeds, channels, outputs)
    of_block = of_encoder // BLOCKS
    return DptProbes(source.methods, seeds, channels, outputs, of_block=of_block, width=recipe.width)


def _settings(source: Source, samples: Sequence[Item], recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that a training depends on, as plain values under the names that an error shows."""
    return {
        "encoder": source.encoder_digest,
        "methods": source.methods,
        "weights": source.model_digests,
        "arguments": source.model_arguments,
        "size": source.size,
        "encoder_size": source.encoder_size,
        "class_token": source.class_token,
        **source.task.settings(),
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
        raise ValueError(f"{path}: not a checkpoint of `anyup evaluate` ({error})") from error
    if other := sorted(name for name in settings if stored.get(name) != settings[name]):
        raise ValueError(f"{path}: expected a checkpoint of the same settings, got others for: {', '.join(other)}")
    return state


def sum_over(
    source: Source,
    samples: Sequence[Item],
    probes: Probes,
    kind: str,
    measure: Callable[[Any], Tensor],
    reporter: Reporter,
) -> Tensor:
    """The sum over a split of what `measure` makes of a sample (of one `kind`) with these probes.

    What is made of a sample is kept in the cache, so that a test that was interrupted goes on.
    """
    of_all = {
        "task": source.task.settings(),
        "probes": module_fingerprint(probes),
        "methods": source.methods,
        "models": source.model_digests,
        "arguments": source.model_arguments,
    }
    rate = Rate()
    total = torch.zeros(())
    for count, sample in enumerate(samples, 1):
        if source.cache.folder is None:  # a description reads the target
            made = measure(sample)
        else:
            target = {"target": tensor_fingerprint(source.target(sample))}
            made = source.cache.get(kind, source.described(sample) | target | of_all, partial(measure, sample))
        total = made if count == 1 else total + made
        left = rate.count_of(count, len(samples))
        reporter.tick(f"testing: {count} of {len(samples)} images{left}", last=count == len(samples))
    return total
