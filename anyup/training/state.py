"""Checkpoints of a run: complete or absent, read by `anyup.load`, and enough to go on exactly.

A file holds the weights to use (the average, where there is one) under "anyup" with the constructor's arguments under
"config", and under "training" what the run goes on from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyup.finite import not_finite
from anyup.images import complete_or_absent
from anyup.model import AnyUp
from anyup.tensor_files import read_torch

LATEST = "latest.pth"


@dataclass
class State:
    """Where a run stands after `step` steps and `samples` samples."""

    step: int
    samples: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    settings: dict[str, Any]
    photographs: str  # a hash of their names
    processes: int = 0  # that shared each step; 0: an older version did not say
    scaler: dict[str, Any] = field(default_factory=dict)  # of float16's gradients; empty: another precision


def save(path: Path, state: State, shipped: dict[str, Tensor], upsampler: AnyUp) -> None:
    """Write a checkpoint; `shipped` are the weights that `anyup.load` gives.

    Raises FloatingPointError where weights are not finite: an older checkpoint stays as it was.
    """
    if bad := not_finite(shipped) or not_finite(state.weights):
        raise FloatingPointError(f"step {state.step}: weights are not finite: {bad}; the last checkpoint is whole")
    content = {
        "anyup": {name: tensor.detach().cpu() for name, tensor in shipped.items()},
        "config": dict(upsampler.config),
        "training": {
            "step": state.step,
            "samples": state.samples,
            "weights": state.weights,
            "optimizer": state.optimizer,
            "settings": state.settings,
            "photographs": state.photographs,
            "processes": state.processes,
            "scaler": state.scaler,
        },
    }
    with complete_or_absent(path) as partial:
        torch.save(content, partial)


def load(path: Path) -> tuple[State, dict[str, Tensor]]:
    """A checkpoint's state and the weights to use; ValueError for a file that is none or is not finite."""
    try:
        content = read_torch(path)
        state, shipped = State(**content["training"]), content["anyup"]
        bad = not_finite(shipped) or not_finite(state.weights)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of a training run: {error} is missing or another thing") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint of a training run: {error}") from error
    if bad:
        raise ValueError(f"{path}: weights are not finite, the training has diverged: {bad}")
    return state, shipped
