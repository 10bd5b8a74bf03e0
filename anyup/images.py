"""Photographs, pictures and feature maps, to and from files.

Photographs are read as the viewer sees them: turned by their EXIF orientation, transparent parts on white,
RGB. Only the orientation is read from EXIF, so that any other broken tag does no harm. A file is complete or
absent: it is written under a temporary name beside the target and then renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.installing import pip_install
from anyup.tensor_files import read_numpy, read_safetensors, read_torch, safetensors_package, unfit

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PICTURE_SUFFIXES",
    "StoredPicture",
    "check_readable",
    "check_writable",
    "complete_or_absent",
    "decode_photo",
    "fit_within",
    "guidance_size",
    "normalize_imagenet",
    "picture_size",
    "read_features",
    "read_photo",
    "read_picture",
    "resize",
    "resolve_size",
    "round_to_multiple",
    "save_array",
    "save_picture",
    "to_pil",
    "to_rgb01",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)

ARRAY_SUFFIXES = (".npy", ".pt", ".safetensors")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth")
_FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(f"reading and writing pictures needs Pillow: {pip_install('pillow')}") from error
    return PIL


def check_readable(path: str | os.PathLike[str], what: str = "") -> Path:
    """The path, if it is a regular file; else raises OSError, which names it `what`, by default by its path.

    A named pipe, a socket or a device is never opened: to open one might block forever.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{what or path}: expected a file, this is a directory")
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise OSError(f"{what or path}: expected a regular file, this is a {kinds.get(stat.S_IFMT(mode), 'device')}")
    return path


class StoredPicture(NamedTuple):
    """A picture's pixels as its file stores them, and its orientation tag: EXIF's 1 to 8, None where there is none."""

    pixels: Image.Image
    orientation: int | None

    @property
    def turned_size(self) -> tuple[int, int]:
        """(width, height) of the picture that `turned` returns."""
        width, height = self.pixels.size
        return (width, height) if (self.orientation or 1) < 5 else (height, width)

    def turned(self) -> Image.Image:
        """The pixels, turned and mirrored by the orientation tag."""
        from PIL.Image import Transpose

        methods = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }
        method = methods.get(self.orientation or 1)
        return self.pixels if method is None else self.pixels.transpose(method)


def read_picture(path: str | os.PathLike[str]) -> StoredPicture:
    """The picture in a file, decoded, in Pillow's mode for it; of an animation the first frame.

    Raises FileNotFoundError or another OSError where there is no regular file that can be opened, and ValueError where
    it is not a picture or cannot be decoded.
    """
    path = check_readable(path)
    with path.open("rb") as file:
        return _read_picture(file, path)


def _read_picture(file: BinaryIO, name: str | os.PathLike[str]) -> StoredPicture:
    PIL = _pillow()
    try:
        with PIL.Image.open(file) as opened:
            return _decode(opened)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture in a format that Pillow {PIL.__version__} reads") from error
    except Exception as error:  # the class of the error depends on the format of the file
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name}: the picture cannot be decoded ({reason})") from error


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(height, width) in a picture file's header, before any turn; None where there is none. Nothing is decoded."""
    PIL = _pillow()
    # The class of the error depends on the format of the file.
    with suppress(Exception), PIL.Image.open(check_readable(path)) as opened:
        return opened.height, opened.width
    return None


def _decode(opened: Any) -> StoredPicture:
    orientation = None
    if opened.format == "TIFF":
        # Pillow turns a TIFF when it loads its pixels, and fails on broken tags. So the tags are deleted first.
        exif = opened.getexif()
        orientation = exif.get(_ORIENTATION)
        for tag in list(exif):
            del exif[tag]
    pixels = opened.copy()  # the size of `opened` may still be that before the turn
    if orientation is None:  # read after the pixels, because a PNG's EXIF may follow them
        orientation = _orientation(opened.info.get("exif") or b"")
    if orientation is None:
        with suppress(Exception):  # broken XMP raises errors of many classes, and the pixels are fine
            orientation = opened.getexif().get(_ORIENTATION)  # from XMP, or from a PNG's text
    return StoredPicture(pixels, orientation if orientation in range(1, 9) else None)


_ORIENTATION = 0x0112  # EXIF's tag
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's integer types, as formats of `struct`


def _orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block, even if other parts are broken; None where there is no orientation."""
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some cameras write it twice
    order = ">" if tiff[:2] == b"MM" else "<"
    with suppress(struct.error):  # where the block ends too early
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, first)
        for entry in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
                return int(struct.unpack_from(f"{order}{_INTEGERS[kind]}", tiff, entry + 8)[0])
    return None


def read_photo(path: str | os.PathLike[str], *, turned: bool = True) -> Tensor:
    """The photograph in a file, (1, 3, H, W) float32, RGB in 0..1.

    EXIF orientation is applied (unless it is not to be `turned`), transparency is laid on white, palettes and grey
    become RGB, 16-bit grey keeps its 16 bits, of an animation the first frame is taken. Colour profiles are not
    applied. Raises FileNotFoundError or another OSError where there is no regular file that can be opened, and
    ValueError where it is not a picture, cannot be decoded, or holds numbers that are no grey level.
    """
    picture = read_picture(path)
    return to_rgb01(picture.turned() if turned else picture.pixels, path)


def decode_photo(file: BinaryIO, name: str = "the photograph") -> Tensor:
    """The photograph in an open file, as `read_photo` gives it; errors call it `name`."""
    return to_rgb01(_read_picture(file, name).turned(), name)


def to_rgb01(image: Image.Image, path: str | os.PathLike[str]) -> Tensor:
    """A picture as `read_photo` returns it; raises ValueError, which names the path, where it has no colours."""
    import numpy
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        levels = torch.from_numpy(numpy.array(image).astype(numpy.float32))
        top = 1.0 if image.mode == "F" else 65535.0
        low, high = float(levels.min()), float(levels.max())
        if not (0.0 <= low and high <= top):  # a NaN fails both comparisons
            raise ValueError(f"{path}: expected grey levels of mode {image.mode} in 0..{top:g}, got {low:g}..{high:g}")
        return (levels / top).expand(1, 3, *levels.shape).contiguous()
    try:
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1)[None].float().div_(255).contiguous()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch is out of memory
        raise ValueError(f"{path}: Pillow's mode {image.mode} cannot be brought to RGB ({error})") from error


def normalize_imagenet(rgb01: Tensor) -> Tensor:
    """RGB in 0..1, (..., 3, H, W), minus ImageNet's mean and divided by its standard deviation.

    Raises TypeError for integers, ValueError for another number of channels.
    """
    if not rgb01.is_floating_point():
        raise TypeError(f"rgb01: expected floating-point values in 0..1, got {rgb01.dtype}")
    if rgb01.dim() < 3 or rgb01.shape[-3] != 3:
        raise ValueError(f"rgb01: expected shape (..., 3, H, W), got {tuple(rgb01.shape)}")
    mean = torch.tensor(IMAGENET_MEAN, dtype=rgb01.dtype, device=rgb01.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=rgb01.dtype, device=rgb01.device)[:, None, None]
    return (rgb01 - mean) / std


def resize(rgb01: Tensor, size: tuple[int, int]) -> Tensor:
    """A photograph (B, 3, H, W) in 0..1 at size (height, width): bicubic, antialiased, clamped to 0..1."""
    if tuple(rgb01.shape[-2:]) == tuple(size):
        return rgb01
    return _interpolated(rgb01, size).clamp_(0, 1)


def resizing_of_axis(length: int, count: int) -> Tensor:
    """The matrix (count, length) by which `resize` multiplies an axis, before it clamps."""
    return _interpolated(torch.eye(length)[None, None], (count, length))[0, 0]


def _interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


def fit_within(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width) of `size`, scaled so that the longer side is `max_side`; each at least 1."""
    longer = max(size)
    height, width = (max(1, round(side * max_side / longer)) for side in size)
    return height, width


def resolve_size(wanted: Sequence[int] | None, native: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that is wanted of a picture: both, or (N,), its longer side; None: its own size, `native`."""
    if wanted is None:
        return native
    return (wanted[0], wanted[1]) if len(wanted) == 2 else fit_within(native, wanted[0])


def guidance_size(native: tuple[int, int], output: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image that guides: the picture's, or the output's where that has fewer pixels."""
    return output if output[0] * output[1] < native[0] * native[1] else native


def round_to_multiple(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width), each rounded to the nearest multiple of `multiple`, and at least `multiple`."""
    height, width = (max(1, int(side / multiple + 0.5)) * multiple for side in size)
    return height, width


def to_pil(rgb01: Tensor) -> Image.Image:
    """A Pillow RGB picture of (3, H, W) or (1, 3, H, W) in 0..1; what lies outside is clamped."""
    _pillow()
    from PIL import Image

    picture = rgb01[0] if rgb01.dim() == 4 else rgb01
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise ValueError(f"picture: expected (3, H, W) or (1, 3, H, W), got {tuple(rgb01.shape)}")
    levels = picture.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def check_writable(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str = "output") -> Path:
    """The path, if a file can be written there; else OSError, or ValueError for another suffix."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{what} {path}: expected a name that ends in {_one_of(suffixes)}")
    if path.suffix.lower() == ".safetensors":
        safetensors_package()
    if path.suffix.lower() == ".zarr":
        if path.exists() and not _is_zarr_array(path):
            raise OSError(f"{what} {path}: exists and is not a zarr array, which alone would be replaced")
    elif path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{what} {path}: exists and is not a regular file")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{what} {path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} {path}: no permission to write in {folder}")
    return path


def _is_zarr_array(path: Path) -> bool:
    """Whether a folder is an array of zarr, of either format, or empty."""
    if not path.is_dir():
        return False
    if (path / "zarr.json").is_file():
        with suppress(ValueError, AttributeError):
            return bool(json.loads((path / "zarr.json").read_text(encoding="utf-8")).get("node_type") == "array")
    return (path / ".zarray").is_file() or not any(path.iterdir())


def _one_of(suffixes: tuple[str, ...]) -> str:
    return suffixes[0] if len(suffixes) == 1 else f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


@contextmanager
def complete_or_absent(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to `path` when the block ends, removed where the block raises.

    Until then an older file at `path` stays as it was. A symbolic link is written through.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        # O_EXCL: never overwrite a file of another program. The mode follows the umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors replaces the file by one that only its owner may read
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def save_picture(path: str | os.PathLike[str], picture: Tensor | Image.Image) -> None:
    """Write a picture, (3, H, W) in 0..1 or Pillow's, complete or not at all; the suffix names the format."""
    image = to_pil(picture) if isinstance(picture, Tensor) else picture
    with complete_or_absent(path) as temporary:
        if temporary.suffix.lower() == ".png":
            image.save(temporary)
        else:
            image.save(temporary, quality=95)


def save_array(path: str | os.PathLike[str], array: Tensor) -> None:
    """Write a tensor to .npy, .pt or .safetensors (under the name "features"), complete or not at all.

    Shape and dtype stay, except that bfloat16, which NumPy lacks, is widened to float32 in a .npy file.
    """
    array = array.detach().cpu().contiguous()
    suffix = Path(path).suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {_one_of(ARRAY_SUFFIXES)}")
    with complete_or_absent(path) as temporary:
        if suffix == ".npy":
            import numpy

            numpy.save(temporary, (array.float() if array.dtype == torch.bfloat16 else array).numpy())
        elif suffix == ".pt":
            torch.save(array.clone() if array.untyped_storage().nbytes() > array.nbytes else array, temporary)
        else:
            safetensors_package().torch.save_file({"features": array}, temporary)


def read_features(path: str | os.PathLike[str], what: str = "features") -> Tensor:
    """A feature map from a file, (1, C, h, w), in the file's floating dtype.

    .npy, .npz, .pt, .pth or .safetensors of shape (C, h, w) or (1, C, h, w); where a file holds several
    arrays, the one named "features" is taken. Nothing in the file is executed. `what` is the map's name in
    errors, "features" or "values"; values may be (1, h, w). Raises FileNotFoundError or
    another OSError where the file cannot be opened, and ValueError where its contents are not such a map.
    """
    found = _read_checked(path, _FEATURE_SUFFIXES, f"{what} {path}")
    if isinstance(found, dict):
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if "features" not in tensors and len(tensors) != 1:
            names = ", ".join(sorted(map(str, found))) or "nothing"
            raise ValueError(f'{what} {path}: expected one array, or one named "features", it holds {names}')
        found = tensors["features"] if "features" in tensors else next(iter(tensors.values()))
    if not isinstance(found, Tensor):
        raise ValueError(f"{what} {path}: expected an array, it holds a {type(found).__name__}")
    if why := unfit(found):
        raise ValueError(f"{what} {path}: {why}")
    if found.dim() == 3 and what == "features" and found.shape[0] == 1:
        raise ValueError(
            f"{what} {path}: expected a map (C, h, w) or (1, C, h, w), got {tuple(found.shape)}, which may be tokens "
            "(1, N, C): bring them to (1, C, h, w) without the class token, or a map of one channel to (1, 1, h, w)"
        )
    if found.dim() == 3:
        found = found[None]
    if found.dim() != 4 or found.shape[0] != 1 or 0 in found.shape:
        raise ValueError(f"{what} {path}: expected shape (C, h, w) or (1, C, h, w), got {tuple(found.shape)}")
    return found.detach().contiguous()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by name, dotted where dicts lie in dicts; nothing is executed.

    Raises OSError where the file cannot be opened, and ValueError where it holds no such thing.
    """
    found = _read_checked(path, _TENSOR_SUFFIXES, str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected tensors by name, it holds a {type(found).__name__}")
    return dict(_named_tensors(found))


def _named_tensors(found: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in found.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _named_tensors(value, f"{prefix}{name}.")


def _read_checked(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str) -> object:
    """The content of a file with one of these suffixes; errors name the file `what`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{what}: expected a name that ends in {_one_of(suffixes)}")
    check_readable(path, what)
    try:
        if suffix in (".npy", ".npz"):
            return read_numpy(path, "features")
        return read_safetensors(path)[0] if suffix == ".safetensors" else read_torch(path)
    except ValueError as error:
        raise ValueError(f"{what}: cannot be read as {suffix}: {error}") from error
