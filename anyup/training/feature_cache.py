"""Frozen features on disk, so that an epoch costs the upsampler alone.

For each photograph there is one file with its views as pixels (what guides the upsampling), and one for each encoder
with the features of the views at the input sizes and of a fixed pool of aligned crops. The folder of a file is
named by everything that its content depends on, the encoder's weights included: a changed recipe reads no stale file.
Files are written whole or not at all, and several processes may fill one cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyup.encoders import Encoder
from anyup.fingerprint import module_fingerprint
from anyup.images import complete_or_absent, resize
from anyup.tensor_files import read_torch
from anyup.training.config import ConfigError, Data
from anyup.training.photographs import draw_view, read_large, view_of
from anyup.training.randomness import Key, drawer

_FORMAT = 1  # of the files; another one reads none of the old
_BATCH = 16  # images that an encoder sees at a time


@dataclass(frozen=True)
class Recipe:
    """What is taken of each photograph; see `anyup.training.config.Data`."""

    seed: int
    image_size: int
    crop_size: int
    input_sizes: tuple[int, ...]
    views: int
    view_scales: tuple[float, float]
    crops: int
    guidance_size: int
    min_side: int

    @classmethod
    def of(cls, data: Data, guidance_size: int, seed: int) -> Recipe:
        taken = {f.name: getattr(data, f.name) for f in dataclasses.fields(cls) if hasattr(data, f.name)}
        return cls(seed=seed, guidance_size=guidance_size, **taken)


@dataclass(frozen=True)
class Features:
    """One encoder's features of one view: `low` (C, h, w), `targets` (K, C, hc, wc), `places` (K, 2) in cells."""

    low: Tensor
    targets: Tensor
    places: Tensor


@dataclass(frozen=True)
class Grid:
    """The cells of an encoder's maps: `stride` pixels a cell, `image` and `crop` cells a side."""

    stride: int
    image: int
    crop: int

    @classmethod
    def of(cls, encoder: Encoder, recipe: Recipe) -> Grid:
        """Raises ConfigError where the encoder's stride divides a size of the recipe badly."""
        for name, size in (("data.image_size", recipe.image_size), ("data.crop_size", recipe.crop_size)):
            if size % encoder.stride:
                what = f"a multiple of {encoder.name}'s stride {encoder.stride}"
                raise ConfigError(f"{name}: expected {what}, got {size}")
        if not input_sizes(encoder, recipe):
            raise ConfigError(
                f"data.input_sizes: expected a multiple of {encoder.name}'s stride {encoder.stride} among them, "
                f"got {list(recipe.input_sizes)}"
            )
        return cls(encoder.stride, recipe.image_size // encoder.stride, recipe.crop_size // encoder.stride)


def input_sizes(encoder: Encoder, recipe: Recipe) -> list[int]:
    """Those input sizes of the recipe whose cells lie on the encoder's grid."""
    return [size for size in recipe.input_sizes if size % encoder.stride == 0]


class FeatureCache:
    """The files of one recipe in a folder.

    `root` is the photographs' folder: a photograph is known by its path below it, its size and its date.
    """

    def __init__(self, folder: str | os.PathLike[str], root: str | os.PathLike[str], recipe: Recipe) -> None:
        self.recipe = recipe
        self.views, self.crops = recipe.views, recipe.crops
        self._folder, self._root = Path(folder), Path(root)
        pixels = dataclasses.replace(recipe, crops=0, crop_size=0, input_sizes=(), image_size=0)
        self._views = self._folder / f"views-{_hash(_FORMAT, pixels)}"
        self._encoders: dict[str, Path] = {}
        self.grids: dict[str, Grid] = {}
        self.input_sizes: dict[str, list[int]] = {}

    def fill(
        self,
        name: str,
        encoder: Encoder,
        paths: Sequence[Path],
        *,
        done: Callable[[int], None] = lambda count: None,
        broken: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Write what is missing of an encoder's files and of the views'; `name` is what the encoder is asked for by.

        `done` is told after each photograph how many are through; `broken` why one cannot be read, or is smaller
        than a view needs: it is passed over and has no file.
        """
        self.register(name, encoder)
        folder = self._encoders[name]
        for made in (self._views, folder):
            made.mkdir(parents=True, exist_ok=True)
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        for count, path in enumerate(paths, 1):
            try:
                there = self._file(folder, path).is_file() and self._file(self._views, path).is_file()
                photo = None if there else read_large(path, self.recipe.min_side)
            except (OSError, ValueError) as error:
                broken(error)
            else:
                if photo is not None:
                    self._write(name, encoder, path, photo, device)
            done(count)

    def register(self, name: str, encoder: Encoder) -> None:
        """Make an encoder's files known under a name, without writing any."""
        self.grids[name] = Grid.of(encoder, self.recipe)
        self.input_sizes[name] = input_sizes(encoder, self.recipe)
        facts = (encoder.name, encoder.stride, module_fingerprint(encoder))
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", encoder.name)
        recipe = dataclasses.replace(self.recipe, guidance_size=0, min_side=0)
        self._encoders[name] = self._folder / f"{slug}-{_hash(_FORMAT, facts, recipe)}"

    def usable(self, path: Path) -> bool:
        """Whether a photograph is there, and has its views and every registered encoder's features."""
        try:
            return all(self._file(folder, path).is_file() for folder in (self._views, *self._encoders.values()))
        except OSError:
            return False

    def guidance(self, path: Path, view: int) -> Tensor:
        """The pixels of a view (3, S, S) as bytes, S the recipe's guidance size."""
        stored: Tensor = _read(self._file(self._views, path))["guidance"][view]
        return stored.clone()

    def features(self, path: Path, encoder: str, view: int, input_size: int, crops: Sequence[int]) -> Features:
        """An encoder's features of a view in float32: at an input size, and of these crops of its pool."""
        stored = _read(self._file(self._encoders[encoder], path))
        chosen = torch.tensor(list(crops))
        return Features(
            stored[f"low_{input_size}"][view].float(),
            stored["crops"][view][chosen].float(),
            stored["places"][view][chosen].long(),
        )

    def _write(self, name: str, encoder: Encoder, path: Path, photo: Tensor, device: torch.device) -> None:
        recipe, called = self.recipe, self._name(path)
        grid = self.grids[name]
        views = [draw_view(called, index, recipe.seed, recipe.view_scales) for index in range(recipe.views)]
        pixels = self._file(self._views, path)
        if not pixels.is_file():
            side = recipe.guidance_size
            guidance = torch.cat([view_of(photo, view, side) for view in views])
            _save(pixels, {"guidance": guidance.mul(255).round().to(torch.uint8)})
        target = self._file(self._encoders[name], path)
        if target.is_file():
            return
        images = torch.cat([view_of(photo, view, recipe.image_size) for view in views])
        places = torch.tensor(
            [draw_places(range(recipe.crops), grid, recipe.seed, encoder.name, called, v) for v in range(recipe.views)]
        )
        stored = {
            f"low_{size}": encode(encoder, resize(images, (size, size)), device) for size in self.input_sizes[name]
        }
        crops = encode(encoder, cut_crops(images, places, grid.stride, recipe.crop_size), device)
        stored["crops"] = crops.unflatten(0, places.shape[:2])
        _save(target, {**{key: _half(value) for key, value in stored.items()}, "places": places.to(torch.int16)})

    def _name(self, path: Path) -> str:
        """What a photograph is called: its path below the folder of photographs."""
        return path.relative_to(self._root).as_posix()

    def _file(self, folder: Path, path: Path) -> Path:
        status = path.stat()
        return folder / f"{path.stem[:60]}-{_hash(self._name(path), status.st_size, status.st_mtime_ns)}.pt"


def draw_places(crops: Iterable[int], grid: Grid, *key: Key) -> list[tuple[int, int]]:
    """The first row and column, in cells, of the aligned crops of these numbers in a key's pool."""
    free = grid.image - grid.crop
    draws = [drawer("crop", *key, crop) for crop in crops]
    return [(draw.randint(0, free), draw.randint(0, free)) for draw in draws]


def cut_crops(images: Tensor, places: Tensor, stride: int, side: int) -> Tensor:
    """The crops (V * K, 3, side, side) of views (V, 3, S, S) at places (V, K, 2) in cells of `stride` pixels."""
    crops = []
    for image, corners in zip(images, (places * stride).tolist(), strict=True):
        crops += [image[:, top : top + side, left : left + side] for top, left in corners]
    return torch.stack(crops)


def encode(encoder: Encoder, rgb01: Tensor, device: torch.device) -> Tensor:
    """Features (B, C, h, w) of images in 0..1, on the CPU; a few images at a time."""
    with torch.inference_mode():
        parts = [encoder(encoder.normalize(part.to(device))).cpu() for part in rgb01.split(_BATCH)]
    cells = rgb01.shape[2] // encoder.stride
    if parts[0].shape[2:] != (cells, cells):
        raise ValueError(
            f"{encoder.name}: expected {cells} x {cells} cells of its stride {encoder.stride} for an image of "
            f"{rgb01.shape[2]} pixels, got {parts[0].shape[2]} x {parts[0].shape[3]}"
        )
    return torch.cat(parts)


def _half(tensor: Tensor) -> Tensor:
    """In float16, or as it is where that overflows."""
    half = tensor.half()
    return half if bool(half.isfinite().all()) else tensor


def _hash(*facts: object) -> str:
    plain = [dataclasses.asdict(f) if dataclasses.is_dataclass(f) and not isinstance(f, type) else f for f in facts]
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=6).hexdigest()


def _save(path: Path, content: dict[str, Tensor]) -> None:
    with complete_or_absent(path) as partial:
        torch.save(content, partial)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content: dict[str, Tensor] = read_torch(path, mmap=True)
    except ValueError as error:
        raise ValueError(f"{path}: a damaged file of the cache ({error}); delete it and start again") from error
    return content
