"""Files of tensors, .pt, .pth, .safetensors, .npy and .npz: nothing in them is executed, errors say what is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyup.installing import pip_install
from anyup.ops.precision import check_dense

TORCH_SUFFIXES = (".pt", ".pth")

# The first bytes of a file and the kind of file that they mean; a longer beginning comes before its own prefix.
_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"RIFF", "a WebP picture, or sound"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a pointer of Git LFS, which stands for a file: `git lfs pull` fetches it"),
    (b"<", "a web page, or XML"),
)
_NUMPY, _SAFETENSORS, _TORCH, _NPZ = "a NumPy .npy file", "a .safetensors file", "a file of torch.save", "an .npz file"
_OWN = {".npy": _NUMPY, ".npz": _NPZ, ".safetensors": _SAFETENSORS, **dict.fromkeys(TORCH_SUFFIXES, _TORCH)}
_PICKLED = "it holds pickled objects{}, which are never loaded: only tensors and plain containers of them are"


def read_torch(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`, tensors and plain containers only, on the CPU.

    Raises OSError where the file cannot be opened, else ValueError with a reason that does not name the file.
    """
    return _read(Path(path), lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file by name, and its metadata; raises as `read_torch`, and ImportError."""
    open_file = safetensors_package().safe_open

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        with open_file(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118

    found: tuple[dict[str, Tensor], dict[str, str]] = _read(Path(path), read)
    return found


def read_numpy(path: str | os.PathLike[str], wanted: str) -> Any:
    """The tensor of an .npy file; for an .npz file {name: tensor} with the array `wanted`, or with the only array.

    An .npz file with several arrays, none of them `wanted`, gives {name: None} for each. Raises as `read_torch`.
    """
    import numpy

    def read() -> Any:
        with open(path, "rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            if not isinstance(loaded, numpy.lib.npyio.NpzFile):
                return _from_numpy(loaded)
            names = list(loaded)
            if _archive(Path(path)) != _NPZ:
                raise ValueError("it holds other things than arrays")
            name = wanted if wanted in names else names[0] if len(names) == 1 else None
            return dict.fromkeys(names) if name is None else {name: _from_numpy(loaded[name])}

    return _read(Path(path), read)


def unfit(stored: object) -> str:
    """Why `stored` is not a dense floating-point tensor with numbers, in words; "" if it is one."""
    try:
        check_dense("it", stored)
    except TypeError as error:
        return str(error).removeprefix("it: ")
    assert isinstance(stored, Tensor)
    if not stored.is_floating_point():
        return f"expected floating-point numbers, got {stored.dtype}"
    return "expected numbers, got a tensor on the device meta, which has none" if stored.is_meta else ""


def safetensors_package() -> Any:
    """The package safetensors; raises ImportError, which says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f".safetensors files need safetensors: {pip_install('safetensors')}") from error
    return safetensors


def _from_numpy(array: Any) -> Tensor:
    """A NumPy array as a tensor, without a copy where torch supports its byte order and strides."""
    import numpy

    return torch.from_numpy(numpy.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))


def _read(path: Path, read: Any) -> Any:
    with path.open("rb"):
        pass  # a missing or forbidden file raises OSError here, a damaged one ValueError below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickles, which are then refused anyway
            return read()
    except Exception as error:  # the class of the error depends on which byte is damaged
        raise ValueError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return _PICKLED.format(f" ({found[1]})")
    if found := re.search(r"can't convert np.ndarray of type numpy\.(\w+)", text):
        return f"torch has no tensors of NumPy's {found[1]}"
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        return "it is empty"
    kind = _kind(path, begin)
    if "Object arrays" in text or (kind == _TORCH and begin[1:2] in b"\x03\x04\x05"):  # torch.save writes \x02
        return _PICKLED.format("")
    if kind is not None and kind != _OWN[path.suffix.lower()]:
        return f"it is {kind}"
    if missing := _missing(path, begin):
        return f"it is truncated, {missing}"
    # Torch's message begins with the advice to load the file unsafely, and the reason follows; NumPy's is similar.
    text = text.rpartition("WeightsUnpickler error: ")[2].strip()
    first = next(iter(text.splitlines()), "")
    why = "" if not first or "weights_only" in first or "allow_pickle" in first else f" ({first})"
    return f"it is damaged, or no such file{why}"


def _kind(path: Path, begin: bytes) -> str | None:
    """The kind of a file by its first bytes and, for an archive, by its members; None for an unknown kind."""
    if begin.startswith(b"\x93NUMPY"):
        return _NUMPY
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 1 << 30:
        return _SAFETENSORS
    if begin[:1] == b"\x80" and begin[1:2] in b"\x02\x03\x04\x05":
        return _TORCH
    if begin.startswith(b"PK\x03\x04"):
        return _archive(path)
    text = begin.lstrip()
    return next((kind for start, kind in _BEGINNINGS if text.startswith(start)), None)


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive, which holds code"
    if any(name.endswith("/data.pkl") for name in names):
        return _TORCH
    return _NPZ if names and all(name.endswith(".npy") for name in names) else "a zip archive"


def _missing(path: Path, begin: bytes) -> str:
    """How many bytes a truncated file lacks, in words; "" where none are known to be missing."""
    size = path.stat().st_size
    if begin.startswith(b"PK"):
        return "" if zipfile.is_zipfile(path) else "its table of contents, at the end, is missing"
    if begin.startswith(b"\x93NUMPY"):
        needed = _numpy_bytes(path)
    elif path.suffix.lower() == ".safetensors":
        needed = _safetensors_bytes(path)
    else:
        return ""
    return f"it has {size} of {needed} bytes" if needed is not None and size < needed else ""


def _numpy_bytes(path: Path) -> int | None:
    """The size of the complete .npy file by its header, or the header's size if that is cut off; None: unknown."""
    from numpy.lib import format as numpy_format

    with path.open("rb") as file:
        try:
            version = numpy_format.read_magic(file)
            width = 2 if version == (1, 0) else 4
            end = file.tell() + width + int.from_bytes(file.read(width), "little")
            if path.stat().st_size < end:
                return end
            file.seek(8)
            read = numpy_format.read_array_header_1_0 if width == 2 else numpy_format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, KeyError, SyntaxError):
            return None
    return end + math.prod(shape) * dtype.itemsize


def _safetensors_bytes(path: Path) -> int | None:
    """The size of the complete .safetensors file by its header, or the header's if that is cut off; None: unknown."""
    with path.open("rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
        if end > 1 << 30 or path.stat().st_size < end:
            return None if end > 1 << 30 else end
        try:
            header = json.loads(file.read(end - 8))
            return end + max(
                (entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"), default=0
            )
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return None
