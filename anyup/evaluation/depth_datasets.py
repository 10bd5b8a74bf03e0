"""Data sets of depth and normals as they lie on disk: frames, each an image with its depth, its normals, or both."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.evaluation.datasets import Layout, first_and_number, in_either_case
from anyup.evaluation.normals import Camera, normals_of_depth
from anyup.fingerprint import file_fingerprint, tensor_fingerprint
from anyup.images import check_readable, read_photo, read_picture
from anyup.installing import pip_install
from anyup.photographs import pictures_below


@dataclass(frozen=True)
class Frame(ABC):
    """One image and what is known of its geometry, at the image's size.

    Attributes:
        camera: of the depth map, None where the data set does not say.
    """

    name: str
    camera: Camera | None

    @abstractmethod
    def photo(self) -> Tensor:
        """(1, 3, H, W) in 0..1."""

    @abstractmethod
    def depth(self) -> Tensor:
        """(H, W) float32 in metres, 0 where unknown."""

    def stored_normals(self) -> Tensor | None:
        """(3, H, W) float32 unit vectors, zero where unknown; None where the data set has no normals of the frame."""
        return None

    def fitted_normals(self, camera: Camera, window: int) -> Tensor:
        """(3, H, W) float32: those of planes fitted to the depth (`normals_of_depth`)."""
        return normals_of_depth(self.depth(), camera, window)

    def fingerprint(self) -> str:
        """Hash of the image."""
        return tensor_fingerprint(self.photo())

    def variant(self) -> Mapping[str, object]:
        """What else decides how the image is read, for a cache."""
        return {}


@dataclass(frozen=True)
class FileFrame(Frame):
    """A frame in files of its own.

    The image is as its file stores it where its size is so the map's, else turned by its orientation tag: as an image
    beside a mask without a tag (`datasets.Sample`).
    """

    image: Path
    depth_file: Path | None
    normals_file: Path | None

    def photo(self) -> Tensor:
        return read_photo(self.image, turned=not self._as_stored())

    def variant(self) -> Mapping[str, object]:
        return {"as_stored": True} if self._as_stored() else {}

    def _as_stored(self) -> bool:
        stored = read_picture(self.image)
        return (stored.orientation or 1) > 1 and self._size() == stored.pixels.size

    def _size(self) -> tuple[int, int]:
        """(width, height) of what is known of the geometry."""
        known = self.depth() if self.depth_file else self.stored_normals()
        assert known is not None
        return known.shape[-1], known.shape[-2]

    def depth(self) -> Tensor:
        if self.depth_file is None:
            raise ValueError(f"{self.image}: expected a depth map, there is none")
        return _sixteen_bits(self.depth_file) / 1000

    def stored_normals(self) -> Tensor | None:
        return None if self.normals_file is None else _read_normals(self.normals_file)

    def fingerprint(self) -> str:
        return file_fingerprint(self.image)


def _sixteen_bits(path: Path) -> Tensor:
    """(H, W) float32 of a picture of one channel of 16 bits."""
    pixels = read_picture(path).pixels
    if pixels.mode != "I" and not pixels.mode.startswith("I;16"):
        raise ValueError(f"{path}: expected a picture of one channel of 16 bits, got Pillow's mode {pixels.mode}")
    return torch.from_numpy(numpy.array(pixels).astype(numpy.float32))


def _read_normals(path: Path) -> Tensor:
    """Normals of an array (H, W, 3), or of a picture whose levels 0 to 255 are -1 to 1, black where unknown."""
    if path.suffix.lower() == ".npy":
        array = numpy.load(check_readable(path), allow_pickle=False)
        if array.ndim != 3 or array.shape[2] != 3 or not numpy.issubdtype(array.dtype, numpy.floating):
            raise ValueError(
                f"{path}: expected floating-point normals (H, W, 3), got {array.dtype} of shape {array.shape}"
            )
        return _unit(torch.from_numpy(array.astype(numpy.float32)).permute(2, 0, 1))
    levels = read_photo(path, turned=False)[0]
    return _unit(torch.where(levels.sum(dim=0) > 0, levels * 2 - 1, 0))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (3, H, W) of length one; zero where they have no direction."""
    return F.normalize(torch.where(vectors.isfinite().all(dim=0), vectors, 0), dim=0)


def _folders(root: Path, split: str) -> list[Frame]:
    """images/SPLIT, with depth/SPLIT or normals/SPLIT or both."""
    images, depths, normals = (root / kind / split for kind in ("images", "depth", "normals"))
    if not images.is_dir() or not (depths.is_dir() or normals.is_dir()):
        raise FileNotFoundError(
            f"data: expected folders {str(images)!r} and {str(depths)!r} or {str(normals)!r}, one is missing"
        )
    frames: list[Frame] = []
    alone = []
    for image in pictures_below(images):
        name = image.relative_to(images).with_suffix("").as_posix()
        depth = _first(depths / f"{name}.png")
        of_normals = _first(normals / f"{name}.npy", normals / f"{name}.png")
        if depth or of_normals:
            frames.append(FileFrame(name, None, image, depth, of_normals))
        else:
            alone.append(name)
    if alone:
        warnings.warn(f"data: left out, images without depth or normals: {first_and_number(alone)}", stacklevel=2)
    return frames


def _first(*paths: Path) -> Path | None:
    return next((path for path in map(in_either_case, paths) if path.is_file()), None)


NYUV2 = Camera(fx=518.85790, fy=519.46961, cx=325.58245, cy=253.73617)
"""The colour camera of NYU Depth V2, to which its depth is registered, as its toolbox gives it."""

_LABELLED, _SPLITS, _GEONET = "nyu_depth_v2_labeled.mat", "splits.mat", "nyu_geonet"


@dataclass(frozen=True)
class LabelledFrame(Frame):
    """A frame of NYU Depth V2's labelled file: its image and its raw depth, of which unseen pixels are unknown."""

    path: Path
    index: int

    def photo(self) -> Tensor:
        pixels = self._read("images").transpose(0, 2, 1)  # (3, W, H): MATLAB's order of axes, reversed
        return torch.from_numpy(pixels.astype(numpy.float32))[None] / 255

    def depth(self) -> Tensor:
        depth = torch.from_numpy(self._read("rawDepths").T.astype(numpy.float32))
        return torch.where(depth.isfinite() & (depth > 0), depth, 0)

    def _read(self, what: str) -> Any:
        import h5py

        with h5py.File(self.path, "r") as file:
            return file[what][self.index]


def _labelled(root: Path, split: str) -> list[Frame]:
    path, splits = check_readable(root / _LABELLED), check_readable(root / _SPLITS)
    if split not in ("train", "test"):
        raise ValueError(f"data: expected the split train or test with this layout, got {split!r}")
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs h5py: {pip_install('h5py')}") from error
    key = f"{split}Ndxs"
    indices = _matlab(splits).get(key)
    if indices is None:
        raise ValueError(f"{splits}: expected the array {key}, there is none")
    with h5py.File(path, "r") as file:
        if missing := sorted({"images", "rawDepths"} - set(file)):
            raise ValueError(f"{path}: expected the array {missing[0]}, there is none")
        count = len(file["images"])
    numbers = [int(index) for index in numpy.ravel(indices)]
    if outside := [number for number in numbers if not 1 <= number <= count]:
        raise ValueError(f"{splits}: expected frames of 1 to {count}, those of {path.name}, got {outside[0]}")
    return [LabelledFrame(f"{number:04}", NYUV2, path, number - 1) for number in numbers]


def _matlab(path: Path) -> dict[str, Any]:
    """The arrays of a file of MATLAB 5."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs SciPy: {pip_install('scipy')}") from error
    try:
        arrays: dict[str, Any] = loadmat(check_readable(path))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path}: expected a file of MATLAB 5 ({error})") from error
    return arrays


_GEONET_MEAN = (122.175, 116.169, 103.508)  # of RGB, which GeoNet's files have subtracted twice


@dataclass(frozen=True)
class GeoNetFrame(Frame):
    """A frame of GeoNet's training files for NYU Depth V2: `img`, `depth` and `norm`."""

    path: Path

    def photo(self) -> Tensor:
        pixels = torch.from_numpy(self._read("img").astype(numpy.float32)).permute(2, 0, 1)
        return (pixels + 2 * torch.tensor(_GEONET_MEAN)[:, None, None]).clamp(0, 255).floor()[None] / 255

    def depth(self) -> Tensor:
        depth = torch.from_numpy(self._read("depth").astype(numpy.float32))
        return torch.where(depth.isfinite() & (depth > 0), depth, 0)

    def stored_normals(self) -> Tensor | None:
        return _unit(torch.from_numpy(self._read("norm").astype(numpy.float32)).permute(2, 0, 1))

    def _read(self, what: str) -> Any:
        arrays = _read_geonet(self.path)
        if what not in arrays:
            raise ValueError(f"{self.path}: expected the array {what}, there is none")
        return arrays[what][:480, :640]


@lru_cache(maxsize=1)
def _read_geonet(path: Path) -> dict[str, Any]:
    return _matlab(path)


def _geonet(root: Path, split: str) -> list[Frame]:
    """GeoNet's files to train on; NYU's labelled test frames to test on."""
    if split != "train":
        return _labelled(root, split)
    folder = root / _GEONET
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder {str(folder)!r}, there is none")
    return [GeoNetFrame(path.stem, NYUV2, path) for path in sorted(folder.glob("*.mat"))]


_NAVI_DISPARITY = 655.35  # of a pixel's value and its depth in metres, the product


@dataclass(frozen=True)
class NaviFrame(FileFrame):
    """A photograph of NAVI, cut to a square around the object, whose depth alone is known."""

    def photo(self) -> Tensor:
        top, left, side = self._box()
        return read_photo(self.image)[:, :, top : top + side, left : left + side]

    def depth(self) -> Tensor:
        top, left, side = self._box()
        return self._whole()[top : top + side, left : left + side]

    def fitted_normals(self, camera: Camera, window: int) -> Tensor:
        # Of the whole photograph, whose camera is known.
        top, left, side = self._box()
        return normals_of_depth(self._whole(), camera, window)[:, top : top + side, left : left + side]

    def variant(self) -> Mapping[str, object]:
        return {"box": list(self._box())}

    def _whole(self) -> Tensor:
        assert self.depth_file is not None
        values = _sixteen_bits(self.depth_file)
        return torch.where(values > 0, _NAVI_DISPARITY / values, 0)

    def _box(self) -> tuple[int, int, int]:
        """(top, left, side) of the square that holds the object, or as much of it as the picture has room for."""
        depth = self._whole()
        rows, columns = ((depth > 0).any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        if not rows:
            raise ValueError(f"{self.depth_file}: expected known depth, there is none")
        side = min(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1, *depth.shape)
        middles = ((rows[0] + rows[-1] + 1) // 2, (columns[0] + columns[-1] + 1) // 2)
        top, left = (min(max(m - side // 2, 0), length - side) for m, length in zip(middles, depth.shape, strict=True))
        return top, left, side


def _navi(root: Path, split: str) -> list[Frame]:
    """OBJECT/multiview_* to train on, OBJECT/wild_set to test on."""
    patterns = {"multiview": "*/multiview_*", "wild": "*/wild_set"}
    if split not in patterns:
        raise ValueError(f"data: expected the split {' or '.join(patterns)} with this layout, got {split!r}")
    frames: list[Frame] = []
    for scene in sorted(root.glob(patterns[split])):
        focal_lengths = _navi_focal_lengths(scene / "annotations.json")
        for image in pictures_below(scene / "images"):
            stem = image.stem.removeprefix("downsampled_")
            depth = scene / "depth" / f"{image.stem}.png"
            # Where there are smaller copies of the photographs, they are taken.
            shrunk = image.with_name(f"downsampled_{image.name}")
            if stem in focal_lengths and depth.is_file() and not shrunk.is_file():
                frames.append(_navi_frame(root, image, depth, focal_lengths[stem]))
    return frames


def _navi_focal_lengths(path: Path) -> dict[str, float]:
    """Of each photograph, by its name without the suffix: its focal length in multiples of its short side."""
    text = check_readable(path).read_text(encoding="utf-8")
    try:
        return {
            Path(entry["filename"]).stem: entry["camera"]["focal_length"] / min(entry["image_size"])
            for entry in json.loads(text)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected filename, image_size and camera, focal_length of each photograph "
            f"({type(error).__name__}: {error})"
        ) from error


def _navi_frame(root: Path, image: Path, depth: Path, focal_length: float) -> Frame:
    name = image.relative_to(root).with_suffix("").as_posix()
    # A normal needs no principal point beside the middle's.
    width, height = read_picture(depth).pixels.size
    focal = focal_length * min(width, height)
    return NaviFrame(name, Camera(focal, focal, width / 2 - 0.5, height / 2 - 0.5), image, depth, None)


LAYOUTS: dict[str, Layout[Frame]] = {
    "folders": Layout(_folders, "train", "val"),
    "nyuv2": Layout(_labelled, "train", "test"),
    "nyuv2-geonet": Layout(_geonet, "train", "test"),
    "navi": Layout(_navi, "multiview", "wild"),
}
"""The arrangements that are known by name; docs/evaluation.md shows each."""
