"""The making of keys in float32 as one opaque operator, where the blocks of the unified features keep their width.

It has kernels alone: elsewhere the model makes keys step by step.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

from anyup.ops.dispatch import BackendFailure, Operation
from anyup.ops.key_grid.arguments import KeyGridProblem, KeyParameters
from anyup.ops.registration import register

OPERATION = Operation(
    "key_grid",
    {"triton": lambda: importlib.import_module("anyup.ops.key_grid.fused")},
    otherwise="step by step",
)


def make_keys(
    image_keys: Tensor, features: Tensor, parameters: KeyParameters, problem: KeyGridProblem, *, copies: bool
) -> tuple[Tensor, Tensor] | None:
    """The attention's keys (B, h, w, D), and with `copies` the features as (B, h, w, C); None: no kernel runs.

    Args:
        image_keys: (B, h, w, D), in the dtype of the result.
        features: (B, C, h, w), of any strides and floating dtype.
        parameters: of any floating dtypes.
        problem: of `describe`.
        copies: otherwise the second result is empty.
    """
    if OPERATION.explain(problem).chosen is None:
        return None
    try:
        return _forward(image_keys, features, parameters.flat(), copies)
    except BackendFailure as failure:
        OPERATION.give_up(OPERATION.choose(problem), problem, None, failure)
        return None


def _run_forward(image_keys: Tensor, features: Tensor, parameters: list[Tensor], copies: bool) -> tuple[Tensor, Tensor]:
    from anyup.ops.key_grid import fused

    return fused.forward(image_keys, features, KeyParameters.of(parameters), copies=copies)


def _fake_forward(image_keys, features, parameters, copies):  # type: ignore[no-untyped-def]
    batch, channels, height, width = features.shape
    copied = features.new_empty((batch, height, width, channels) if copies else (0,))
    return torch.empty_like(image_keys, memory_format=torch.contiguous_format), copied


def _flops(_image_keys, features, parameters, _copies):  # type: ignore[no-untyped-def]
    batch, channels, height, width = features
    # Each weight is a product for each cell; the unification's filters are one for each channel.
    basis = KeyParameters.of(parameters).basis
    weights = sum(math.prod(shape) for shape in parameters if len(shape) > 1) - math.prod(basis)
    taps_inside = 2 * height * width * basis[2] * basis[3]
    return 2 * batch * height * width * (channels * math.prod(basis) + weights) + taps_inside


_forward = register("key_grid", _run_forward, _fake_forward, flops=_flops)
