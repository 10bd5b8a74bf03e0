"""Whether two implementations agree, which is asked before anything is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anyup import AnyUp
from anyup.bench.baseline import Published
from anyup.bench.workloads import Workload

TOLERANCE = 2e-4
"""Of two float32 results in different orders of operations, relative to the largest value.

With the benchmarks' noise each is up to 5e-5 from float64 at C = 384, and 2e-4 at 1536: then `check_by_exact` judges. A
window a fifth too wide is 1e-1 away.
"""

ERROR_RATIO, BASELINE_ERROR_RATIO = 2.0, 4.0
"""How much further than the baseline a result may be from float64, and the baseline than a result."""

_SAMPLE = 4096


class ParityError(AssertionError):
    """The results differ: times of the two would mean nothing."""


HALF_TOLERANCE = 3e-2
"""Of a result of ours in half precision, relative to the largest value.

The baseline may be further off: 0.4 in bfloat16 at 224 from 16. What it normalises after channels are averaged varies
less than half precision rounds it.
"""

GRADIENT_TOLERANCE = 5e-3
"""Of two float32 gradients, relative to the norm of the tensor's."""


def check(result: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """Largest difference relative to the largest expected value; raises ParityError beyond the tolerance."""
    if result.shape != expected.shape:
        raise ParityError(f"{what}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
    largest, scale = 0.0, 0.0
    parts = (tensor.split(64, dim=2) for tensor in (result, expected))  # a copy of the whole may not fit
    for part, wanted in zip(*parts, strict=True):
        difference = (part.float() - wanted.float()).abs().max().item()
        if not math.isfinite(difference):  # a comparison with NaN would pass
            raise ParityError(f"{what}: the difference is {difference}")
        largest, scale = max(largest, difference), max(scale, wanted.abs().max().item())
    if largest > tolerance * scale:
        apart = f"{largest / scale:.1e} of the largest value apart"
        raise ParityError(f"{what}: {apart}, expected at most {tolerance:.0e}")
    return largest / scale


def check_gradients(results: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> float:
    """Largest difference of the leaves' gradients, each relative to its own norm.

    Raises ParityError beyond `GRADIENT_TOLERANCE`, and where a leaf has a gradient on one side alone.
    """
    worst = 0.0
    for number, (leaf, wanted) in enumerate(zip(results, expected, strict=True)):
        if (leaf.grad is None) != (wanted.grad is None):
            raise ParityError(f"{what}: gradient {number}: one side has none")
        if leaf.grad is None or wanted.grad is None:
            continue
        norm = wanted.grad.double().norm().item()
        apart = (leaf.grad.double() - wanted.grad.double()).norm().item()
        if not apart <= GRADIENT_TOLERANCE * norm:
            raise ParityError(f"{what}: gradient {number}: {apart / max(norm, 1e-30):.1e} of its norm apart")
        worst = max(worst, apart / norm if norm else 0.0)
    return worst


def check_sample(model: AnyUp, workload: Workload) -> float:
    """As `check`, of a float32 model and the baseline at a sample of pixels: cheap enough for any workload."""
    image, features = (t.to(model.rope.freqs) for t in workload.inputs())
    pixels = _sample(workload).to(image.device)
    with torch.inference_mode():
        # An indexed copy, so that the whole output is gone before the baseline starts.
        result = model(image, features).flatten(2)[:, :, pixels]
        return check(result, Published(model).at(image, features, pixels), workload.name)


def check_by_exact(model: AnyUp, workload: Workload, result: Tensor, expected: Tensor, what: str) -> float:
    """The difference of float32 results that are further apart than `TOLERANCE`, both held against float64.

    Channels are averaged: the more there are, the less they differ, and the normalisation after that makes both the
    differences and their rounding larger. Raises ParityError where `result` is, at a sample of pixels, more than
    `ERROR_RATIO` times as far from float64 as `expected` is, or `expected` more than `BASELINE_ERROR_RATIO` times as
    far as `result`.
    """
    difference = check(result, expected, what, tolerance=math.inf)
    error, baseline = _errors(model, workload, result, expected)
    if not (error <= ERROR_RATIO * baseline and baseline <= BASELINE_ERROR_RATIO * error):
        apart = f"{error:.1e} of the largest value from float64"
        raise ParityError(f"{what}: {apart}, the baseline is {baseline:.1e} from it")
    return difference


def check_half(model: AnyUp, workload: Workload, result: Tensor, what: str, tolerance: float = HALF_TOLERANCE) -> float:
    """The largest error of a model's result in half precision, at a sample of pixels, relative to the largest value.

    Against float64 on the same rounded numbers. Raises ParityError where it is not within the tolerance.
    """
    (error,) = _errors(model, workload, result)
    if not error <= tolerance:
        raise ParityError(f"{what}: {error:.1e} of the largest value from float64, expected at most {tolerance:.0e}")
    return error


def _errors(model: AnyUp, workload: Workload, *results: Tensor) -> list[float]:
    """The largest difference of each result from float64 at a sample of pixels, relative to the largest value."""
    pixels = _sample(workload).to(results[0].device)
    wide = copy.deepcopy(model).double()
    image, features = (t.to(model.rope.freqs).to(wide.rope.freqs) for t in workload.inputs())
    with torch.inference_mode():
        exact = Published(wide).at(image, features, pixels)
    scale = exact.abs().max().item()
    return [(t.flatten(2)[:, :, pixels].double() - exact).abs().max().item() / scale for t in results]


def _sample(workload: Workload) -> Tensor:
    """The numbers of some pixels, always the same."""
    whole = workload.size[0] * workload.size[1]
    return torch.randperm(whole, generator=torch.Generator().manual_seed(0))[:_SAMPLE].sort().values
