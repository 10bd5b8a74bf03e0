"""Segmentation data sets as they lie on disk: pairs of image and index mask, and what the mask's values mean."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.images import read_photo
from anyup.training.photographs import SUFFIXES

VOID = 255
"""The label of pixels that count for nothing, whatever value a data set uses."""


@dataclass(frozen=True)
class Sample:
    """One image and its mask."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Labels:
    """What a mask's values mean: `table[value]` is the class of a value 0..255, VOID, or -1 where it must not occur."""

    names: tuple[str, ...]
    table: tuple[int, ...]

    @property
    def classes(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Layout:
    """One way of arranging a data set: how samples of a split are found, and the splits to train and to test on."""

    find: Callable[[Path, str], list[Sample]]
    train: str
    test: str
    labels: Labels | None = None  # None: the user says


def make_labels(names: Sequence[str], void: Sequence[int] = (VOID,), first: int = 0) -> Labels:
    """Values `first` ... are the classes in order, those of `void` void, and no others may occur."""
    classes = {first + index: index for index in range(len(names))}
    if len(names) < 2:
        raise ValueError(f"classes: at least 2 expected, got {len(names)}")
    if first + len(names) > VOID:
        raise ValueError(f"classes: at most {VOID - first} expected, got {len(names)}")
    if clash := sorted(set(void) & classes.keys()):
        raise ValueError(f"void: values that are no class expected, got {clash[0]} beside {len(names)} classes")
    return _labels(names, {**classes, **dict.fromkeys(void, VOID)})


def _labels(names: Sequence[str], meaning: dict[int, int], otherwise: int = -1) -> Labels:
    return Labels(tuple(names), tuple(meaning.get(value, otherwise) for value in range(256)))


def load_split(root: str | os.PathLike[str], layout: Layout, split: str) -> list[Sample]:
    """The samples of a split, sorted by name; FileNotFoundError or ValueError where there are none."""
    folder = Path(root)
    if not folder.is_dir():
        raise NotADirectoryError(f"data: expected a folder, there is none at {str(folder)!r}")
    samples = sorted(layout.find(folder, split), key=lambda sample: sample.name)
    if not samples:
        raise ValueError(f"data: no images with masks in the split {split!r} of {str(folder)!r}")
    return samples


def read_image(path: Path, size: int) -> Tensor:
    """(1, 3, size, size) in 0..1: the short side resized to `size` (bilinear, antialiased), the centre cut out."""
    photo = read_photo(path)
    resized = _short_side(photo.shape[2], photo.shape[3], size)
    photo = F.interpolate(photo, size=resized, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
    return _centre(photo, size)


def read_mask(path: Path, labels: Labels, size: int) -> Tensor:
    """(size, size) uint8, classes and VOID, on the geometry of `read_image`; resized by nearest-exact.

    Raises ValueError for a mask that is not one channel of bytes, or that holds a value which must not occur.
    """
    values = _read_indices(path)
    table = torch.tensor(labels.table)
    classes = table[values.long()]
    if bool((classes < 0).any()):
        wrong = int(values[classes < 0][0])
        raise ValueError(f"{path}: a class (0 to {labels.classes - 1}) or a void value expected, got {wrong}")
    resized = _short_side(values.shape[0], values.shape[1], size)
    # The values are far below 2^24: float32 holds them exactly.
    mask = F.interpolate(classes[None, None].float(), size=resized, mode="nearest-exact")
    return _centre(mask, size)[0, 0].to(torch.uint8)


def check_pair(sample: Sample) -> None:
    """Raise ValueError where the image and its mask have different sizes; reads their headers only."""
    from PIL import Image

    with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
        if image.size != mask.size:
            raise ValueError(
                f"{sample.mask}: the size of its image, {image.size[1]} x {image.size[0]}, expected, got "
                f"{mask.size[1]} x {mask.size[0]}"
            )


def _read_indices(path: Path) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P"):  # a palette's indices are the classes, its colours are for people
                raise ValueError(f"{path}: a mask of one channel of bytes expected, got Pillow's mode {picture.mode}")
            return torch.from_numpy(numpy.array(picture))
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        raise ValueError(f"{path}: the mask cannot be decoded ({error})") from error


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    short = min(height, width)
    return max(size, int(height * size / short)), max(size, int(width * size / short))


def _centre(pixels: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def _pairs(images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> list[Sample]:
    """Images of a folder, and of those in it, that have a mask at the same place of another.

    `image_end` is what an image's name ends in (any picture where empty), `mask_end` what its mask's ends in instead.
    """
    if not images.is_dir() or not masks.is_dir():
        raise FileNotFoundError(f"data: folders {str(images)!r} and {str(masks)!r} expected, one is missing")
    samples, alone = [], []
    for image in images.rglob("*"):
        if not image.name.endswith(image_end) or image.suffix.lower() not in SUFFIXES or image.name.startswith("."):
            continue
        name = image.relative_to(images).as_posix()
        name = name[: -len(image_end)] if image_end else name[: -len(image.suffix)]
        mask = masks / f"{name}{mask_end}"
        if mask.is_file():
            samples.append(Sample(name, image, mask))
        else:
            alone.append(name)
    if samples and alone:
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        warnings.warn(f"data: left out, without a mask in {str(masks)!r}: {min(alone)}{more}", stacklevel=2)
    return samples


def _folders(root: Path, split: str) -> list[Sample]:
    return _pairs(root / "images" / split, root / "masks" / split)


def _camvid(root: Path, split: str) -> list[Sample]:
    return _pairs(root / split, root / f"{split}annot")


def _voc(root: Path, split: str) -> list[Sample]:
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Sample(n, root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in names]


def _ade20k(root: Path, split: str) -> list[Sample]:
    return _pairs(root / "images" / split, root / "annotations" / split)


def _cityscapes(root: Path, split: str) -> list[Sample]:
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    return _pairs(images, masks, "_leftImg8bit.png", "_gtFine_labelIds.png")


def _coco_stuff(root: Path, split: str) -> list[Sample]:
    places = [root / "annotations" / split, root / "stuffthingmaps" / split]
    masks = next((place for place in places if place.is_dir()), places[0])
    return _pairs(root / "images" / split, masks)


_CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"
)  # fmt: skip

_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# The evaluated classes and the ids under which they stand in *_labelIds.png; all other ids are void.
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip

# COCO-Stuff's 27 coarse classes. The masks hold a category's id minus one; the values of each class follow.
_COCO_STUFF = {
    "electronic": (71, 76), "appliance": (77, 82), "food": (51, 60), "furniture": (61, 70), "indoor": (83, 90),
    "kitchen": (43, 50), "accessory": (25, 32), "animal": (15, 24), "outdoor": (9, 14), "person": (0, 0),
    "sports": (33, 42), "vehicle": (1, 8),
}  # fmt: skip
_COCO_STUFF_STUFF = {
    "ceiling": (101, 102),
    "floor": (100, 113, 114, 115, 116, 117),
    "food stuff": (120, 121, 152, 169),
    "furniture stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": (170, 171, 172, 173, 174, 175, 176),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}


def _coco_stuff_labels() -> Labels:
    values = {name: tuple(range(first, last + 1)) for name, (first, last) in _COCO_STUFF.items()} | _COCO_STUFF_STUFF
    meaning = {value: index for index, of_class in enumerate(values.values()) for value in of_class}
    return _labels(tuple(values), {**meaning, VOID: VOID})


LAYOUTS: dict[str, Layout] = {
    "folders": Layout(_folders, "train", "val"),
    "camvid": Layout(_camvid, "train", "test", make_labels(_CAMVID, void=(len(_CAMVID),))),
    "voc": Layout(_voc, "train", "val", make_labels(_VOC)),
    "ade20k": Layout(
        _ade20k, "training", "validation", make_labels([str(index) for index in range(1, 151)], void=(0,), first=1)
    ),
    "cityscapes": Layout(
        _cityscapes,
        "train",
        "val",
        _labels(tuple(_CITYSCAPES.values()), {value: index for index, value in enumerate(_CITYSCAPES)}, VOID),
    ),
    "coco-stuff": Layout(_coco_stuff, "train2017", "val2017", _coco_stuff_labels()),
}
"""The arrangements that are known by name; docs/evaluation.md shows each."""
