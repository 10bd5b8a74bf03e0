"""Photographs as a viewer sees them, maps read as they were written, files that are complete or absent."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anyup import images
from anyup.images import (
    check_readable,
    check_writable,
    complete_or_absent,
    fit_within,
    normalize_imagenet,
    read_features,
    read_photo,
    read_picture,
    resize,
    round_to_multiple,
    save_array,
    save_picture,
    to_pil,
)

Image = pytest.importorskip("PIL.Image")


def _levels(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _same(photo: Tensor, levels: np.ndarray) -> bool:
    return torch.equal((photo[0] * 255).round().to(torch.uint8), torch.from_numpy(levels).permute(2, 0, 1))


def test_a_photo_comes_as_one_float_image_in_0_to_1(tmp_path: Path) -> None:
    levels = _levels()
    Image.fromarray(levels).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert photo.shape == (1, 3, 6, 8) and photo.dtype == torch.float32 and photo.is_contiguous()
    assert _same(photo, levels)


def _upright(levels: np.ndarray, orientation: int) -> np.ndarray:
    turned = {
        1: levels,
        2: levels[:, ::-1],
        3: levels[::-1, ::-1],
        4: levels[::-1],
        5: levels.transpose(1, 0, 2),
        6: np.rot90(levels, -1),
        7: levels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(levels),
    }
    return np.ascontiguousarray(turned[orientation])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_unless_the_pixels_are_wanted_as_stored(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    levels = _levels(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(levels).save(tmp_path / f"a{suffix}", exif=exif, **options)
    assert read_picture(tmp_path / f"a{suffix}").orientation == orientation
    stored, turned = (read_photo(tmp_path / f"a{suffix}", turned=turned) for turned in (False, True))
    if suffix != ".jpg":
        assert _same(stored, levels)
    assert _same(turned, _upright(np.asarray((stored[0] * 255).round().byte().permute(1, 2, 0)), orientation))


def _exif_block() -> bytes:
    """An EXIF block like a camera's: an orientation of 6 among strings and fractions, and folders of tags."""
    exif = Image.Exif()
    for tag, value in ((0x010E, "what is seen"), (0x010F, "maker"), (0x0112, 6), (0x011A, 72.0), (0x0132, "today")):
        exif[tag] = value
    exif.get_ifd(0x8769).update({0x829A: 0.01, 0x927C: b"Nikon\0" + bytes(40), 0xA005: {1: "R98"}})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 24.0)})
    return bytes(exif.tobytes())


def _damaged(block: bytes, draw: random.Random) -> bytes:
    """The block with bytes changed, put in or cut off, behind its first."""
    changed = bytearray(block)
    place = draw.randrange(14, len(block) - 4)
    kind = draw.randrange(3)
    if kind == 0:
        changed[place : place + 4] = draw.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", draw.randbytes(4)])
    elif kind == 1:
        changed[place:place] = draw.randbytes(draw.randint(1, 8))
    else:
        del changed[place:]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_whatever_is_broken_in_exif_the_pixels_are_read(tmp_path: Path, suffix: str) -> None:
    draw, levels, turned = random.Random(0), _levels(), 0
    for _ in range(150):
        options = {".webp": {"lossless": True}}.get(suffix, {})
        Image.fromarray(levels).save(tmp_path / f"a{suffix}", exif=_damaged(_exif_block(), draw), **options)
        photo = read_photo(tmp_path / f"a{suffix}")
        assert photo.shape[2:] in ((6, 8), (8, 6))
        turned += photo.shape[2] == 8
        if suffix != ".jpg":
            assert _same(photo, levels if photo.shape[2] == 6 else _upright(levels, 6))
    assert turned > 75  # most changes do not touch the orientation


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_an_orientation_behind_a_broken_tag_is_applied(tmp_path: Path) -> None:
    block = _exif_block()
    entry = block.index(b"\x01\x0f") if block[6:8] == b"MM" else block.index(b"\x0f\x01")
    broken = block[: entry + 8] + b"\xff" * 4 + block[entry + 12 :]  # where the maker's name is
    levels = _levels()
    Image.fromarray(levels).save(tmp_path / "a.png", exif=broken)
    assert _same(read_photo(tmp_path / "a.png"), _upright(levels, 6))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(_levels()).save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png").orientation is None
    assert _same(read_photo(tmp_path / "a.png"), _levels())


def test_an_orientation_in_xmp_is_applied(tmp_path: Path) -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(_levels()).save(tmp_path / "a.webp", xmp=packet, lossless=True)
    assert _same(read_photo(tmp_path / "a.webp"), _upright(_levels(), 6))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    rgba = np.concatenate([_levels(), np.zeros((6, 8, 1), np.uint8)], axis=2)
    rgba[0, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert bool((photo[0, :, 1:] == 1).all())
    assert _same(photo[:, :, :1], rgba[:1, :, :3])


def test_palettes_are_colours_and_a_transparent_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 2), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png")[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    picture.save(tmp_path / "b.png", transparency=1)
    assert bool((read_photo(tmp_path / "b.png") == 1).all())


def test_grey_of_8_and_of_16_bits_becomes_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(tmp_path / "8.png")
    assert read_photo(tmp_path / "8.png")[0, 1, 0].tolist() == pytest.approx([0, 128 / 255, 1])
    Image.fromarray(np.array([[0, 1, 40000, 65535]], np.uint16)).save(tmp_path / "16.png")
    photo = read_photo(tmp_path / "16.png")
    assert photo.shape == (1, 3, 1, 4)
    assert photo[0, 2, 0].tolist() == pytest.approx([0, 1 / 65535, 40000 / 65535, 1])


def test_float_grey_levels_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 1]], np.float32)).save(tmp_path / "good.tiff")
    assert read_photo(tmp_path / "good.tiff")[0, 0, 0].tolist() == [0, 0.25, 1]
    Image.fromarray(np.array([[0, 200.0]], np.float32)).save(tmp_path / "bad.tiff")
    with pytest.raises(ValueError, match=r"expected grey levels of mode .* in 0\.\.1, got 0\.\.200"):
        read_photo(tmp_path / "bad.tiff")


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (3, 2), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read_photo(tmp_path / "a.jpg").min() > 0.98


def test_unreadable_photos_are_named_and_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_photo(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match="directory"):
        read_photo(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not a picture"):
        read_photo(tmp_path / "text.png")
    Image.fromarray(_levels(60, 80)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.png: .*truncated"):
        read_photo(tmp_path / "cut.png")


def test_a_mode_that_has_no_way_to_rgb_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(self: object, mode: str) -> None:
        raise ValueError("conversion not supported")

    Image.new("LAB", (3, 2)).save(tmp_path / "lab.tif")
    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ValueError, match=r"lab\.tif: Pillow's mode LAB cannot be brought to RGB \(conversion not"):
        read_photo(tmp_path / "lab.tif")


def test_a_picture_too_large_to_be_meant_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(_levels()).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"bomb\.png: the picture cannot be decoded \(Image size \(48 pixels\)"):
        read_photo(tmp_path / "bomb.png")


@pytest.mark.parametrize("raised", [TypeError("odd"), MemoryError(), KeyError(3)])
def test_whatever_pillow_raises_is_a_value_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fail(self: object) -> None:
        raise raised

    Image.fromarray(_levels()).save(tmp_path / "odd.png")
    monkeypatch.setattr(Image.Image, "copy", fail)
    with pytest.raises(ValueError, match=rf"odd\.png: .*decoded \(({raised}|{type(raised).__name__})\)"):
        read_photo(tmp_path / "odd.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_pipe_a_socket_or_a_device_is_refused_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have about 100 characters
    os.mkfifo("pipe.png")
    os.mkfifo("pipe.npy")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        for path, kind in (("pipe.png", "named pipe"), ("socket.png", "socket"), (os.devnull, "device")):
            with pytest.raises(OSError, match=f"{path}: expected a regular file, this is a {kind}"):
                read_photo(path)
    with pytest.raises(OSError, match=r"features pipe\.npy: expected a regular file, this is a named pipe"):
        read_features("pipe.npy")
    with pytest.raises(OSError, match=r"^the list: expected a regular file"):
        check_readable("pipe.png", "the list")


def test_normalisation_is_imagenets() -> None:
    rgb = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    assert bool((normalize_imagenet(rgb) == 0).all())
    white = normalize_imagenet(torch.ones(3, 1, 1, dtype=torch.float64))
    assert white.flatten().tolist() == pytest.approx([2.24891, 2.42857, 2.64], abs=1e-4)
    assert white.dtype == torch.float64


def test_resizing_averages_and_stays_in_range() -> None:
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1
    small = resize(stripes, (16, 16))
    assert small.shape == (1, 3, 16, 16)
    assert float((small[..., 2:-2] - 0.5).abs().max()) < 0.05  # without antialiasing: all 0 or all 1
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    large = resize(edge, (32, 32))
    assert large.min() == 0 and large.max() == 1  # bicubic overshoots
    assert resize(edge, (8, 8)) is edge


def test_sizes_keep_the_aspect_ratio_and_round_to_patches() -> None:
    assert fit_within((3000, 4000), 448) == (336, 448)
    assert fit_within((2, 1000), 10) == (1, 10)
    assert round_to_multiple((336, 448), 14) == (336, 448)
    assert round_to_multiple((5, 230), 16) == (16, 224)


def test_pictures_are_clamped_and_checked() -> None:
    picture = to_pil(torch.tensor([-1.0, 0.5, 2.0]).reshape(3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        to_pil(torch.zeros(4, 2, 2))


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_features_written_are_the_features_read(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    features = torch.randn(5, 4, 6).to(dtype)
    save_array(tmp_path / f"a{suffix}", features)
    back = read_features(tmp_path / f"a{suffix}")
    widened = suffix == ".npy" and dtype == torch.bfloat16
    assert back.dtype == (torch.float32 if widened else dtype)
    assert torch.equal(back, features[None].to(back.dtype))


def test_a_slice_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    save_array(tmp_path / "a.pt", torch.zeros(100, 40, 40)[3:4])
    assert (tmp_path / "a.pt").stat().st_size < 20_000


def test_a_batch_of_one_the_name_features_and_byte_order_are_understood(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(">f4")
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read_features(tmp_path / "a.npy").numpy(), array)
    np.savez(tmp_path / "one.npz", anything=array)
    assert read_features(tmp_path / "one.npz").shape == (1, 3, 4, 5)
    np.savez(tmp_path / "two.npz", other=np.zeros(3), features=array)
    assert read_features(tmp_path / "two.npz").shape == (1, 3, 4, 5)
    torch.save({"features": torch.zeros(2, 3, 4), "name": "x"}, tmp_path / "a.pt")
    assert read_features(tmp_path / "a.pt").shape == (1, 2, 3, 4)


def test_files_that_hold_no_feature_map_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"a name that ends in \.npy"):
        read_features(tmp_path / "a.txt")
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"got \(3, 4\)"):
        read_features(tmp_path / "flat.npy")
    np.save(tmp_path / "batch.npy", np.zeros((2, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\)"):
        read_features(tmp_path / "batch.npy")
    np.save(tmp_path / "int.npy", np.zeros((3, 4, 4), np.int64))
    with pytest.raises(ValueError, match="expected floating-point numbers"):
        read_features(tmp_path / "int.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ValueError, match="it holds a, b"):
        read_features(tmp_path / "two.npz")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(tmp_path / "object.npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_truncated_feature_files_are_value_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, features=np.ones((3, 20, 20), np.float32))
    else:
        if suffix == ".safetensors":
            pytest.importorskip("safetensors")
        save_array(path, torch.ones(3, 20, 20))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(path)


def test_a_pickle_in_a_feature_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"features": Path}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(tmp_path / "a.pt")


def _write_half_and_raise(path: Path, kind: type[BaseException]) -> None:
    with complete_or_absent(path) as temporary:
        assert temporary.parent == path.parent  # a rename across file systems would be a copy
        temporary.write_bytes(b"half")
        raise kind


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_is_absent_and_an_older_one_stays(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "a.npy"
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(kind):
            _write_half_and_raise(path, kind)
        assert (path.read_bytes() if path.exists() else None) == before
        assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.npy"])


def test_a_failing_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(temporary: Path, _: object) -> None:
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_array(tmp_path / "a.npy", torch.zeros(1, 2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_written_maps_may_be_read_by_whom_the_umask_allows(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    before = os.umask(0o022)
    try:
        save_array(tmp_path / f"a{suffix}", torch.zeros(1, 2, 2))
    finally:
        os.umask(before)
    assert (tmp_path / f"a{suffix}").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")
def test_written_files_follow_links_and_the_umask(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    before = os.umask(0o027)
    try:
        save_picture(tmp_path / "link.png", torch.zeros(3, 2, 2))
    finally:
        os.umask(before)
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o640
    assert read_photo(tmp_path / "real.png").shape == (1, 3, 2, 2)


def test_outputs_that_cannot_be_written_are_refused_before(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "A.NPY", (".npy",)) == tmp_path / "A.NPY"
    with pytest.raises(ValueError, match=r"a name that ends in \.npy, \.pt or \.safetensors"):
        check_writable(tmp_path / "a.txt", images.ARRAY_SUFFIXES)
    with pytest.raises(FileNotFoundError, match="no directory"):
        check_writable(tmp_path / "none" / "a.npy", (".npy",))
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        check_writable(tmp_path / "d.npy", (".npy",))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="no permission"):
        check_writable(tmp_path / "a.npy", (".npy",))


def test_only_colours_are_normalised() -> None:
    with pytest.raises(TypeError, match=r"rgb01: expected floating-point values in 0..1, got torch.uint8"):
        normalize_imagenet(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"rgb01: expected shape \(..., 3, H, W\), got \(1, 1, 4, 4\)"):
        normalize_imagenet(torch.zeros(1, 1, 4, 4))


def test_tokens_are_no_map_and_values_of_one_channel_are(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, 48, 16), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"features .*got \(1, 48, 16\), which may be tokens"):
        read_features(tmp_path / "x.pt")
    assert read_features(tmp_path / "x.pt", "values").shape == (1, 1, 48, 16)
