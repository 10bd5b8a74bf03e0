"""`anyup evaluate segmentation`: data sets, carried logits, probes trained side by side, and going on after a stop."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_training import Told
from support.tiny_encoder import make_encoder
from torch import Tensor
from torch.nn import functional as F

import anyup.encoders
from anyup import checkpoints, reporting
from anyup.cli import command as cli
from anyup.encoders import MobileNetV2
from anyup.evaluation import attention_weights, datasets, probing
from anyup.evaluation.attention_weights import AttentionWeights, BilinearWeights, NearestWeights, averaged_weights, tile
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.datasets import LAYOUTS, VOID, Sample, load_split, make_labels, read_mask, square_image
from anyup.evaluation.probe import CarriedEntropy, Example, LinearProbes, Recipe, View, confusion, losses, scores
from anyup.evaluation.probe import train_step as step_of
from anyup.evaluation.segmentation import Segmentation
from anyup.evaluation.upsamplers import Interpolation, Learned
from anyup.images import read_photo, resize, save_picture
from anyup.model import AnyUp
from anyup.ops.window_attention.reference import window_mask
from anyup.reporting import Reporter
from anyup.window import CellWindow, RatioWindow, Window

Image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(seed: int = 0, **arguments: object) -> AnyUp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AnyUp(qk_dim=16, num_heads=2, **arguments).eval()  # type: ignore[arg-type]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_mask(path: Path, values: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8))
    if palette:  # the indices stay, and the mode becomes P
        picture.putpalette([255 - level // 3 for level in range(768)])
    picture.save(path)


def write_image(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(path, torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)))


def mask_at(folder: Path) -> Sample:
    return Sample("a", folder / "image.png", folder / "mask.png")


# Data sets


TREES = {
    "folders": ("images/train/a/x.jpg", "masks/train/a/x.png", "a/x"),
    "camvid": ("train/x.webp", "trainannot/x.png", "x"),
    "voc": ("JPEGImages/x.jpg", "SegmentationClass/x.png", "x"),
    "ade20k": ("images/training/x.jpg", "annotations/training/x.png", "x"),
    "cityscapes": ("leftImg8bit/train/ulm/x_leftImg8bit.png", "gtFine/train/ulm/x_gtFine_labelIds.png", "ulm/x"),
    "coco-stuff": ("images/train2017/x.jpg", "annotations/train2017/x.png", "x"),
}


@pytest.mark.parametrize("name", TREES)
def test_each_layout_finds_an_image_with_its_mask_and_leaves_one_without(tmp_path: Path, name: str) -> None:
    image, mask, sample_name = TREES[name]
    write_image(tmp_path / image)
    write_mask(tmp_path / mask, np.zeros((8, 8)))
    if name == "voc":
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets/Segmentation/train.txt").write_text("x\n")
        write_image(tmp_path / "JPEGImages/in_another_split.jpg")
    else:
        write_image(tmp_path / image.replace("x", "without", 1))
    told = contextlib.nullcontext() if name == "voc" else pytest.warns(UserWarning, match="there is no .*without")
    with told:
        (sample,) = load_split(tmp_path, LAYOUTS[name], LAYOUTS[name].train)
    assert (sample.name, sample.image, sample.mask) == (sample_name, tmp_path / image, tmp_path / mask)


def test_every_layout_is_offered_by_the_command_and_by_no_other_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "segmentation", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "{" + ",".join(LAYOUTS) + "}" in "".join(shown.split())


@pytest.mark.parametrize(
    ("name", "values", "classes"),
    [
        ("camvid", [0, 10, 11], [0, 10, VOID]),
        ("voc", [0, 20, 255], [0, 20, VOID]),
        ("ade20k", [0, 1, 150], [VOID, 0, 149]),
        ("cityscapes", [7, 33, 0, 9], [0, 18, VOID, VOID]),
        # person, bicycle, book, banner, wall-wood, wood, unlabelled
        ("coco-stuff", [0, 1, 83, 91, 176, 181, 255], [9, 11, 4, 17, 18, 24, VOID]),
    ],
)
def test_values_of_a_mask_become_classes(tmp_path: Path, name: str, values: list[int], classes: list[int]) -> None:
    labels = LAYOUTS[name].labels
    assert labels is not None
    size = len(values)
    write_mask(tmp_path / "mask.png", np.tile(values, (size, 1)), palette=name == "voc")
    assert read_mask(mask_at(tmp_path), labels, size)[0].tolist() == classes


def test_the_coarse_classes_of_coco_stuff_take_each_of_its_categories_once() -> None:
    labels = LAYOUTS["coco-stuff"].labels
    assert labels is not None and labels.classes == 27
    # Values are category ids minus one; eleven ids of things were never used, and all stand in the table.
    table = labels.of(torch.arange(256)).tolist()
    assert all(0 <= c < 27 for c in table[:182]) and set(table[182:255]) == {-1}
    assert set(table[:182]) == set(range(27))


def test_a_value_that_is_no_class_is_refused_by_file_and_value(tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.png", np.full((4, 4), 3))
    with pytest.raises(ValueError, match=r"mask.png: values expected: classes 0 to 2; void 255; got 3\. .*--classes"):
        read_mask(mask_at(tmp_path), make_labels("abc"), 4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_of_colours_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=f"mask.png: expected a mask of one channel, .*, got Pillow's mode {mode};"):
        read_mask(mask_at(tmp_path), make_labels("ab"), 4)


def write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A PNG of grey levels with so many bits each, which Pillow itself does not write for 2 and 4."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    places = values[..., None] >> np.arange(bits)[::-1] & 1  # the bits of each value, the highest first
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in places.reshape(len(values), -1))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_any_number_of_bits_holds_its_values(tmp_path: Path, bits: int) -> None:
    largest = min(2**bits - 1, 1000)
    values = np.random.default_rng(0).integers(0, largest + 1, (9, 9))
    values[0, :2] = 0, largest
    write_grey_png(tmp_path / "mask.png", values, bits)
    names = [str(value) for value in range(min(largest, 200) + 1)]
    labels = make_labels(names, void=range(len(names), largest + 1))
    expected = np.where(values < len(names), values, VOID)
    assert read_mask(mask_at(tmp_path), labels, 9).tolist() == expected.tolist()


def test_a_16_bit_value_that_is_no_class_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="got 40000"):
        read_mask(mask_at(tmp_path), make_labels("ab"), 4)


def test_of_many_values_that_are_no_class_a_few_are_named(tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.png", np.arange(200).reshape(10, 20))
    with pytest.raises(ValueError, match="got 2 to 11 and 188 others"):
        read_mask(mask_at(tmp_path), make_labels("ab"), 10)


def test_classes_have_the_values_given() -> None:
    values = torch.tensor([0, 1, 5, 255, 256, -1])
    assert make_labels("ab", void=(), values=(0, 255)).of(values).tolist() == [0, -1, -1, 1, -1, -1]
    assert make_labels("ab", void=(0, 255), values=(1, 256)).of(values).tolist() == [VOID, 0, -1, VOID, 1, -1]


def test_image_and_mask_are_resized_and_cut_alike(tmp_path: Path) -> None:
    # A picture whose left part is white, and the mask of that: after both are read they still agree.
    for height, width in ((20, 33), (33, 20), (16, 16)):
        values = np.zeros((height, width))
        values[: height // 3, : width // 2] = 1
        write_mask(tmp_path / "mask.png", values)
        Image.fromarray((values * 255).astype(np.uint8)).save(tmp_path / "image.png")
        mask = read_mask(mask_at(tmp_path), make_labels("ab"), 40)
        image = square_image(mask_at(tmp_path).photo(), 40)
        assert mask.shape == (40, 40) and image.shape == (1, 3, 40, 40)
        assert ((image[0, 0] > 0.5) == (mask == 1)).float().mean() > 0.97


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_cut_out(tmp_path: Path, turned: bool) -> None:
    values = np.tile(np.arange(8), (4, 1))
    write_mask(tmp_path / "mask.png", values.T if turned else values)
    got = read_mask(mask_at(tmp_path), make_labels([str(i) for i in range(8)]), 4)
    assert (got.T if turned else got)[0].tolist() == [2, 3, 4, 5]


def test_labels_are_resized_by_nearest_exact(tmp_path: Path) -> None:
    values = np.arange(49).reshape(7, 7)
    write_mask(tmp_path / "mask.png", values)
    got = read_mask(mask_at(tmp_path), make_labels([str(i) for i in range(49)]), 5)
    expected = F.interpolate(torch.from_numpy(values)[None, None].float(), (5, 5), mode="nearest-exact")[0, 0]
    assert torch.equal(got.float(), expected)


def check(samples: list[Sample], labels: datasets.Labels, size: int = 8) -> tuple[list[Sample], list[str]]:
    told = Told()
    return datasets.check_split(samples, labels, size, "train", told), told.lines


def turned_pair(
    folder: Path, shape: tuple[int, int], orientation: int, mask_shape: tuple[int, int], mask_orientation: int | None
) -> tuple[Sample, np.ndarray]:
    """An image with an orientation tag, and a mask of two classes with one or none; and the mask's stored values."""
    values = np.random.default_rng(0).integers(0, 2, mask_shape)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)).save(
        folder / "image.png", exif=exif
    )
    exif[0x0112] = mask_orientation
    options = {} if mask_orientation is None else {"exif": exif}
    Image.fromarray(values.astype(np.uint8)).save(folder / "mask.png", **options)
    return mask_at(folder), values


TURNED = [  # sizes as stored, the image's orientation, the mask's, and whether they are taken as stored
    ((8, 12), 1, (8, 12), None, False),
    ((8, 12), 6, (8, 12), None, True),
    ((8, 12), 6, (12, 8), None, False),
    ((8, 12), 6, (8, 12), 6, False),
    ((8, 12), 6, (8, 12), 1, True),  # turned, they would differ in size
    ((8, 12), 1, (8, 12), 6, True),
    ((8, 12), 1, (12, 8), 6, False),
    ((8, 8), 6, (8, 8), None, True),
    ((8, 8), 6, (8, 8), 1, False),
    ((8, 8), 6, (8, 8), 6, False),
    ((8, 8), 1, (8, 8), 6, False),
    ((8, 12), 3, (8, 12), None, True),
    ((8, 12), 3, (8, 12), 1, False),
    ((8, 12), 2, (8, 12), 2, False),
]


@pytest.mark.parametrize(("shape", "orientation", "mask_shape", "mask_orientation", "as_stored"), TURNED)
def test_an_image_and_its_mask_are_turned_together_or_not_at_all(
    tmp_path: Path,
    shape: tuple[int, int],
    orientation: int,
    mask_shape: tuple[int, int],
    mask_orientation: int | None,
    as_stored: bool,
) -> None:
    sample, values = turned_pair(tmp_path, shape, orientation, mask_shape, mask_orientation)
    (checked,), told = check([sample], make_labels("ab"))
    assert checked.as_stored == as_stored
    assert any("not turned by their EXIF orientation" in line for line in told) == as_stored
    size = min(shape)
    image, mask = square_image(checked.photo(), size), read_mask(checked, make_labels("ab"), size)
    stored = read_photo(sample.image, turned=False)
    upright = read_photo(sample.image)
    assert torch.equal(image, datasets._centre(stored if as_stored else upright, size))
    turns = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 6: np.rot90(values, -1)}
    seen = values if as_stored else turns[mask_orientation or 1]
    assert torch.equal(mask.long(), datasets._centre(torch.from_numpy(seen.copy())[None, None], size)[0, 0])


@pytest.mark.parametrize(("orientation", "mask_shape"), [(1, (12, 8)), (6, (8, 11)), (3, (12, 8))])
def test_an_image_and_a_mask_of_another_size_are_refused(
    tmp_path: Path, orientation: int, mask_shape: tuple[int, int]
) -> None:
    sample, _ = turned_pair(tmp_path, (8, 12), orientation, mask_shape, None)
    with pytest.raises(ValueError, match=r"mask.png: expected the size of its image, 8 x 12.*, got \d+ x \d+$"):
        check([sample], make_labels("ab"))


def test_a_mask_of_0_and_255_with_two_classes_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png")
    write_mask(tmp_path / "mask.png", np.repeat([[0, 255]], 4, axis=1).repeat(8, axis=0))
    with pytest.raises(ValueError, match=r"at least two classes .*got only '0'; 50.0% .* void 255.*--classes 0,255"):
        check([mask_at(tmp_path)], make_labels("01"))
    labels = make_labels(["0", "255"], void=(), values=(0, 255))
    _, told = check([mask_at(tmp_path)], labels)
    assert told[-1] == "'train': 1 images, 2 of 2 classes occur, 0.0% of the pixels are void"
    assert read_mask(mask_at(tmp_path), labels, 8).unique().tolist() == [0, 1]


def test_classes_that_never_occur_are_told_by_name(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png")
    write_mask(tmp_path / "mask.png", np.repeat([[0, 2]], 4, axis=1).repeat(8, axis=0))
    _, told = check([mask_at(tmp_path)], make_labels(["sky", "road", "car", "tree"]))
    assert told[-1] == "WARNING: classes that never occur in 'train': road, tree"


def test_a_class_outside_the_centre_never_occurs(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png", 4, 8)
    write_mask(tmp_path / "mask.png", np.tile([2, 2, 0, 1, 0, 1, 2, 2], (4, 1)))
    _, told = check([mask_at(tmp_path)], make_labels("abc"), size=4)
    assert told[-1] == "WARNING: classes that never occur in 'train': c"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pair_that_cannot_be_read_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    samples = []
    for name in ("good", "cut", "pipe", "gone", "cut_mask"):
        samples.append(Sample(name, tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"))
        write_image(samples[-1].image)
        write_mask(samples[-1].mask, np.eye(8))
    samples[1].image.write_bytes(samples[1].image.read_bytes()[:90])
    samples[2].image.unlink()
    os.mkfifo(samples[2].image)
    samples[3].mask.unlink()
    samples[4].mask.write_bytes(b"no picture")
    usable, told = check(samples, make_labels("ab"))
    assert usable == samples[:1]
    assert [sum("left out" in line and f"{name}.png" in line for line in told) for name in ("cut", "pipe")] == [1, 1]
    assert sum("left out" in line and "_mask.png" in line for line in told) == 2
    with pytest.raises(ValueError, match="none of 4 images with masks in the split 'train' can be used"):
        check(samples[1:], make_labels("ab"))


@pytest.mark.parametrize("name", ["folders", "camvid", "voc", "ade20k", "cityscapes", "coco-stuff"])
def test_endings_in_upper_case_are_found(tmp_path: Path, name: str) -> None:
    image, mask, sample_name = TREES[name]
    image, mask = (str(Path(path).with_suffix(Path(path).suffix.upper())) for path in (image, mask))
    for path in (image, mask):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    if name == "voc":
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets/Segmentation/train.txt").write_text("x\n")
    (sample,) = load_split(tmp_path, LAYOUTS[name], LAYOUTS[name].train)
    assert sample == Sample(sample_name, tmp_path / image, tmp_path / mask)
    assert sample.image.is_file() and sample.mask.is_file()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16"]
)  # with BOMs, as Windows' editors and shells write
def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n\nb \n", encoding=encoding)
    assert [sample.name for sample in load_split(tmp_path, LAYOUTS["voc"], "val")] == ["a", "b"]


def test_a_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"val\.txt: expected a list of names in UTF-8"):
        load_split(tmp_path, LAYOUTS["voc"], "val")


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_folder_linked_to_itself_gives_each_image_once_and_a_linked_one_is_followed(tmp_path: Path) -> None:
    for folder in ("data/images/train", "data/masks/train", "elsewhere/images", "elsewhere/masks"):
        name = "a.png" if folder.startswith("data") else "b.png"
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind / "train" / "itself").symlink_to(tmp_path / "data" / kind / "train")
        (tmp_path / "data" / kind / "train" / "more").symlink_to(tmp_path / "elsewhere" / kind)
    samples = load_split(tmp_path / "data", LAYOUTS["folders"], "train")
    assert [sample.name for sample in samples] == ["a", "more/b"]


def test_images_without_any_mask_are_told_with_what_was_looked_for(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    write_mask(tmp_path / "masks/train/a_mask.png", np.eye(8))
    with (
        pytest.warns(UserWarning, match=r"without a mask: there is no .*masks/train/a\.png"),
        pytest.raises(ValueError, match="no images with masks"),
    ):
        load_split(tmp_path, LAYOUTS["folders"], "train")


@pytest.mark.parametrize("values", [(0, 0), (0, 65536), (-1, 0)])
def test_values_of_classes_that_make_no_sense_are_refused(values: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="classes"):
        make_labels("ab", void=(), values=values)


@pytest.mark.parametrize(("void", "names"), [((1,), "ab"), ((255,), "a"), ((255,), ["x"] * 256)])
def test_labels_that_make_no_sense_are_refused(void: tuple[int, ...], names: list[str]) -> None:
    with pytest.raises(ValueError, match="classes|void"):
        make_labels(names, void)


# Carried logits


SHAPES: list[tuple[Window, tuple[int, int], tuple[int, int]]] = [
    (RatioWindow(0.1), (28, 28), (8, 8)),
    (RatioWindow(0.1), (45, 52), (13, 9)),
    (RatioWindow(0.25), (17, 20), (5, 7)),
    (RatioWindow(0.1), (12, 12), (12, 12)),
    (CellWindow(0.1), (30, 24), (10, 8)),
    (None, (9, 8), (3, 4)),
]


@pytest.mark.parametrize(("window", "size", "grid"), SHAPES)
def test_a_tiling_takes_each_pixel_once_and_shows_it_every_key_it_sees(
    window: Window, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    tiling = tile(window, size, grid)
    numbers = torch.arange(size[0] * size[1]).view(size)
    assert torch.equal(tiling.by_tiles(numbers).sort().values, numbers.flatten())
    seen = window_mask(window, size, grid)  # (pixels, keys) bool
    positions = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, *grid)
    residues = tiling.one_hot()[0].flatten(1).argmax(dim=0)  # of each key
    for pixels, near in zip(tiling.tiles(numbers), tiling.near(positions), strict=True):
        for of_tile, keys in zip(pixels, near[:, 0].long(), strict=True):
            for pixel in of_tile:
                visible = seen[pixel].nonzero()[:, 0]
                # Each key that the pixel sees stands where its residue's weight is, and no two share a residue.
                assert len(residues[visible].unique()) == len(visible)
                assert torch.equal(keys[residues[visible]], visible)


def test_448_from_32_needs_64_weights_a_pixel() -> None:
    assert tile(RatioWindow(0.1), (448, 448), (32, 32)).keys == 64


@pytest.mark.parametrize("arguments", [{}, {"window": "cell"}, {"window_ratio": 0.0}])
@pytest.mark.parametrize(("size", "grid"), [((24, 24), (6, 6)), ((23, 31), (7, 5))])
def test_carried_logits_are_the_models(
    arguments: dict[str, object], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = small_model(**arguments)
    image, features = random_tensor(1, 3, *size), random_tensor(1, 5, *grid, seed=1)
    values, numbers = random_tensor(4, *grid, seed=2), torch.arange(size[0] * size[1]).view(size)
    with torch.no_grad():
        expected = model(image, features, size, values=values[None])[0].flatten(1)
        weights = averaged_weights(model, image, features, size)
    fixed_weights = AttentionWeights(tile(model.window, size, grid), weights)
    carried = torch.empty_like(expected)
    for logits, pixels in zip(fixed_weights.logits(values), fixed_weights.targets(numbers, 4), strict=True):
        carried[:, pixels.flatten()] = logits.transpose(0, 1).flatten(1)
    assert torch.equal(fixed_weights.whole(fixed_weights.logits(values)).flatten(1), carried)
    assert weights.dtype == torch.float16
    assert (carried - expected).abs().max() < 2e-3 * values.abs().max()  # float16 rounds a weight by up to 1/2048


@pytest.mark.parametrize(("size", "grid"), [((12, 16), (3, 4)), ((11, 13), (5, 6)), ((2, 3), (8, 9))])
@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_the_loss_of_interpolated_logits_and_its_gradient_are_those_of_the_map(
    method: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    labels = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    labels[:1, 1:] = VOID
    values = random_tensor(6, *grid).requires_grad_()
    each = losses(
        NearestWeights(size, grid) if method == "nearest" else BilinearWeights(size, grid), values, labels, 2, 3
    )
    logits = Interpolation(method)(torch.empty(0), values[None], size)[0].unflatten(0, (2, 3))
    targets = labels.long().expand(2, *size)
    expected = F.cross_entropy(logits, targets, ignore_index=VOID, reduction="none").sum(dim=(1, 2))
    assert torch.allclose(each, expected, rtol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), values, retain_graph=True)[0] for loss in (each, expected)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_carried_logits_is_that_of_dense_attention() -> None:
    model, size, grid = small_model(), (20, 24), (5, 6)
    image, features = random_tensor(1, 3, *size), random_tensor(1, 5, *grid, seed=1)
    labels = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    labels[:5] = VOID
    with torch.no_grad():
        weights = averaged_weights(model, image, features, size)
    fixed_weights = AttentionWeights(tile(model.window, size, grid), weights)
    values = random_tensor(6, *grid, seed=2).requires_grad_()
    each = losses(fixed_weights, values, labels, seeds=2, classes=3)
    (gradient,) = torch.autograd.grad(each.sum(), values)

    through_model = values.detach().requires_grad_()
    logits = model(image, features, size, values=through_model[None])[0].unflatten(0, (2, 3))
    targets = labels.long().expand(2, *size)
    expected = F.cross_entropy(logits, targets, ignore_index=VOID, reduction="none").sum(dim=(1, 2))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), through_model)
    assert torch.allclose(each, expected, rtol=1e-3)
    assert (gradient - expected_gradient).norm() < 2e-3 * expected_gradient.norm()


@pytest.mark.parametrize("chunk", [1, 4000, 1 << 20])
def test_the_gradient_of_carried_entropy_is_that_of_all_logits_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_weights._AT_A_TIME, "cpu", chunk)
    near = random_tensor(5, 2 * 7, 4).double().requires_grad_()
    weights = random_tensor(5, 9, 4, seed=1).double()
    labels = torch.randint(0, 7, (5, 9), generator=torch.Generator().manual_seed(2))
    labels[1, 3:], labels[4] = VOID, VOID
    each = CarriedEntropy.apply(near, weights, labels, 2)
    logits = (near @ weights.transpose(1, 2)).unflatten(1, (2, 7)).transpose(0, 1).flatten(0, 1)
    entropy = F.cross_entropy(logits, labels.repeat(2, 1), ignore_index=VOID, reduction="none")
    at_once = entropy.unflatten(0, (2, 5)).sum(dim=(1, 2))
    assert torch.allclose(each, at_once, atol=1e-12)
    factor = torch.tensor([1.0, -3.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((factor * loss).sum(), near)[0] for loss in (each, at_once)]
    assert torch.allclose(*gradients, atol=1e-12) and float(gradients[0].abs().max()) > 0


# LinearProbes


def make_example(size: int = 12, grid: int = 3, channels: int = 5, seed: int = 0) -> Example:
    labels = torch.randint(0, 3, (size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    labels[: 1 + 2 * (seed % 3)] = VOID
    weights = {
        "nearest": NearestWeights((size, size), (grid, grid)),
        "bilinear": BilinearWeights((size, size), (grid, grid)),
    }
    return Example(random_tensor(1, channels, grid, grid, seed=seed), labels, weights)


def train_step(probes: LinearProbes, optimizer: torch.optim.Optimizer, batch: list[Example]) -> Tensor | None:
    return step_of(probes, optimizer, batch, Segmentation(make_labels("abc")))


def make_optimizer(probes: LinearProbes) -> torch.optim.AdamW:
    return torch.optim.AdamW(probes.parameters(), lr=1e-2, weight_decay=1e-5)


def test_a_probe_beside_others_learns_what_it_learns_alone() -> None:
    together = LinearProbes(["nearest", "bilinear"], [0, 7], 5, 3)
    optimizer = torch.optim.SGD(together.parameters(), lr=0.5)  # unlike AdamW, it sees how long a gradient is
    alone = torch.nn.Conv2d(5, 3, 1)
    with torch.no_grad():
        alone.weight.copy_(together.weight[1, 1, :, :, None, None])
        alone.bias.copy_(together.bias[1, 1])
    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.5)
    for step in range(5):
        batch = [make_example(seed=2 * step), make_example(seed=2 * step + 1)]
        shown = train_step(together, optimizer, batch)
        logits = torch.cat([F.interpolate(alone(e.features), (12, 12), mode="bilinear") for e in batch])
        loss = F.cross_entropy(logits, torch.stack([e.target for e in batch]).long(), ignore_index=VOID)
        optimizer_alone.zero_grad()
        loss.backward()
        optimizer_alone.step()
        assert shown is not None
        assert float(shown[1, 1]) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(together.weight[1, 1], alone.weight[:, :, 0, 0], atol=1e-5)
    assert torch.allclose(together.bias[1, 1], alone.bias, atol=1e-5)


def test_probes_of_a_seed_start_alike_for_every_method_and_apart_for_every_seed() -> None:
    probes = LinearProbes(["nearest", "bilinear"], [0, 1], 5, 3)
    assert torch.equal(probes.weight[0], probes.weight[1]) and torch.equal(probes.bias[0], probes.bias[1])
    assert not torch.equal(probes.weight[0, 0], probes.weight[0, 1])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        convolution = torch.nn.Conv2d(5, 3, 1)
    assert torch.equal(probes.weight[0, 1], convolution.weight[:, :, 0, 0])


def test_making_probes_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    LinearProbes(["nearest"], [0, 1], 5, 3)
    assert torch.equal(torch.rand(1), expected)


def test_void_pixels_change_nothing() -> None:
    (a, b) = (make_example() for _ in range(2))
    probes = LinearProbes(["nearest", "bilinear"], [0], 5, 3)
    void = replace(b, target=torch.full_like(b.target, VOID))
    first = train_step(LinearProbes(["nearest", "bilinear"], [0], 5, 3), make_optimizer(probes), [a])
    second = train_step(LinearProbes(["nearest", "bilinear"], [0], 5, 3), make_optimizer(probes), [a, void])
    assert first is not None and second is not None and torch.equal(first, second)
    before = probes.weight.clone()
    assert train_step(probes, make_optimizer(probes), [void]) is None
    assert torch.equal(probes.weight, before)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("epochs", [1, 1, 1, 0.5, 0.5, 0.5]),
        ("iterations", [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        ("published", [1, 0.5, 0, 0.5, 1, 0.5]),
        # 4.5 iterations of warm-up, then a quarter of a cosine over the 1.5 that are left.
        ("warm-up", [0.01 + 0.99 * i / 4.5 for i in range(5)] + [0.01 + 0.99 * math.cos(math.pi / 2 / 3)]),
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule: str, expected: list[float]) -> None:
    recipe = Recipe(learning_rate=1.0, epochs=2, schedule=schedule)
    assert [recipe.rate(i // 3, i, 6) for i in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["iterations", "published"])
def test_the_learning_rate_is_that_of_torchs_scheduler(schedule: str) -> None:
    recipe = Recipe(epochs=4, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    period = 4 if schedule == "published" else 20
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=period)
    for iteration in range(20):
        assert recipe.rate(iteration // 5, iteration, 20) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    recipe = Recipe(batch=2)
    orders = [[i for batch in recipe.batches(7, epoch) for i, _ in batch] for epoch in (0, 1, 0)]
    assert [len(batch) for batch in recipe.batches(7, 0)] == [2, 2, 2, 1]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    assert Recipe(order_seed=1).batches(7, 0) != recipe.batches(7, 0)
    assert not any(view.mirrored for batch in recipe.batches(7, 0) for _, view in batch)
    flips = [batch[0][1].mirrored for epoch in range(20) for batch in Recipe(flips=True).batches(7, epoch)]
    assert 20 < sum(flips) < 60


@pytest.mark.parametrize(
    "wrong", [{"schedule": "cosine"}, {"batch": 0}, {"epochs": 0}, {"epochs": 1, "schedule": "warm-up"}]
)
def test_a_recipe_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)  # type: ignore[arg-type]


# The whole


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes that differ in colour, in CamVid's layout (bytes 0 and 1, and 11 for void): 5 to train, 2 to test."""
    root = tmp_path / "data"
    for split, count in (("train", 5), ("test", 2)):
        for index in range(count):
            generator = np.random.default_rng(index if split == "train" else 50 + index)
            mask = np.zeros((24, 30))
            mask[generator.integers(4, 20) :, generator.integers(0, 10) : generator.integers(12, 30)] = 1
            pixels = torch.from_numpy(np.where(mask == 1, 0.8, 0.2) + 0.1 * generator.random((3, 24, 30))).float()
            (root / split).mkdir(parents=True, exist_ok=True)
            save_picture(root / split / f"{index}.png", pixels)
            mask[:2] = 11
            write_mask(root / f"{split}annot" / f"{index}.png", mask)
    monkeypatch.setattr(anyup.encoders, "load_encoder", lambda name, device="cpu", **_: make_encoder(4, name=name))
    monkeypatch.chdir(tmp_path)
    return root


def make_source(cache: TensorCache | None = None, keep: bool = False) -> probing.Source:
    labels = LAYOUTS["camvid"].labels
    assert labels is not None
    upsamplers = [Interpolation("nearest"), Interpolation("bilinear"), Learned("ours", small_model())]
    return probing.Source(make_encoder(4), upsamplers, Segmentation(labels), 24, cache or TensorCache(None), CPU, keep)


class StopError(Exception):
    """An interruption."""


def run_training(
    data: Path, checkpoint: Path, source: probing.Source, stop_after: int | None = None, resume: bool = False
) -> tuple[Tensor, Tensor, list[dict[str, list[float]]]]:
    def after(epoch: int) -> None:
        if epoch == stop_after:
            raise StopError

    samples = load_split(data, LAYOUTS["camvid"], "train")
    recipe = Recipe(epochs=4, learning_rate=1e-2, flips=True)
    reporter = Reporter(io.StringIO())
    probes, history = probing.train(
        source, samples, recipe, [0, 1], checkpoint=checkpoint, resume=resume, reporter=reporter, after_epoch=after
    )
    return probes.weight.detach(), probes.bias.detach(), history


def test_a_training_that_was_stopped_goes_on_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    whole = run_training(data, tmp_path / "whole.pt", make_source())
    with pytest.raises(StopError):
        run_training(data, tmp_path / "parts.pt", make_source(), stop_after=1)
    parts = run_training(data, tmp_path / "parts.pt", make_source(), resume=True)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1]) and whole[2] == parts[2]
    assert len(whole[2]) == 4 and whole[2][-1]["ours"][0] < whole[2][0]["ours"][0]


@pytest.mark.parametrize(("keep", "flips"), [(True, False), (True, True), (False, False)])
def test_what_is_made_once_is_made_before_the_epochs(data: Path, tmp_path: Path, keep: bool, flips: bool) -> None:
    source = make_source(TensorCache(tmp_path / "cache"), keep)
    samples = load_split(data, LAYOUTS["camvid"], "train")
    recipe = Recipe(epochs=3, flips=flips)
    told = Told()
    probing.fill_cache(source, samples, recipe, 0, told)
    made = sorted(path.name for path in (tmp_path / "cache").rglob("*.npy"))
    (last,) = (line for line in told.lines if re.search(r"made once: (\d+) of \1 images", line))
    assert last.startswith("features and attention weights" if keep else "features, ")
    probing.train(source, samples, recipe, [0], checkpoint=tmp_path / "a.pt", resume=False, reporter=told)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.npy")) == made
    probing.fill_cache(source, samples, recipe, 0, told)
    assert told.lines.count(last) == 1  # nothing is left to make


def test_the_time_left_to_train_does_not_count_what_is_made_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            clock.now += seconds
            return function(*arguments)

        return run

    clock = Clock()
    monkeypatch.setattr(reporting, "time", clock)
    monkeypatch.setattr(probing, "averaged_weights", slow(probing.averaged_weights, 60))
    monkeypatch.setattr(probing, "train_step", slow(probing.train_step, 1))
    source = make_source(TensorCache(tmp_path / "cache"), keep=True)
    samples = load_split(data, LAYOUTS["camvid"], "train")
    told = Told()
    probing.train(source, samples, Recipe(), [0], checkpoint=tmp_path / "a.pt", resume=False, reporter=told)
    assert "features and attention weights, made once: 1 of 5 images, 4 min left" in told.lines
    # 20 epochs of 3 batches.
    assert "epoch 1 of 20, batch 1 of 3, 59 s left" in told.lines
    assert "epoch 2 of 20, batch 3 of 3, 54 s left" in told.lines


def test_what_is_kept_in_the_cache_changes_no_bit(data: Path, tmp_path: Path) -> None:
    without = run_training(data, tmp_path / "a.pt", make_source())
    for _ in range(2):  # filling the cache, then from it
        with_cache = run_training(data, tmp_path / "b.pt", make_source(TensorCache(tmp_path / "cache"), keep=True))
        assert torch.equal(without[0], with_cache[0]) and without[2] == with_cache[2]
    kept = list((tmp_path / "cache" / "attention").iterdir())
    assert 5 <= len(kept) <= 10  # five images, some of them mirrored too
    size = tile(RatioWindow(0.1), (24, 24), (6, 6)).count * 2
    assert all(size <= path.stat().st_size < size + 200 for path in kept)


def test_the_cache_tells_an_image_that_is_turned_from_the_same_as_stored(data: Path, tmp_path: Path) -> None:
    sample, _ = turned_pair(data, (24, 24), 6, (24, 24), None)
    as_stored = replace(sample, as_stored=True)
    cached, fresh = make_source(TensorCache(tmp_path / "cache")), make_source()
    assert not torch.equal(fresh.encoded(sample).features, fresh.encoded(as_stored).features)
    for each in (sample, as_stored, sample):
        assert torch.equal(cached.encoded(each).features, fresh.encoded(each).features)


def test_probes_see_the_class_token_beside_the_features_of_a_smaller_image(data: Path, tmp_path: Path) -> None:
    whole = make_source(TensorCache(tmp_path / "cache"))
    source = replace(whole, encoder_size=12, class_token=True)
    sample = load_split(data, LAYOUTS["camvid"], "train")[0]
    of_whole = whole.encoded(sample)
    small = resize(source.image(sample), (12, 12))
    features = source.encoder(source.encoder.normalize(small))
    token = features.mean(dim=(2, 3), keepdim=True)
    for _ in range(2):  # made, then from the cache
        encoded = source.encoded(sample)
        assert torch.equal(encoded.features, features)
        assert torch.allclose(encoded.probed, torch.cat([features, token.expand_as(features)], dim=1))
    assert torch.equal(whole.encoded(sample).features, of_whole.features) and of_whole.features.shape[2:] == (6, 6)
    bilinear = source.example(sample).weights["bilinear"]
    carried = bilinear.whole(bilinear.logits(encoded.probed[0]))
    assert torch.allclose(carried, F.interpolate(encoded.probed, (24, 24), mode="bilinear")[0], atol=1e-5)


def test_an_encoder_without_a_class_token_is_refused_before_any_image() -> None:
    encoder = MobileNetV2(6, name="net")
    with pytest.raises(ValueError, match="class_token: net: expected a network with a class token, got MobileNetV2"):
        replace(make_source(), encoder=encoder, class_token=True)


def test_a_mirrored_example_mirrors_image_and_mask_alike(data: Path) -> None:
    source, view = make_source(), View(mirrored=True)
    sample = load_split(data, LAYOUTS["camvid"], "train")[0]
    assert torch.equal(source.target(sample, view), source.target(sample).flip(1))
    mirrored = source.image(sample).flip(3)
    assert torch.equal(source.image(sample, view), mirrored)
    assert torch.equal(source.encoded(sample, view).features, make_encoder(4)(source.encoder.normalize(mirrored)))
    assert not torch.equal(source.target(sample), source.target(sample).flip(1))


def test_the_count_of_what_would_be_kept_is_right_before_and_after(data: Path, tmp_path: Path) -> None:
    source = make_source(TensorCache(tmp_path / "cache"), keep=True)
    samples = load_split(data, LAYOUTS["camvid"], "train")
    each = tile(RatioWindow(0.1), (24, 24), (6, 6)).count * 2
    assert source.attention_bytes(samples, flips=False) == 5 * each
    assert source.attention_bytes(samples, flips=True) == 10 * each
    source.example(samples[0])
    assert source.attention_bytes(samples, flips=True) == 9 * each


def test_a_checkpoint_of_other_settings_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run_training(data, tmp_path / "a.pt", make_source(), stop_after=0)
    other = make_source()
    other.upsamplers = [other.upsamplers[0], other.upsamplers[1], Learned("ours", small_model(seed=1))]
    other.__post_init__()
    with pytest.raises(ValueError, match="got others for: weights$"):
        run_training(data, tmp_path / "a.pt", other, resume=True)
    same_weights = make_source()
    same_weights.learned[0].model.cross_decode.window_ratio = 0.5
    with pytest.raises(ValueError, match="got others for: arguments$"):
        run_training(data, tmp_path / "a.pt", same_weights, resume=True)
    (tmp_path / "a.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a checkpoint"):
        run_training(data, tmp_path / "a.pt", make_source(), resume=True)


def test_scores_are_those_of_predictions_over_the_whole_set() -> None:
    # Predicted 0 0 1 1 and 2 2, true 0 1 1 void and 2 0: counted over both images together.
    counts = torch.zeros(2, 3, 3, dtype=torch.int64)
    for predicted, true in (([0, 0, 1, 1], [0, 1, 1, VOID]), ([2, 2], [2, 0])):
        right = F.one_hot(torch.tensor([predicted]), 3).permute(2, 0, 1).float()
        always_two = torch.zeros_like(right)
        always_two[2] = 1
        counts += confusion(torch.stack([right, always_two]), torch.tensor([true], dtype=torch.uint8))
    good, bad = map(scores, counts)
    assert good["accuracy"] == pytest.approx(3 / 5) and bad["accuracy"] == pytest.approx(1 / 5)
    assert good["iou"] == pytest.approx([1 / 3, 1 / 2, 1 / 2])
    assert good["miou"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert bad["miou"] == pytest.approx((0 + 0 + 1 / 5) / 3)


def test_scores_are_those_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"num_classes": 7, "ignore_index": VOID}
    theirs = {
        "miou": classification.MulticlassJaccardIndex(average="macro", **given),
        "iou": classification.MulticlassJaccardIndex(average="none", **given),
        "accuracy": classification.MulticlassAccuracy(average="micro", **given),
    }
    counts = torch.zeros(7, 7, dtype=torch.int64)
    for _ in range(3):
        logits = torch.randn(1, 7, 20, 30, generator=generator)
        logits[:, 5:] = -9  # 5 is true, 6 neither true nor predicted
        labels = torch.randint(0, 6, (20, 30), generator=generator).masked_fill(logits[0, 0] > 1, VOID)
        counts += confusion(logits, labels)[0]
        for metric in theirs.values():
            metric.update(logits.argmax(dim=1), labels[None])
    for name, found in scores(counts).items():
        assert found == pytest.approx(theirs[name].compute().tolist(), rel=1e-6), name


def test_a_test_that_was_stopped_goes_on_after_the_images_it_measured(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "segmentation", "--data", str(data), "--layout", "camvid", "--encoder", "tiny"]
    arguments += ["--size", "24", "--epochs", "1", "--seeds", "1", "-o", "out.json"]
    measured = []

    def counting(logits: Tensor, labels: Tensor) -> Tensor:
        measured.append(0)
        if len(measured) == 4:  # two methods each of two images
            raise KeyboardInterrupt
        return confusion(logits, labels)

    monkeypatch.setattr("anyup.evaluation.segmentation.confusion", counting)
    assert cli.main([*arguments, "--cache", "cache"]) != 0 and not Path("out.json").exists()
    assert "out.probes.pt: what is done; --resume goes on" in capsys.readouterr().err
    assert cli.main([*arguments, "--cache", "cache", "--resume"]) == 0
    assert len(measured) == 4 + 2
    results = json.loads(Path("out.json").read_text())["results"]
    assert cli.main([*arguments, "--resume"]) == 0  # without a cache all is measured again
    assert len(measured) == 4 + 2 + 4
    assert json.loads(Path("out.json").read_text())["results"] == results


def test_the_command_trains_tests_and_writes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.save(small_model(), "ours.pth")
    arguments = ["evaluate", "segmentation", "--data", str(data), "--layout", "camvid", "--encoder", "tiny"]
    arguments += ["--size", "24", "--epochs", "30", "--learning-rate", "0.1", "--seeds", "2", "--weights", "ours.pth"]
    assert cli.main([*arguments, "-o", "out.json", "--cache", "cache"]) == 0
    shown = capsys.readouterr()
    assert "'train': 5 images, 2 of 11 classes occur, " in shown.err
    assert "WARNING: classes that never occur in 'test': pole, road, pavement" in shown.err
    results = json.loads(Path("out.json").read_text())
    assert results["splits"] == {"train": 5, "test": 2} and results["recipe"]["schedule"] == "epochs"
    assert list(results["results"]) == ["nearest", "bilinear", "ours"]
    for result in results["results"].values():
        assert len(result["seeds"]) == 2
        assert result["accuracy"]["mean"] > 0.8
        assert result["miou"]["mean"] > 0.7
    assert len(results["losses"]) == 30
    assert "ours" in shown.out
    # What took hours is not begun anew by the way.
    assert cli.main([*arguments, "-o", "out.json"]) == 1
    assert "out.probes.pt: left by an earlier run, interrupted or complete; --resume goes on" in capsys.readouterr().err
    # Done already: nothing but the test is left, and it finds the same.
    assert cli.main([*arguments, "-o", "out.json", "--resume"]) == 0
    assert json.loads(Path("out.json").read_text())["results"] == results["results"]


def test_the_command_measures_other_windows_a_smaller_image_and_the_class_token(data: Path) -> None:
    arguments = ["evaluate", "segmentation", "--data", str(data), "--layout", "camvid", "--encoder", "tiny"]
    arguments += ["--size", "24", "--epochs", "2", "--seeds", "1", "--weights", "anyup_mini"]
    more = ["--encoder-size", "12", "--class-token", "--window-ratio", "0.3", "--window-ratio", "1"]
    assert cli.main([*arguments, *more, "-o", "out.json"]) == 0
    results = json.loads(Path("out.json").read_text())
    assert (results["size"], results["encoder_size"], results["class_token"]) == (24, 12, True)
    windows = {
        name: method["arguments"]["window_ratio"]
        for name, method in results["methods"].items()
        if "arguments" in method
    }
    assert windows == {"anyup_mini": 0.1, "anyup_mini (window 0.3)": 0.3, "anyup_mini (window 1)": 1}
    assert len({str(results["losses"][-1][name]) for name in windows}) == 3
    assert cli.main([*arguments, "-o", "out.json", "--resume"]) == 1  # of other settings


def test_whatever_values_the_classes_have_in_masks_the_result_is_the_same(data: Path) -> None:
    for kind, of_kind in (("images", ""), ("masks", "annot")):
        for split in ("train", "test"):
            (data / kind).mkdir(exist_ok=True)
            (data / f"{split}{of_kind}").rename(data / kind / split)
    masks = {path: np.array(Image.open(path)) for path in (data / "masks").rglob("*.png")}
    results = []
    for number, (first, second, void, more) in enumerate(
        [
            (0, 1, 255, ["--classes", "2"]),
            (0, 255, 11, ["--classes", "0,255", "--void", "11"]),
            (1, 2, 0, ["--classes", "2", "--first-class", "1"]),
            (300, 301, 0, ["--classes", "300,301", "--void", "0"]),
        ]
    ):
        for path, mask in masks.items():
            values = np.select([mask == 0, mask == 1], [first, second], void)
            Image.fromarray(values.astype(np.uint16 if first == 300 else np.uint8)).save(path)
        arguments = ["evaluate", "segmentation", "--data", str(data), "--test-split", "test", "--encoder", "tiny"]
        arguments += ["--size", "24", "--epochs", "3", "--seeds", "1", "--learning-rate", "0.1", *more]
        assert cli.main([*arguments, "-o", f"{number}.json"]) == 0
        results.append(json.loads(Path(f"{number}.json").read_text())["results"])
    assert results[0]["bilinear"]["miou"]["mean"] > 0.5
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--classes", "3"], "knows its own"),
        (["--void", "0"], "--void: not expected"),
        (["--layout", "folders"], "--classes"),
        (["--layout", "folders", "--classes", "0,255", "--first-class", "1"], "--first-class"),
        (["--layout", "folders", "--classes", "0,x"], "--classes"),
        (["--layout", "folders", "--classes", "999999999999"], "expected at most 255"),
        (["--layout", "folders", "--classes", "2", "--first-class", "99999999999"], "--first-class"),
        (["--layout", "folders", "--classes", "2", "--void", "1"], "void"),
        (["--size", "22"], "stride of 4"),
        (["--encoder-size", "22"], "--encoder-size: expected a multiple of tiny's stride of 4"),
        (["--window-ratio", "0"], "--window-ratio"),
        (["--weights", "anyup_mini", "--window-ratio", "0.2", "--window-ratio", "0.20"], "expected each once, got 0.2"),
        (["--test-split", "nowhere"], "one is missing"),
        (["--schedule", "linear"], "--schedule"),
        (["--attention", "keep"], "goes with --cache"),
        (["--encoder", "tiny2"], "--encoder: expected 1, got 2"),
        (["-o", "nowhere/out.json"], "nowhere"),
    ],
)
def test_mistakes_are_met_before_any_image_is_read(
    data: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> Tensor:
        raise AssertionError("work began before the mistake was met")

    monkeypatch.setattr(datasets, "read_picture", read)
    arguments = ["evaluate", "segmentation", "--data", str(data), "--layout", "camvid", "--encoder", "tiny"]
    assert cli.main([*arguments, "--size", "24", "--untrained", "-o", "out.json", *more]) in (1, 2)
    assert words in capsys.readouterr().err
    assert not Path("out.json").exists()
