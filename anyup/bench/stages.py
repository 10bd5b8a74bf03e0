"""Where a call's time goes: each stage of the model alone, on the tensors that the stages before it made."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup import AnyUp
from anyup.bench.timing import Clock, Time
from anyup.ops import memory
from anyup.ops.feature_unification import unify_features
from anyup.ops.query_projection import project_queries

STAGES = (
    "image encoder",
    "key encoder",
    "query encoder",
    "3x3 and query projection",
    "feature unification",
    "aggregation",
    "window attention",
)
"""In the order of the forward pass; "aggregation" is what follows the unification on the small grid."""


class Stages:
    """The forward pass of a model in inference mode, stage by stage; the stages add up to the call.

    On the kernels they come to a little more: the encoders run one after the other, where a call runs the key and the
    query encoder together.

    Args:
        model: in eval mode.
        image: (B, 3, H, W); the output has its size.
        features: (B, C, h, w).
    """

    def __init__(self, model: AnyUp, image: Tensor, features: Tensor) -> None:
        self._model, self._image, self._features = model, image, features

    def seconds(self, repeats: int, clock: Clock) -> dict[str, float]:
        """Median seconds of each stage."""
        times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.run(clock)
        for _ in range(repeats):
            for stage, seconds in self.run(clock)[0].items():
                times[stage].append(seconds)
        return apart({stage: statistics.median(seconds) for stage, seconds in times.items()})

    def output(self) -> Tensor:
        """What the stages give together: the call's result."""
        return self.run(_untimed)[1]

    def run(self, clock: Clock) -> tuple[dict[str, float], Tensor]:
        """The seconds of each stage, the unification counted in the aggregation too, and the call's result."""
        with torch.inference_mode(), memory.reuse():
            return self._run(clock)

    def _run(self, clock: Clock) -> tuple[dict[str, float], Tensor]:
        model, features = self._model, self._features
        size, grid = _pair(self._image.shape[2:]), _pair(features.shape[2:])
        times: dict[str, float] = {}

        def stage(name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            made: list[Any] = []

            def run() -> None:
                made[:] = []  # a clock may call again
                made.append(function(*arguments, **named))

            times[name] = clock(run).seconds
            return made.pop()

        guidance = stage("image encoder", model.guidance, self._image)
        image_keys = stage("key encoder", model.encode, model.key_encoder, guidance, grid)
        encoded = stage("query encoder", model.encode, model.query_encoder, guidance, size)
        del guidance  # as the model does: a map of D channels at full resolution
        projection = model.cross_decode.query_parameters(encoded.dtype)
        backend = model.backends["query_projection"]
        queries = stage("3x3 and query projection", project_queries, encoded, projection, backend=backend)
        del encoded
        wide = torch.promote_types(features.dtype, torch.float32)
        normalised, basis = F.normalize(features.to(wide), dim=1), model.unification_basis(wide)
        backend = model.backends["feature_unification"]
        stage("feature unification", unify_features, normalised, basis, backend=backend)
        keys, copied = stage("aggregation", model.keys, image_keys, features)
        queries = model.cross_decode.split_heads(queries)
        out = stage("window attention", model.attend, queries, keys.to(queries.dtype), copied)
        return times, out


def apart(seconds: Mapping[str, float]) -> dict[str, float]:
    """The stages' seconds as they add up: the model makes the keys in one piece, whose rest is the aggregation."""
    return {**seconds, "aggregation": max(seconds["aggregation"] - seconds["feature unification"], 0.0)}


def _pair(size: Any) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


def _untimed(function: Callable[[], object]) -> Time:
    function()
    return Time(0.0)
