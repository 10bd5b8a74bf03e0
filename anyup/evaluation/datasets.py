"""Segmentation data sets as they lie on disk: pairs of image and index mask, and what the mask's values mean."""

from __future__ import annotations

import codecs
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.fingerprint import file_fingerprint
from anyup.images import StoredPicture, check_readable, read_photo, read_picture, to_rgb01
from anyup.photographs import pictures_below
from anyup.reporting import Reporter

if TYPE_CHECKING:
    from PIL import Image

VOID = 255
"""The label of pixels that count for nothing, whatever value a data set uses."""

_LARGEST = 65535
"""Value of a mask's pixel: masks have up to 16 bits."""

_HINT = "With --layout folders, --classes, --first-class and --void say what values mean (0 and 255: --classes 0,255)"


@dataclass(frozen=True)
class Sample:
    """One image and its mask.

    Attributes:
        as_stored: the two match pixel by pixel as their files store them: neither is turned by its orientation tag.
    """

    name: str
    image: Path
    mask: Path
    as_stored: bool = False

    def photo(self) -> Tensor:
        """(1, 3, H, W) in 0..1."""
        return read_photo(self.image, turned=not self.as_stored)

    def fingerprint(self) -> str:
        """Hash of the image."""
        return file_fingerprint(self.image)

    def variant(self) -> Mapping[str, object]:
        """What else decides how the image is read, for a cache."""
        return {"as_stored": True} if self.as_stored else {}


@dataclass(frozen=True)
class Labels:
    """What a mask's values mean: `meaning[value]` is a value's class or VOID; `otherwise` is what all others mean,
    -1 where they must not occur."""

    names: tuple[str, ...]
    meaning: Mapping[int, int]
    otherwise: int = -1

    @property
    def classes(self) -> int:
        return len(self.names)

    def of(self, values: Tensor) -> Tensor:
        """The classes, VOID or -1 of values, int64."""
        table = torch.full((max(self.meaning) + 1,), self.otherwise)
        table[list(self.meaning)] = torch.tensor(list(self.meaning.values()))
        known = (values >= 0) & (values < len(table))
        return torch.where(known, table[values.clamp(0, len(table) - 1)], self.otherwise)

    def describe(self) -> str:
        """Which values are classes, and which are void."""
        void = [value for value, label in self.meaning.items() if label == VOID]
        classes = [value for value, label in self.meaning.items() if label != VOID]
        left = "all others" if self.otherwise == VOID else _shown(void) or "none"
        return f"classes {_shown(classes)}; void {left}"


_Found = TypeVar("_Found", bound="Named")


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Layout(Generic[_Found]):
    """One way of arranging a data set: how samples of a split are found, and the splits to train and to test on."""

    find: Callable[[Path, str], list[_Found]]
    train: str
    test: str
    labels: Labels | None = None  # None: the user says


def make_labels(names: Sequence[str], void: Sequence[int] = (VOID,), values: Sequence[int] | None = None) -> Labels:
    """The classes have these `values` in masks (0, 1 ... by default), void those of `void`, and no others may occur."""
    values = range(len(names)) if values is None else values
    if len(names) < 2:
        raise ValueError(f"classes: expected at least 2, got {len(names)}")
    if len(names) > VOID:
        raise ValueError(f"classes: expected at most {VOID}, got {len(names)}")
    if len(set(values)) < len(names):
        raise ValueError(f"classes: expected a value of its own for each, got {_shown(values)}")
    if outside := [value for value in (*values, *void) if not 0 <= value <= _LARGEST]:
        raise ValueError(f"classes and void: expected values of 0 to {_LARGEST}, got {outside[0]}")
    if clash := sorted(set(void) & set(values)):
        raise ValueError(
            f"void: expected values other than those of the classes, {_shown(values)}, got {clash[0]}. {_HINT}"
        )
    classes = {value: index for index, value in enumerate(values)}
    return Labels(tuple(names), {**classes, **dict.fromkeys(void, VOID)})


def _shown(values: Sequence[int]) -> str:
    """As in "0, 3 to 7, 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def load_split(
    root: str | os.PathLike[str], layout: Layout[_Found], split: str, what: str = "images with masks"
) -> list[_Found]:
    """The samples of a split, sorted by name; FileNotFoundError or ValueError where there are none."""
    folder = Path(root)
    if not folder.is_dir():
        raise NotADirectoryError(f"data: expected a folder, there is none at {str(folder)!r}")
    samples = sorted(layout.find(folder, split), key=lambda sample: sample.name)
    if not samples:
        raise ValueError(f"data: no {what} in the split {split!r} of {str(folder)!r}")
    return samples


def check_split(samples: Sequence[Sample], labels: Labels, size: int, split: str, reporter: Reporter) -> list[Sample]:
    """The samples that can be used, each with how it is turned, once all files have been read.

    What cannot be read is reported and left out. Classes that never occur at `size` (see `read_mask`) are reported too,
    and how much is void.

    Raises ValueError where an image and its mask differ in size, for a mask of other than class values or with a value
    that must not occur, where fewer than two classes occur, and where no sample is left.
    """
    usable: list[Sample] = []
    counts = torch.zeros(VOID + 1, dtype=torch.int64)
    for number, sample in enumerate(samples, 1):
        try:
            image, mask = read_picture(sample.image), read_picture(sample.mask)
            to_rgb01(image.pixels, sample.image)
        except (OSError, ValueError) as error:
            reporter.note_once(f"left out: {error}")
        else:
            usable.append(replace(sample, as_stored=_match_as_stored(sample, image, mask)))
            labelled = _labels_of(mask, sample.mask, labels, size, turned=not usable[-1].as_stored)
            counts += torch.bincount(labelled.flatten(), minlength=len(counts))
        reporter.tick(f"checking images and masks of {split!r}: {number} of {len(samples)}")
    if not usable:
        raise ValueError(f"data: none of {len(samples)} images with masks in the split {split!r} can be used")
    _report(usable, labels, counts, split, reporter)
    return usable


def _report(samples: Sequence[Sample], labels: Labels, counts: Tensor, split: str, reporter: Reporter) -> None:
    """Tell what the masks hold, and what of it looks wrong; `counts` are pixels of each label."""
    occurs = (counts[: labels.classes] > 0).tolist()
    void = f"{float(counts[VOID] / counts.sum()):.1%} of the pixels are void"
    if sum(occurs) < 2:
        found = next((f"only {name!r}" for name, there in zip(labels.names, occurs, strict=True) if there), "none")
        raise ValueError(
            f"data: at least two classes expected in the masks of {split!r}, got {found}; {void} "
            f"({labels.describe()}). {_HINT}"
        )
    reporter.note(f"{split!r}: {len(samples)} images, {sum(occurs)} of {labels.classes} classes occur, {void}")
    if absent := [name for name, there in zip(labels.names, occurs, strict=True) if not there]:
        reporter.note(f"WARNING: classes that never occur in {split!r}: {', '.join(absent)}")
    if stored := [sample.name for sample in samples if sample.as_stored]:
        reporter.note(
            f"{split!r}: {len(stored)} of {len(samples)} images are not turned by their EXIF orientation: their masks "
            f"match them as stored ({stored[0]}{' ...' if len(stored) > 1 else ''})"
        )


def _match_as_stored(sample: Sample, image: StoredPicture, mask: StoredPicture) -> bool:
    """Whether an image and its mask are taken as stored; False: each is turned by its own orientation tag.

    Their sizes decide. Where both ways agree, as for squares, a mask's own tag says that it is to be turned, and one
    without a tag is as its image is stored. ValueError where neither agrees.
    """
    stored = image.pixels.size == mask.pixels.size
    turned = image.turned_size == mask.turned_size
    if not (stored or turned):
        raise ValueError(f"{sample.mask}: expected the size of its image, {_size(image)}, got {_size(mask)}")
    turns = (image.orientation or 1) > 1 or (mask.orientation or 1) > 1
    return turns and stored and not (turned and mask.orientation is not None)


def _size(picture: StoredPicture) -> str:
    (width, height), turned = picture.pixels.size, picture.turned_size
    return f"{height} x {width}" + (f" (turned: {turned[1]} x {turned[0]})" if turned != (width, height) else "")


def square_image(photo: Tensor, size: int) -> Tensor:
    """(1, 3, H, W) in 0..1 to (1, 3, size, size): short side resized (bilinear, antialiased), centre cut out."""
    resized = _short_side(photo.shape[2], photo.shape[3], size)
    photo = F.interpolate(photo, size=resized, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
    return _centre(photo, size)


def square_map(values: Tensor, size: int) -> Tensor:
    """(C, H, W) float32 as (C, size, size), on the geometry of `square_image`; resized by nearest-exact."""
    resized = _short_side(values.shape[1], values.shape[2], size)
    return _centre(F.interpolate(values[None], size=resized, mode="nearest-exact"), size)[0]


def read_mask(sample: Sample, labels: Labels, size: int) -> Tensor:
    """(size, size) uint8, classes and VOID, on the geometry of `square_image`; resized by nearest-exact.

    Raises ValueError for a mask that is not one channel of whole numbers, or that holds a value which must not occur.
    """
    return _labels_of(read_picture(sample.mask), sample.mask, labels, size, turned=not sample.as_stored)


def _labels_of(mask: StoredPicture, path: Path, labels: Labels, size: int, turned: bool) -> Tensor:
    values = _values_of(mask.turned() if turned else mask.pixels, path)
    classes = labels.of(values)
    if bool((classes < 0).any()):
        wrong = values[classes < 0].unique().tolist()
        got = _shown(wrong[:10]) + f" and {len(wrong) - 10} others" * (len(wrong) > 10)
        raise ValueError(f"{path}: values expected: {labels.describe()}; got {got}. {_HINT}")
    # The values are far below 2^24: float32 holds them exactly.
    return square_map(classes[None].float(), size)[0].to(torch.uint8)


def _values_of(pixels: Image.Image, path: Path) -> Tensor:
    """(H, W) int64; a palette's indices are the classes, its colours are for people."""
    if pixels.mode not in ("1", "L", "P", "I") and not pixels.mode.startswith("I;16"):
        raise ValueError(
            f"{path}: expected a mask of one channel, the class of each pixel, got Pillow's mode {pixels.mode}; "
            "colours must become class values before"
        )
    values = torch.from_numpy(numpy.array(pixels).astype(numpy.int64))
    # Pillow spreads grey of 2 and 4 bits over 0 to 255.
    return values // {2: 85, 4: 17}.get(_grey_bits(path), 1)


def _grey_bits(path: Path) -> int:
    """Bits of a pixel, of a PNG without colours; 0 for another file."""
    with path.open("rb") as file:
        header = file.read(26)
    return header[24] if header[1:4] == b"PNG" and header[25] == 0 else 0


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    short = min(height, width)
    return max(size, int(height * size / short)), max(size, int(width * size / short))


def _centre(pixels: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def _pairs(images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> list[Sample]:
    """Images of a folder, and of those in it, that have a mask at the same place of another.

    `image_end` is what an image's name ends in (any picture where empty), `mask_end` what its mask's ends in instead;
    suffixes may be in upper case.
    """
    if not images.is_dir() or not masks.is_dir():
        raise FileNotFoundError(f"data: expected folders {str(images)!r} and {str(masks)!r}, one is missing")
    samples, alone = [], []
    for image in pictures_below(images):
        if not image.name.lower().endswith(image_end.lower()):
            continue
        name = image.relative_to(images).as_posix()
        name = name[: -len(image_end)] if image_end else name[: -len(image.suffix)]
        mask = in_either_case(masks / f"{name}{mask_end}")
        if mask.is_file():
            samples.append(Sample(name, image, mask))
        else:
            alone.append(mask)
    if alone:
        warnings.warn(f"data: left out, images without a mask: there is no {first_and_number(alone)}", stacklevel=2)
    return samples


def first_and_number(names: Sequence[str] | Sequence[Path]) -> str:
    """Of several names the first, and how many more there are."""
    return f"{sorted(names)[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def in_either_case(path: Path) -> Path:
    """The path, with its suffix in upper case where there is such a file and none of the path itself."""
    upper = path.with_suffix(path.suffix.upper())
    return upper if upper.is_file() and not path.is_file() else path


def _folders(root: Path, split: str) -> list[Sample]:
    return _pairs(root / "images" / split, root / "masks" / split)


def _camvid(root: Path, split: str) -> list[Sample]:
    return _pairs(root / split, root / f"{split}annot")


def _voc(root: Path, split: str) -> list[Sample]:
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    return [
        Sample(name, in_either_case(images / f"{name}.jpg"), in_either_case(masks / f"{name}.png"))
        for name in _read_list(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    ]


def _read_list(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 with a byte-order mark, that are not empty."""
    data = check_readable(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = data.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of names in UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


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
    return Labels(tuple(values), {**meaning, VOID: VOID})


LAYOUTS: dict[str, Layout[Sample]] = {
    "folders": Layout(_folders, "train", "val"),
    "camvid": Layout(_camvid, "train", "test", make_labels(_CAMVID, void=(len(_CAMVID),))),
    "voc": Layout(_voc, "train", "val", make_labels(_VOC)),
    "ade20k": Layout(
        _ade20k,
        "training",
        "validation",
        make_labels([str(index) for index in range(1, 151)], void=(0,), values=range(1, 151)),
    ),
    "cityscapes": Layout(
        _cityscapes,
        "train",
        "val",
        Labels(tuple(_CITYSCAPES.values()), {value: index for index, value in enumerate(_CITYSCAPES)}, VOID),
    ),
    "coco-stuff": Layout(_coco_stuff, "train2017", "val2017", _coco_stuff_labels()),
}
"""The arrangements that are known by name; docs/evaluation.md shows each."""
