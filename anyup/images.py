"""Photographs, pictures and feature maps, to and from files.

Photographs are read as the viewer sees them: turned by their EXIF orientation, transparent parts on white,
RGB. Files are written complete or not at all: into a temporary file beside the target, which is then
renamed over it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.installing import pip_install

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PICTURE_SUFFIXES",
    "check_finite",
    "check_writable",
    "complete_or_absent",
    "fit_within",
    "normalize_imagenet",
    "read_features",
    "read_photo",
    "resize",
    "round_to_multiple",
    "save_array",
    "save_picture",
    "to_pil",
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
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(f"reading and writing pictures needs Pillow: {pip_install('pillow')}") from error
    return PIL


def read_photo(path: str | os.PathLike[str]) -> Tensor:
    """The photograph in a file, (1, 3, H, W) float32, RGB in 0..1.

    EXIF orientation is applied, transparency is laid on white, palettes and grey become RGB, 16-bit grey
    keeps its 16 bits, of an animation the first frame is taken. Colour profiles are not applied. Raises
    FileNotFoundError or another OSError where the file cannot be opened, and ValueError where it is not a
    picture, is truncated, or holds numbers that are no grey level.
    """
    PIL = _pillow()
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a photograph was expected, this is a directory")
    with path.open("rb") as file:
        try:
            with PIL.Image.open(file) as opened:
                opened.load()
                return _to_rgb01(PIL.ImageOps.exif_transpose(opened), path)
        except PIL.UnidentifiedImageError as error:
            raise ValueError(f"{path}: not a picture in a format that Pillow {PIL.__version__} reads") from error
        except (OSError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: the picture cannot be decoded, it may be truncated ({error})") from error


def _to_rgb01(image: Image.Image, path: Path) -> Tensor:
    import numpy
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        levels = torch.from_numpy(numpy.array(image).astype(numpy.float32))
        top = 1.0 if image.mode == "F" else 65535.0
        low, high = float(levels.min()), float(levels.max())
        if not (0.0 <= low and high <= top):  # also where a NaN is among them
            raise ValueError(f"{path}: grey levels of mode {image.mode} in 0..{top:g} expected, got {low:g}..{high:g}")
        return (levels / top).expand(1, 3, *levels.shape).contiguous()
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = numpy.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255).contiguous()


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
    return F.interpolate(rgb01, size=size, mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)


def fit_within(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width) of `size` scaled in proportion to the longer side `max_side`; at least 1 each."""
    longer = max(size)
    height, width = (max(1, round(side * max_side / longer)) for side in size)
    return height, width


def round_to_multiple(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) each at the nearest multiple of `multiple`, at least one of it."""
    height, width = (max(1, int(side / multiple + 0.5)) * multiple for side in size)
    return height, width


def to_pil(rgb01: Tensor) -> Image.Image:
    """A Pillow RGB picture of (3, H, W) or (1, 3, H, W) in 0..1; what lies outside is clamped."""
    _pillow()
    from PIL import Image

    picture = rgb01[0] if rgb01.dim() == 4 else rgb01
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture must be (3, H, W) or (1, 3, H, W), got {tuple(rgb01.shape)}")
    levels = picture.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def check_writable(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str = "output") -> Path:
    """The path, if a file can be written there; else OSError, or ValueError for another suffix."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{what} {path}: the name must end in {_one_of(suffixes)}")
    if path.suffix.lower() == ".safetensors":
        _safetensors()
    if path.suffix.lower() == ".zarr":
        if path.exists() and not path.is_dir():
            raise OSError(f"{what} {path}: exists and is not a folder")
    elif path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{what} {path}: exists and is not a regular file")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{what} {path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} {path}: no permission to write in {folder}")
    return path


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
        # Made here, so that no other program's file of this name is overwritten; its mode follows the umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors puts a file of its own there, which its owner alone may read
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
        raise ValueError(f"{path}: the name must end in {_one_of(ARRAY_SUFFIXES)}")
    with complete_or_absent(path) as temporary:
        if suffix == ".npy":
            import numpy

            numpy.save(temporary, (array.float() if array.dtype == torch.bfloat16 else array).numpy())
        elif suffix == ".pt":
            torch.save(array.clone() if array.untyped_storage().nbytes() > array.nbytes else array, temporary)
        else:
            _safetensors().save_file({"features": array}, temporary)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f".safetensors files need safetensors: {pip_install('safetensors')}") from error
    return safetensors.torch


def read_features(path: str | os.PathLike[str], what: str = "features") -> Tensor:
    """A feature map from a file, (1, C, h, w), in the file's floating dtype.

    .npy, .npz, .pt, .pth or .safetensors of shape (C, h, w) or (1, C, h, w); where a file holds several
    arrays, the one named "features" is taken. Nothing in the file is executed. `what` the map is, "features" or
    "values", is told in errors; values may be (1, h, w). Raises FileNotFoundError or
    another OSError where the file cannot be opened, and ValueError where its contents are not such a map.
    """
    found = _read_checked(path, _FEATURE_SUFFIXES, f"{what} {path}")
    if isinstance(found, dict):
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if "features" not in tensors and len(tensors) != 1:
            names = ", ".join(sorted(map(str, found))) or "nothing"
            raise ValueError(f'{what} {path}: one array, or one named "features", expected; it holds {names}')
        found = tensors["features"] if "features" in tensors else next(iter(tensors.values()))
    if not isinstance(found, Tensor):
        raise ValueError(f"{what} {path}: an array expected, it holds a {type(found).__name__}")
    if not found.is_floating_point():
        raise ValueError(f"{what} {path}: floating-point numbers expected, got {found.dtype}")
    if found.dim() == 3 and what == "features" and found.shape[0] == 1:
        raise ValueError(
            f"{what} {path}: a map (C, h, w) or (1, C, h, w) expected, got {tuple(found.shape)}, which may be tokens "
            "(1, N, C): bring them to (1, C, h, w) without the class token, or a map of one channel to (1, 1, h, w)"
        )
    if found.dim() == 3:
        found = found[None]
    if found.dim() != 4 or found.shape[0] != 1 or 0 in found.shape:
        raise ValueError(f"{what} {path}: shape (C, h, w) or (1, C, h, w) expected, got {tuple(found.shape)}")
    return found.detach().contiguous()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by name; nothing in the file is executed.

    Raises OSError where the file cannot be opened, and ValueError where it holds no such thing.
    """
    found = _read_checked(path, _TENSOR_SUFFIXES, str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: tensors by name expected, it holds a {type(found).__name__}")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _read_checked(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str) -> object:
    """What a file of one of these suffixes holds; errors that it has call it `what`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{what}: the name must end in {_one_of(suffixes)}")
    with path.open("rb"):
        pass  # so that a missing or forbidden file is told from a damaged one
    try:
        return _read_arrays(path, suffix)
    except ImportError:
        raise
    except Exception as error:  # each format raises kinds of its own for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{what}: cannot be read as {suffix}, it may be truncated ({reason})") from error


def _read_arrays(path: Path, suffix: str) -> object:
    if suffix in (".npy", ".npz"):
        import numpy

        with path.open("rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            if suffix == ".npy":
                return _from_numpy(loaded)
            return {name: _from_numpy(loaded[name]) for name in loaded.files}
    if suffix == ".safetensors":
        return _safetensors().load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_numpy(array: Any) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))


def check_finite(features: Tensor, name: str) -> None:
    """Raise ValueError where features (1, C, h, w) hold a NaN or an infinity, with its channel and place."""
    finite = torch.isfinite(features)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    _, channel, row, column = (int(index) for index in bad[0])
    what = "a NaN" if bool(torch.isnan(features[0, channel, row, column])) else "an infinity"
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise ValueError(
        f"{name}: channel {channel} holds {what} at row {row}, column {column}{others}; the normalisations "
        "of the model would spread it over the whole result"
    )
