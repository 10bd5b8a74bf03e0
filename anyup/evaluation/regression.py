"""Linear probes for depth and normals: what frames ask of them, and what every method and seed is worth."""

from __future__ import annotations

import dataclasses
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from anyup.evaluation import depth, normals
from anyup.evaluation.attention_weights import Carrier, HeadedWeights, NearestWeights
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.datasets import square_map
from anyup.evaluation.depth_datasets import Frame
from anyup.evaluation.normals import Camera
from anyup.evaluation.probe import Probes
from anyup.evaluation.probing import Source, sum_over
from anyup.evaluation.report import probes_table, spread, table
from anyup.fingerprint import tensor_fingerprint
from anyup.options import UsageError
from anyup.reporting import Reporter


class Regression(ABC):
    """A task (`probing.Task`) whose loss is one of whole maps, of a batch at a time."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Of a probe."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Of `metrics`, in their order."""

    @abstractmethod
    def read(self, frame: Frame) -> Tensor:
        """(C, H, W) float32 at the frame's own size, zero where unknown."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides the targets and the loss, as plain values."""

    @abstractmethod
    def predict(self, weights: Carrier, logits: Tensor, seeds: int) -> Tensor:
        """What probes say of an image: `Probes.forward` of a method to (seeds, channels, H, W)."""

    @abstractmethod
    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """(seeds, B, channels, H, W) and (B, C, H, W) to (seeds,)."""

    @abstractmethod
    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Of one image: a probe's prediction (channels, H, W), the target (C, H, W) with a known pixel."""

    def target(self, sample: Frame, size: int) -> Tensor:
        """(C, size, size) float32, zero where unknown."""
        return square_map(self.read(sample), size)

    def known(self, target: Tensor) -> int:
        """The number of known pixels."""
        return int((target != 0).any(dim=0).sum())

    def backward(
        self, weights: Sequence[Carrier], logits: Sequence[Tensor], targets: Sequence[Tensor], seeds: int
    ) -> Tensor:
        """See `probe.Objective`."""
        predictions = [self.predict(of_image, low, seeds) for of_image, low in zip(weights, logits, strict=True)]
        each = self.loss(torch.stack(predictions, dim=1), torch.stack(list(targets)))
        each.sum().backward()
        return each.detach().cpu()


@dataclass(frozen=True)
class Depth(Regression):
    """Depth in metres.

    Attributes:
        bins: outputs whose mean depth is predicted; 1: one output between the smallest and the largest depth.
        largest: in metres; what lies farther is unknown.
        relative: learn each frame's `depth.relative_depth` instead of metres, with 1 for the largest.
        published_gradient: see `depth.gradient_loss`.
    """

    bins: int = depth.BINS
    largest: float = depth.LARGEST
    published_gradient: bool = False
    relative: bool = False

    @property
    def outputs(self) -> int:
        return self.bins

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*depth.METRICS, *(f"scaled_{name}" for name in depth.METRICS))

    def read(self, frame: Frame) -> Tensor:
        known = depth.relative_depth(frame.depth()) if self.relative else frame.depth()
        return known.masked_fill(known > self.largest, 0)[None]

    def settings(self) -> dict[str, Any]:
        return {"task": {"depth": dataclasses.asdict(self)}}

    def predict(self, weights: Carrier, logits: Tensor, seeds: int) -> Tensor:
        """Carried before the ReLU and the normalisation of the bins: until there a linear head is linear."""

        def of_part(part: Tensor) -> Tensor:  # (N, bins, pixels) to (N, 1, pixels)
            if self.bins == 1:
                return depth.depth_of_sigmoid(part, self.largest)
            return depth.depth_of_bins(part, self.largest)

        if isinstance(weights, HeadedWeights):
            return weights.maps(logits, lambda outputs: of_part(outputs.transpose(0, 1)).transpose(0, 1))

        def of_seed(low: Tensor) -> Tensor:
            if self.bins == 1 or isinstance(weights, NearestWeights):  # a cell's pixels have one depth
                parts = [of_part(part) for part in weights.logits(low)]
            else:
                parts = [depth.CarriedDepth.apply(*factors, self.largest) for factors in weights.factors(low)]
            return weights.whole(parts)

        return torch.stack([of_seed(low) for low in logits.unflatten(0, (seeds, -1))])

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return depth.depth_loss(predictions[:, :, 0], targets[:, 0], published_gradient=self.published_gradient)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """As it is, and again (`scaled_`) after a scale and a shift of least squares."""
        plain = depth.depth_metrics(prediction[0], target[0])
        scaled = depth.depth_metrics(depth.scaled_and_shifted(prediction[0], target[0]), target[0])
        return plain | {f"scaled_{name}": value for name, value in scaled.items()}


@dataclass(frozen=True)
class Normals(Regression):
    """Surface normals, stored or of planes fitted to the depth.

    Attributes:
        window: side of the pixels that a plane is fitted to.
        camera: of the depth maps, in place of the data set's own.
        cache: keeps fitted normals.
    """

    window: int = 9
    camera: Camera | None = None
    cache: TensorCache = field(default_factory=lambda: TensorCache(None))

    @property
    def outputs(self) -> int:
        return normals.OUTPUTS

    @property
    def metric_names(self) -> tuple[str, ...]:
        return normals.METRICS

    def read(self, frame: Frame) -> Tensor:
        stored = frame.stored_normals()
        if stored is not None:
            return stored
        camera = self.camera or frame.camera
        if camera is None:
            raise UsageError(
                f"--intrinsics: expected, because the layout has neither normals of {frame.name} nor its camera"
            )
        described = {
            "depth": tensor_fingerprint(frame.depth()),
            "camera": str(camera),
            "window": self.window,
            **frame.variant(),
        }
        return self.cache.get("normals", described, lambda: frame.fitted_normals(camera, self.window))

    def settings(self) -> dict[str, Any]:
        return {"task": {"normals": {"window": self.window, "camera": str(self.camera)}}}

    def predict(self, weights: Carrier, logits: Tensor, seeds: int) -> Tensor:
        return weights.whole(weights.logits(logits)).unflatten(0, (seeds, self.outputs))

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return normals.normals_loss(predictions, targets)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        return normals.normals_metrics(prediction, target)


def check_frames(frames: Sequence[Frame], task: Regression, size: int, split: str, reporter: Reporter) -> list[Frame]:
    """The frames that can be used, once all files have been read; tells how much of them is known.

    What cannot be read, lacks what the task needs, or has no known pixel at `size` is reported and left out.

    Raises ValueError where an image and its map differ in size, and where no frame is left; UsageError where normals
    are to be fitted and no camera is known.
    """
    usable, shares, largest = [], [], 0.0
    for number, frame in enumerate(frames, 1):
        try:
            target, image = task.read(frame), frame.photo()
        except (OSError, ValueError) as error:
            reporter.note_once(f"left out: {error}")
        else:
            if image.shape[2:] != target.shape[1:]:
                raise ValueError(
                    f"{frame.name}: expected an image of the size of its map, {_size(target)}, got {_size(image)}"
                )
            seen = square_map(target, size)
            if task.known(seen):
                usable.append(frame)
                shares.append(task.known(seen) / seen[0].numel())
                largest = max(largest, float(seen.max()))
            else:
                reporter.note(f"left out: {frame.name}: no pixel is known")
        reporter.tick(f"checking images and maps of {split!r}: {number} of {len(frames)}")
    if not usable:
        raise ValueError(f"data: none of {len(frames)} frames in the split {split!r} can be used")
    metres = f", at most {largest:.2f} m away" if isinstance(task, Depth) and not task.relative else ""
    if isinstance(task, Normals) and task.cache.folder is None and usable[0].stored_normals() is None:
        reporter.note_once("normals are fitted to the depth anew in each epoch: --cache FOLDER would keep them")
    reporter.note(f"{split!r}: {len(usable)} frames, {statistics.fmean(shares):.1%} of the pixels are known{metres}")
    return usable


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-2]} x {pixels.shape[-1]}"


@dataclass(frozen=True)
class Evaluation:
    """See `probing.Evaluation`."""

    task: Regression

    def check(self, samples: Sequence[Frame], size: int, split: str, reporter: Reporter) -> list[Frame]:
        """See `check_frames`."""
        return check_frames(samples, self.task, size, split, reporter)

    def test(self, source: Source, samples: Sequence[Frame], probes: Probes, reporter: Reporter) -> dict[str, Any]:
        """Of each method: mean and spread over the seeds of each metric, its mean over the frames, and the seeds
        themselves.

        As in training, what is carried are the probes' outputs, by the same weights. See `probing.sum_over` for a test
        that was interrupted.
        """
        source = replace(source, keep_attention=False)
        names = self.task.metric_names
        with torch.no_grad():
            total = sum_over(
                source, samples, probes, "metrics", lambda frame: self._metrics(source, frame, probes), reporter
            )
        results = {}
        for method, means in zip(source.methods, (total / len(samples)).tolist(), strict=True):
            of_seeds = [dict(zip(names, of_seed, strict=True)) for of_seed in means]
            results[method] = {name: spread([seed[name] for seed in of_seeds]) for name in names} | {"seeds": of_seeds}
        return results

    def table(self, results: Mapping[str, Any], history: Sequence[Mapping[str, Sequence[float]]]) -> str:
        """The results, with the losses of the last epoch."""
        if isinstance(self.task, Depth):
            return table(*probes_table("depth", results, history, metres=not self.task.relative))
        return table(*probes_table("normals", results, history))

    def _metrics(self, source: Source, frame: Frame, probes: Probes) -> Tensor:
        """(methods, seeds, metrics) float64 of a frame."""
        example = source.example(frame)
        low = probes(example.features)
        target = example.target.cpu()
        predictions = (
            self.task.predict(probes.carrier(index, example.weights[method]), low[index], len(probes.seeds))
            for index, method in enumerate(source.methods)
        )
        return torch.tensor(
            [[list(self.task.metrics(each, target).values()) for each in of.cpu()] for of in predictions],
            dtype=torch.float64,
        )
