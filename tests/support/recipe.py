"""Weights and inputs from a formula, the stored vectors that belong to them, and the named shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.interpreter import not_interpreted
from torch import Tensor

from anyup import AnyUp
from anyup.window import CellWindow, RatioWindow, Window

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Reproducible pseudo-random float32 numbers of a shape, computed in float64."""
    i = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    values = np.sin(i * 0.7390851332 * (1 + 0.013 * phase) + phase) + 0.5 * np.sin(i * i * 0.0011 + 1.7 * phase)
    return torch.from_numpy((shift + scale * values).reshape(shape)).float()


def fill(model: AnyUp, seed: int) -> AnyUp:
    """The model with every parameter but `rope.freqs` from the formula."""
    state = model.state_dict()
    for n, (name, tensor) in enumerate(sorted(state.items())):
        if name == "rope.freqs":
            continue
        shape, phase = tuple(tensor.shape), 1 + n + 101 * seed
        if len(shape) > 1:
            values = wave(shape, phase, (2.0 if "basis" in name else 1.6) / math.sqrt(math.prod(shape[1:])))
        else:
            values = wave(shape, phase, 0.2, 1.0 if name.endswith("weight") else 0.0)
        state[name] = values.to(tensor)
    model.load_state_dict(state)
    return model


class Call(NamedTuple):
    """A golden case, ready to run: `model(image, features, output_size)`."""

    model: AnyUp
    image: Tensor
    features: Tensor
    output_size: tuple[int, int] | None
    seed: int

    def __call__(self) -> Tensor:
        return self.model(self.image, self.features, self.output_size)


def golden_call(name: str, backend: str | None = None, dtype: torch.dtype = torch.float32) -> Call:
    """A case of the parity vectors with its model and inputs."""
    case = CASES[name]
    model = fill(AnyUp(**case.get("model", {}), backend=backend), case["seed"]).to(dtype).eval()
    image = wave((case["batch"], 3, *case["image"]), 3 + case["seed"], 0.8).to(dtype)
    features = wave((case["batch"], case["channels"], *case["features"]), 7 + case["seed"]).to(dtype)
    size = case.get("output_size")
    return Call(model, image, features, None if size is None else tuple(size), case["seed"])


@cache
def golden_arrays(name: str) -> dict[str, Tensor]:
    """One of the stored files ("outputs", "grads", "gaussian_derivatives") as float32 tensors by key."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


class AttentionShape(NamedTuple):
    """A problem for the window attention."""

    output: tuple[int, int]
    grid: tuple[int, int]
    channels: int = 5
    window: Window = RatioWindow(0.1)
    batch: int = 1
    heads: int = 2
    head_dim: int = 4


ATTENTION_SHAPES = {
    "square": AttentionShape((32, 32), (8, 8), channels=24, heads=4, head_dim=8),
    "several tiles": AttentionShape((80, 72), (20, 18), channels=3),
    "odd": AttentionShape((35, 21), (7, 5), channels=7),
    "prime": AttentionShape((37, 29), (11, 7)),
    "odd scale": AttentionShape((35, 105), (7, 15), channels=2),
    "one key": AttentionShape((9, 7), (1, 1)),
    "one row of keys": AttentionShape((16, 24), (1, 6)),
    "one column of keys": AttentionShape((24, 16), (6, 1)),
    "one pixel": AttentionShape((1, 1), (6, 5)),
    "batch 2": AttentionShape((18, 20), (6, 5), batch=2),
    "empty batch": AttentionShape((18, 20), (6, 5), batch=0),
    "tall": AttentionShape((96, 8), (24, 3)),
    "wide": AttentionShape((6, 120), (2, 30)),
    "one channel": AttentionShape((16, 16), (4, 4), channels=1),
    "many channels": AttentionShape((6, 6), (3, 3), channels=1537),
    "keys finer than pixels": AttentionShape((8, 7), (20, 24)),
    "ratio 0": AttentionShape((12, 16), (6, 8), window=RatioWindow(0.0)),
    "ratio below 0": AttentionShape((12, 16), (6, 8), window=RatioWindow(-1.0)),
    "tiny ratio": AttentionShape((40, 24), (20, 8), window=RatioWindow(0.01)),
    "half the grid": AttentionShape((20, 16), (10, 8), window=RatioWindow(0.5)),
    "nearly the grid": AttentionShape((20, 16), (10, 8), window=RatioWindow(0.9)),
    "no window": AttentionShape((20, 18), (5, 9), window=None),
    "cell": AttentionShape((32, 24), (16, 12), window=CellWindow(0.1)),
    "cell, wide": AttentionShape((33, 25), (11, 14), window=CellWindow(0.3)),
    "cell, whole grid": AttentionShape((16, 12), (8, 6), window=CellWindow(0.5)),
    "one head": AttentionShape((24, 24), (6, 6), heads=1, head_dim=16),
    "eight heads": AttentionShape((24, 24), (6, 6), heads=8, head_dim=2),
}
INTERPRETED = pytest.mark.skipif(not_interpreted() is not None, reason=str(not_interpreted()))

# What Triton's interpreter runs, program by program: heads as wide as the matrix units want them, few pixels.
KERNEL_SHAPES = {
    **{name: shape._replace(head_dim=16) for name, shape in ATTENTION_SHAPES.items()},
    "square": AttentionShape((24, 24), (6, 6), channels=24, heads=4, head_dim=16),
    "several tiles": AttentionShape((20, 40), (9, 10), channels=3, head_dim=16),
    "odd scale": AttentionShape((35, 15), (7, 5), channels=2, head_dim=16),
    "tall": AttentionShape((48, 8), (12, 3), head_dim=16),
    "wide": AttentionShape((6, 60), (2, 15), head_dim=16),
    "keys finer than pixels": AttentionShape((8, 7), (14, 12), head_dim=16),
    "cell, wide": AttentionShape((22, 25), (11, 14), window=CellWindow(0.3), head_dim=16),
    "wide heads": AttentionShape((18, 20), (6, 5), heads=1, head_dim=128),
    "heads of the model": AttentionShape((18, 20), (6, 5), channels=70, heads=4, head_dim=32),
}


def in_two_dtypes(names: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """(name, dtype): each name in float32, and every second one in float16 too.

    What kernels do in another way for a dtype (loads, stores, products) they do for all shapes alike.
    """
    halves = [(name, torch.float16) for number, name in enumerate(names) if not number % 2]
    return [(name, torch.float32) for name in names] + halves


def parts_of(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of some parts of a map: a row, two columns at the lower end, and a rectangle inside."""
    height, width = size
    return [
        (slice(0, 1), slice(0, width)),
        (slice(max(height - 3, 0), height), slice(width // 2, width // 2 + 2)),
        (slice(height // 2, min(height // 2 + 4, height)), slice(1, width)),
    ]


def attention_tensors(shape: AttentionShape, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Query, key and value of a shape, with weights that are neither flat nor saturated."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = shape.batch, (shape.heads, shape.head_dim)
    sizes = {
        "query": (batch, *shape.output, *heads),
        "key": (batch, *shape.grid, *heads),
        "value": (batch, *shape.grid, shape.channels),
    }
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
