"""The named workloads: one list for every benchmark and for `anyup tune`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.window import Window, axis_bounds


@dataclass(frozen=True)
class Workload:
    """An image and a grid of features; the output has the image's size."""

    size: tuple[int, int]
    grid: tuple[int, int]
    channels: int = 384
    batch: int = 1

    @property
    def name(self) -> str:
        """As the tables say it: "448 from 32", "640x480 from 45x34, C 96, batch 4"."""
        size, grid = (str(a) if a == b else f"{a}x{b}" for a, b in (self.size, self.grid))
        channels = "" if self.channels == 384 else f", C {self.channels}"
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        return f"{size} from {grid}{channels}{batch}"

    @property
    def pixels(self) -> int:
        """Pixels of the output, the batch included."""
        return self.batch * self.size[0] * self.size[1]

    @property
    def keys(self) -> int:
        """Keys in the grid of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def output_bytes(self) -> int:
        """Of the float32 output."""
        return 4 * self.channels * self.pixels

    def mean_window(self, window: Window) -> float:
        """Exact mean number of keys in a pixel's window."""
        mean = 1.0
        for queries, keys in zip(self.size, self.grid, strict=True):
            start, stop = axis_bounds(window, queries, keys)
            mean *= (sum(stop) - sum(start)) / queries
        return mean

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) and features (B, C, h, w), float32 noise, the same in each process."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(self.batch, 3, *self.size, generator=generator)
        return image, torch.randn(self.batch, self.channels, *self.grid, generator=generator)


def square(size: int, grid: int, **more: int) -> Workload:
    """A square image and a square grid."""
    return Workload((size, size), (grid, grid), **more)


REACH = (square(224, 16), square(448, 32), square(1024, 64))
"""What the claims are made about."""

CURVE = (
    square(224, 16),
    square(336, 24),
    square(448, 32),
    square(672, 48),
    square(896, 64),
    square(1024, 64),
    square(1536, 96),
    square(2048, 128),
)
"""Strides 14 and 16 at one number of channels."""

TRAINING = square(224, 16, batch=4)
"""A step of the published recipe."""

UNIFICATION = square(448, 64, channels=1024)
"""The grid on which the feature unification is measured alone; the image plays no part."""

WORKLOADS = (
    *REACH,
    square(448, 28),
    square(518, 37),
    Workload((640, 480), (45, 34)),
    square(2048, 128),
    TRAINING,
    *(square(448, 32, channels=channels) for channels in (96, 768, 1024, 1536)),
)


def find(name: str) -> Workload:
    """The workload of a name; raises ValueError listing the names there are."""
    workloads = {w.name: w for w in (*WORKLOADS, *CURVE, UNIFICATION)}
    if name not in workloads:
        raise ValueError(f"workload: expected one of {', '.join(workloads)}, got {name!r}")
    return workloads[name]
