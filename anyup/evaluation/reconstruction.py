"""Feature reconstruction: upsampled features against those that the encoder gives of a larger image.

The view is the central square of a photograph, 448 pixels a side. Two kinds of truth:

- *crops* (as in training): the features to upsample are those of the view shrunk to 224; the truth are the encoder's
  features of the view's four quarters, 224 pixels each at their full resolution, each compared with its part of the
  map upsampled to 448 / stride cells a side.
- *whole*: the truth are the features of the view at its 448 pixels; the features to upsample are those of the view
  shrunk to 112, say: a higher ratio, and what a user saves by upsampling instead of encoding a larger image.

Measured per photograph, over all cells of the truth t and the upsampled map u:

    cosine = mean of <u, t> / (|u| |t|)               (0 where a vector is zero)
    error  = sum of |u - t|^2 / sum of |t|^2          (normalised error: 0 is exact, 1 is what a map of zeros has)

The error is a ratio of sums because a single cell's |t| can be zero after a ReLU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.encoders import Encoder
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.report import number, spread, table
from anyup.evaluation.upsamplers import REFERENCE, Upsampler
from anyup.fingerprint import file_fingerprint, module_fingerprint
from anyup.images import normalize_imagenet, read_photo, resize
from anyup.reporting import Reporter
from anyup.training.photographs import square_crop

CROPS, WHOLE = "crops", "whole"


@dataclass(frozen=True)
class Task:
    """What is upsampled from what, in pixels of the encoder's input, every side a multiple of its stride.

    Attributes:
        truth: "crops" or "whole", see the module.
        side: of the image whose features are upsampled.
        view: of the view whose features are the truth.
        stride: pixels of one feature cell.
    """

    truth: str
    side: int
    view: int
    stride: int

    @property
    def name(self) -> str:
        """The ratio first, as in "2x, 224 to crops of 448"."""
        against = f"{CROPS} of {self.view}" if self.truth == CROPS else str(self.view)
        return f"{self.view / self.side:.3g}x, {self.side} to {against}"

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the upsampled map."""
        return self.view // self.stride, self.view // self.stride


def plan(encoder: Encoder, view: int = 448, crop: int = 224, sides: Sequence[int] = (112,)) -> list[Task]:
    """The tasks of an encoder: crops, and the whole view from each side of `sides`.

    A side that the encoder's stride does not divide becomes the nearest multiple (the larger of two equally near):
    for stride 32, 112 becomes 128. Raises ValueError unless 0 < each side < view, the rounded ones included, and the
    crop is at most the view.
    """

    def rounded(side: int, name: str) -> int:
        result = max(1, int(side / stride + 0.5)) * stride
        if side < 1 or result >= viewed:
            raise ValueError(f"{name}: expected 1 pixel and more, and less than the view of {viewed}, got {side}")
        return result

    stride = encoder.stride
    if view < stride:
        raise ValueError(f"view: expected at least the stride of {encoder.name}, {stride} pixels, got {view}")
    viewed = int(view / stride + 0.5) * stride
    tasks = [Task(CROPS, rounded(crop, "crop"), viewed, stride)]
    return tasks + [Task(WHOLE, rounded(side, "sides"), viewed, stride) for side in sides]


@dataclass(frozen=True)
class Truth:
    """The encoder's own features (C, h, w) of a part of the view, and where that part begins in the grid, in cells."""

    top: int
    left: int
    features: Tensor


@dataclass(frozen=True)
class Measured:
    """One method on one photograph."""

    cosine: float
    error: float


def measure(upsampled: Tensor, truths: Sequence[Truth]) -> Measured:
    """Compare an upsampled map (1, C, H, W) with the true parts of it; float64 sums."""
    cosine = squared = energy = 0.0
    cells = 0
    for truth in truths:
        true = truth.features
        h, w = true.shape[1:]
        part = upsampled[0, :, truth.top : truth.top + h, truth.left : truth.left + w]
        if part.shape != true.shape:
            raise ValueError(
                f"truths: expected a part of the map {tuple(upsampled.shape[1:])}, got {tuple(true.shape)} from "
                f"row {truth.top}, column {truth.left}"
            )
        part, true = part.double(), true.double()
        cosine += float(F.cosine_similarity(part, true, dim=0).sum())
        squared += float((part - true).square().sum())
        energy += float(true.square().sum())
        cells += h * w
    if energy == 0:
        raise ValueError("truths: expected features other than zero")
    return Measured(cosine / cells, squared / energy)


class View:
    """The central square of one photograph, and an encoder's features of it, from the cache where they are there.

    Args:
        photo: (1, 3, H, W) in 0..1.
        digest, encoder_digest: what the photograph and the encoder are known by in the cache.
    """

    def __init__(self, photo: Tensor, digest: str, encoder: Encoder, encoder_digest: str, cache: TensorCache) -> None:
        self._photo = photo
        self._digest = digest
        self._encoder = encoder
        self._encoder_digest = encoder_digest
        self._cache = cache

    def image(self, view: int, side: int) -> Tensor:
        """(1, 3, side, side) in 0..1: the view of `view` pixels, shrunk."""
        return resize(square_crop(self._photo, view), (side, side))

    def features(self, view: int, side: int) -> Tensor:
        """(1, C, side / stride, side / stride) of the view of `view` pixels, shrunk to `side`."""
        return self._get({"view": view, "side": side}, lambda: self.image(view, side))

    def crops(self, view: int, side: int) -> Tensor:
        """(4, C, side / stride, side / stride) of the four corners of the view: top, then bottom, left before right."""

        def images() -> Tensor:
            whole = self.image(view, view)
            far = view - side
            return torch.cat([whole[:, :, y : y + side, x : x + side] for y in (0, far) for x in (0, far)])

        return self._get({"view": view, "crops": side}, images)

    def truths(self, task: Task) -> list[Truth]:
        """What a map upsampled to the task's grid is compared with."""
        if task.truth == WHOLE:
            return [Truth(0, 0, self.features(task.view, task.view)[0])]
        # Both sides are multiples of the stride, so the far corners begin at whole cells.
        far = (task.view - task.side) // task.stride
        corners = [(top, left) for top in (0, far) for left in (0, far)]
        crops = self.crops(task.view, task.side)
        return [Truth(*corner, crop) for corner, crop in zip(corners, crops, strict=True)]

    def _get(self, what: dict[str, int], images: Callable[[], Tensor]) -> Tensor:
        def make() -> Tensor:
            device = next((p.device for p in self._encoder.parameters()), torch.device("cpu"))
            batch = self._encoder.normalize(images())
            # One at a time: the memory of one, and the same numbers whatever else is in the batch.
            return torch.cat([self._encoder(image[None].to(device)).float().cpu() for image in batch])

        return self._cache.get("features", {"photograph": self._digest, "encoder": self._encoder_digest, **what}, make)


def compare(
    view: View, tasks: Sequence[Task], upsamplers: Sequence[Upsampler], guidance: int, device: torch.device
) -> dict[str, dict[str, Measured]]:
    """{task: {method: measured}} of one encoder's tasks, which have one view, on one photograph.

    `guidance` is the side of the image that guides, in pixels. It is encoded once for all tasks.
    """
    image = normalize_imagenet(view.image(tasks[0].view, guidance)).to(device)
    grid = tasks[0].grid
    lows = [view.features(task.view, task.side).to(device) for task in tasks]
    truths = [view.truths(task) for task in tasks]
    measured: dict[str, dict[str, Measured]] = {task.name: {} for task in tasks}
    for upsampler in upsamplers:
        guide = upsampler.encode(image, grid, [(low.shape[2], low.shape[3]) for low in lows])
        for of_task, low, true in zip(measured.values(), lows, truths, strict=True):
            of_task[upsampler.name] = measure(upsampler(guide, low, grid).float().cpu(), true)
    return measured


def run(
    photographs: Mapping[str, Path],
    encoder: Encoder,
    upsamplers: Sequence[Upsampler],
    *,
    tasks: Sequence[Task],
    guidance: int,
    cache: TensorCache,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Any]:
    """{task: {"methods": summary, "photographs": {name: {method: [cosine, error]}}}} of one encoder.

    A photograph that cannot be read or measured, or whose short side is less than the view, is reported and left out;
    ValueError where none is left.
    """
    encoder_digest = f"{encoder.name} {module_fingerprint(encoder)}"
    measured: dict[str, dict[str, dict[str, Measured]]] = {task.name: {} for task in tasks}
    smallest = max(task.view for task in tasks)
    with torch.inference_mode():
        for count, (name, path) in enumerate(photographs.items(), 1):
            try:
                photo = read_photo(path)
            except (ValueError, OSError) as error:
                reporter.note_once(f"left out: {error}")
                continue
            if min(photo.shape[2:]) < smallest:
                reporter.note_once(
                    f"left out: {path}: expected a short side of {smallest} pixels, got {min(photo.shape[2:])}"
                )
                continue
            view = View(photo, file_fingerprint(path), encoder, encoder_digest, cache)
            try:
                compared = compare(view, tasks, upsamplers, guidance, device)
            except ValueError as error:  # as of a black photograph, whose features may be zero
                reporter.note(f"left out: {path}, {encoder.name}: {error}")
                continue
            for task_name, of_methods in compared.items():
                measured[task_name][name] = of_methods
            reporter.tick(f"{encoder.name}: {count} of {len(photographs)} photographs", last=count == len(photographs))
    if not all(measured.values()):
        raise ValueError("photographs: none could be used")
    return {
        task: {
            "methods": summarise({u.name: [of[u.name] for of in by_photo.values()] for u in upsamplers}),
            "photographs": {
                name: {method: [m.cosine, m.error] for method, m in of.items()} for name, of in by_photo.items()
            },
        }
        for task, by_photo in measured.items()
    }


def summarise(measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Of each method, over photographs: mean and spread, and what is left of bilinear's 1 - cosine.

    `relative` holds `ratio`, the ratio of the means of 1 - cosine; `mean` and `std` of the photographs' own ratios;
    and `better`, the share of the photographs on which the method's cosine is larger than bilinear's.
    """
    summary: dict[str, Any] = {}
    baseline = measured[REFERENCE]
    for name, values in measured.items():
        entry: dict[str, Any] = {
            "cosine": spread([m.cosine for m in values]),
            "error": spread([m.error for m in values]),
        }
        # Where bilinear is exact (a photograph of one colour) there is nothing to compare.
        pairs = [(m, b) for m, b in zip(values, baseline, strict=True) if b.cosine < 1]
        if pairs:
            ratio = statistics.fmean(1 - m.cosine for m, _ in pairs) / statistics.fmean(1 - b.cosine for _, b in pairs)
            entry["relative"] = {
                "ratio": ratio,
                **spread([(1 - m.cosine) / (1 - b.cosine) for m, b in pairs]),
                "better": statistics.fmean(m.cosine > b.cosine for m, b in pairs),
            }
        summary[name] = entry
    return summary


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Rows of the table, of {encoder: {task: {"methods": summary}}}."""
    for encoder, tasks in results.items():
        for task, result in tasks.items():
            for method, entry in result["methods"].items():
                relative = entry.get("relative")
                yield [
                    encoder,
                    task,
                    method,
                    f"{number(entry['cosine']['mean'])} ± {number(entry['cosine']['std'])}",
                    f"{relative['ratio']:.3f} ({relative['mean']:.3f} ± {relative['std']:.3f})" if relative else "-",
                    f"{relative['better']:.0%}" if relative and method != REFERENCE else "-",
                    f"{number(entry['error']['mean'])} ± {number(entry['error']['std'])}",
                ]


def as_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of {encoder: {task: {"methods": summary}}}."""
    header = ["encoder", "task", "method", "cosine", "(1 - cosine) / bilinear's", "better", "normalised error"]
    return table(header, list(rows(results)))
