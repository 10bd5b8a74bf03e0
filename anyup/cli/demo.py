"""The demonstration: a photograph and stored features of a real encoder, enlarged three ways, in one picture.

Needs torch, NumPy, Pillow and safetensors; no encoder and no network.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.checkpoints import MINI, NAMED, PACKAGED, UNTRAINED_SEED, load, untrained_model
from anyup.devices import choose_device
from anyup.images import check_writable, normalize_imagenet, read_photo, save_picture
from anyup.model import AnyUp, ModelExplanation
from anyup.panels import draw_panels
from anyup.progress import Progress, human_bytes
from anyup.visualization import pca_picture

if TYPE_CHECKING:
    pass

_SECOND_CALL_BELOW = 20.0  # seconds; after a slower first call there is no second, warm one


@dataclass(frozen=True)
class Weights:
    """A model in eval mode, the name of its weights, and whether they are trained."""

    model: AnyUp
    name: str
    trained: bool


def load_weights(
    weights: str, *, untrained: bool, device: torch.device, backend: str | None, progress: Progress
) -> Weights:
    """The model with `weights`, a name or a file, or with random weights if `untrained`."""
    if untrained:
        return Weights(untrained_model(device, backend), f"untrained (random, fixed seed {UNTRAINED_SEED})", False)
    with progress.stage(f"loading weights {weights}"):
        model = load(weights, device=device, backend=backend)
    known = PACKAGED.get(weights) or NAMED.get(weights)
    name = f"{weights} ({known.licence}), trained on {known.trained_on}" if known else Path(weights).name
    return Weights(model, name, trained=True)


@dataclass
class _Peak:
    """The peak of used bytes minus the bytes used at the start; None where the system does not report it."""

    above: int | None = None


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _highest_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[_Peak]:
    """Measure the memory that the block takes: the allocator's on CUDA, else the process's resident memory."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.above = torch.cuda.max_memory_allocated(device) - before
        return
    start = _resident() or _highest_resident()
    yield peak
    highest = _highest_resident()
    if start is not None and highest is not None:
        peak.above = max(0, highest - start)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _device_in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads != 1 else ''}"
    return str(device)


def run(
    output: str | os.PathLike[str],
    *,
    weights: str = MINI,
    untrained: bool = False,
    backend: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the demonstration's picture to `output` (.png) and print the measured time and memory on stdout.

    `weights` is a name or a file for `anyup.load`; `untrained` takes random ones instead, and marks the picture
    as such. Returns the path written.
    """
    from anyup import assets

    progress = progress or Progress()
    path = check_writable(output, (".png",))
    place = choose_device(device)
    photo = read_photo(assets.demo_photo_path())
    features = assets.demo_features()
    chosen = load_weights(weights, untrained=untrained, device=place, backend=backend, progress=progress)
    model = chosen.model

    image = normalize_imagenet(photo).to(place)
    low = features.to(place)
    size = (int(photo.shape[2]), int(photo.shape[3]))
    with torch.inference_mode():
        explanation = model.explain(image, low)
        with progress.stage(f"upsampling {_grid(low)} to {size[0]} x {size[1]}"), _peak_memory(place) as peak:
            start = time.perf_counter()
            high = model(image, low)
            _finish(place)
            first = seconds = time.perf_counter() - start
        if first < _SECOND_CALL_BELOW:
            with progress.stage("once more, now that everything is warm"):
                start = time.perf_counter()
                model(image, low)
                _finish(place)
                seconds = time.perf_counter() - start
        bilinear = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
        low_picture, bilinear_picture, high_picture = pca_picture(low, bilinear, high)
        nearest = F.interpolate(low_picture[None], size=size, mode="nearest-exact")[0]

    memory = "not measured here" if peak.above is None else human_bytes(peak.above)
    result = human_bytes(high.numel() * high.element_size())
    backends = _backends_in_words(explanation)
    ours = "AnyUp" if chosen.trained else "AnyUp, UNTRAINED WEIGHTS"
    picture = draw_panels(
        [photo[0], nearest, bilinear_picture, high_picture],
        [f"photograph, {size[0]} x {size[1]}", f"features, {_grid(low)}", "bilinear", ours],
        [
            f"AnyUp: {seconds:.2f} s, {memory} at the peak (the result itself: {result}) on "
            f"{_device_in_words(place)}. Backend: {backends}. "
            "Colours: the first three principal components of the low-resolution features.",
            f"Weights: {chosen.name}. Features: {assets.DEMO_ENCODER}. {assets.DEMO_CREDIT}.",
        ],
        alarms=[] if chosen.trained else [ours],
    )
    save_picture(path, picture)

    print(explanation)
    print(f"time      {seconds:.2f} s (first call {first:.2f} s) on {_device_in_words(place)}")
    print(f"memory    {memory} at the peak above the loaded model; the result itself is {result}")
    print(f"backend   {backends}")
    print(f"weights   {chosen.name}")
    if not chosen.trained:
        print("          UNTRAINED: the last panel shows that everything runs, not what AnyUp can do.")
    print(f"features  {assets.DEMO_ENCODER}, {_grid(low)}")
    print(f"photo     {assets.DEMO_CREDIT}")
    print(f"picture   {path}")
    return path


def _grid(features: Tensor) -> str:
    return " x ".join(str(side) for side in features.shape[-3:])


def _backends_in_words(explanation: ModelExplanation) -> str:
    """The backend of each operation (one name if all agree), and the first reason against each backend not chosen."""
    chosen = {e.operation: e.outcome for e in explanation.explanations if e.chosen or not e.otherwise}
    names = set(chosen.values())
    words = ", ".join(names if len(names) == 1 else (f"{o.replace('_', ' ')} {name}" for o, name in chosen.items()))
    against: dict[str, str] = {}
    for operation in explanation.explanations:
        for candidate in operation.candidates:
            if candidate.reasons:
                against.setdefault(candidate.name, candidate.reasons[0])
    why = "; ".join(f"not {name}: {reason}" for name, reason in against.items())
    return f"{words} ({why or 'first in order of preference'})"
