"""Photographs of a training: holding some out, and the square views that are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anyup.images import read_photo, resize
from anyup.training.randomness import drawer


def split(paths: Sequence[Path], every: int = 10) -> tuple[list[Path], list[Path]]:
    """(to train on, held out): of the paths sorted by name, the last of each `every` is held out; 0: none is."""
    if every < 0 or every == 1:
        raise ValueError(f"every: expected 0 (hold nothing out) or 2 and more, got {every}")
    ordered = sorted(paths, key=lambda path: (path.name, path.as_posix()))
    held_out = ordered[every - 1 :: every] if every else []
    kept = set(held_out)
    return [path for path in ordered if path not in kept], held_out


def read_large(path: Path, min_side: int) -> Tensor:
    """A photograph (1, 3, H, W) in 0..1; OSError or ValueError where it is broken or a side is below `min_side`."""
    photo = read_photo(path)
    short = min(photo.shape[2:])
    if short < min_side:
        raise ValueError(f"{path}: its short side is {short} pixels, less than data.min_side, {min_side}")
    return photo


def square_crop(rgb01: Tensor, side: int) -> Tensor:
    """The central square of a photograph (1, 3, H, W) in 0..1 whose short side is resized to `side`, antialiased."""
    return view_of(rgb01, WHOLE, side)


@dataclass(frozen=True)
class View:
    """A square of a photograph: its side as a fraction of the short side, its place in what is left, mirrored or not.

    `top` and `left` run from 0 to 1.
    """

    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False


WHOLE = View()


def draw_view(name: str, index: int, seed: int, scales: tuple[float, float]) -> View:
    """View number `index` of the photograph of that name: 0 is the central square as it is, the others are drawn."""
    if index == 0:
        return WHOLE
    draw = drawer(seed, "view", name, index)
    scale = draw.uniform(*scales)
    return View(scale, draw.random(), draw.random(), draw.random() < 0.5)


def view_of(rgb01: Tensor, view: View, side: int) -> Tensor:
    """A view (1, 3, side, side) of a photograph (1, 3, H, W) in 0..1."""
    height, width = rgb01.shape[2:]
    square = max(1, round(min(height, width) * view.scale))
    top, left = round((height - square) * view.top), round((width - square) * view.left)
    crop = resize(rgb01[:, :, top : top + square, left : left + square], (side, side))
    return crop.flip(3) if view.mirrored else crop
