"""Writing an upsampled map piece by piece into `out`: a tensor, a NumPy array, a memory map or a zarr array.

A piece is converted to the dtype of `out`. After each piece the pages of a memory map are written to the disk and
freed, because they would count as resident memory. A piece on a GPU is copied to the host while the GPU computes the
next one.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from anyup.ops.precision import FLOATING, check_dense
from anyup.progress import human_bytes

Shape = tuple[int, int, int, int]

_WORK: Any = 10_000
"""Steps of the search for a number that two tensors have in common; those that need more are taken for sharing one."""

_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Destination(Protocol):
    """An `out` that pieces of a map are written into.

    Attributes:
        dtype: the dtype of `out`.
        multiple: the height of a zarr chunk; a piece of a multiple of so many rows is written without reading a
            chunk first. 1 for anything but zarr.
    """

    dtype: torch.dtype
    multiple: int

    def write(self, rows: slice, columns: slice, piece: Tensor) -> None:
        """Write a piece (B, C, rows, columns) to these rows and columns."""

    def finish(self) -> None:
        """Wait until all pieces have arrived in `out`."""


def destination_of(out: Any, shape: Shape, inputs: Mapping[str, Tensor]) -> Destination:
    """The destination for an `out` of the shape (B, C, H, W); `inputs` are the tensors that the call reads, by name.

    Raises:
        TypeError: neither a tensor nor an array, or not of floating-point numbers.
        ValueError: `out` has another shape, cannot be written, or shares memory with an input.
        OSError: the disk has no room for the file of a memory map.
    """
    device = next(iter(inputs.values())).device
    if isinstance(out, Tensor):
        return _tensor_destination(out, shape, inputs, device)
    if not all(hasattr(out, name) for name in ("shape", "dtype", "__setitem__")):
        raise TypeError(f"out: expected a tensor, a NumPy or a zarr array, got {type(out).__name__}")
    _check_shape(out.shape, shape)
    dtype = _DTYPES.get(str(out.dtype))
    if dtype is None:
        raise TypeError(f"out: expected floating-point numbers of {', '.join(_DTYPES)}, got {out.dtype}")
    if getattr(out, "read_only", False):
        raise ValueError("out: expected an array that can be written, got a read-only one")
    host = _array_destination(out, dtype, inputs)
    return _Pinned(host) if device.type == "cuda" else host


def _tensor_destination(out: Tensor, shape: Shape, inputs: Mapping[str, Tensor], device: torch.device) -> Destination:
    check_dense("out", out)
    _check_shape(out.shape, shape)
    if out.dtype not in FLOATING:
        raise TypeError(f"out: expected a floating-point tensor of 16, 32 or 64 bits, got {out.dtype}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that needs no gradient; use out.detach()")
    if out.is_meta:
        raise ValueError("out: expected a tensor with memory, got one on the device meta")
    if any(stride == 0 and length > 1 for stride, length in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("out: expected a place for each number, got a tensor that repeats some (expand); use clone()")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out: a tensor of inference mode can be written to within torch.inference_mode() alone")
    _check_apart(out, inputs)
    memory = _Memory(out)
    return _Pinned(memory) if device.type == "cuda" and out.device.type == "cpu" else memory


def _check_apart(out: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError where `out` shares memory with an input, which the call still reads while it writes `out`."""
    for name, tensor in inputs.items():
        if tensor.device == out.device and _share_memory(out, tensor):
            raise ValueError(f"out: shares memory with {name}, which is read while it is written")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a number in common. Channels of one batch, say, may lie between another's."""
    import numpy

    def places(tensor: Tensor) -> numpy.ndarray:
        """The tensor's memory, which may be a GPU's: the array is asked where its items lie, never what they are."""
        size = tensor.element_size()
        interface = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }
        return numpy.asarray(SimpleNamespace(__array_interface__=interface))

    if not one.numel() or not other.numel():
        return False
    try:
        return numpy.shares_memory(places(one), places(other), max_work=_WORK)
    except numpy.exceptions.TooHardError:
        return True


def _array_destination(out: Any, dtype: torch.dtype, inputs: Mapping[str, Tensor]) -> Destination:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(out, numpy.ndarray):
        return _Chunked(out, dtype)
    if not out.flags.writeable:
        raise ValueError("out: expected an array that can be written, got a read-only one")
    try:
        tensor = torch.from_numpy(out)
    except ValueError as error:  # torch has no tensors with such strides, negative ones for example
        raise ValueError(f"out: {error}") from error
    _check_apart(tensor, inputs)
    mapped = out
    while isinstance(mapped, numpy.ndarray) and not isinstance(mapped, numpy.memmap):
        mapped = mapped.base
    if not isinstance(mapped, numpy.memmap):
        return _Memory(tensor)
    if mapped.mode == "c":  # copy on write: a page that is freed loses what was written
        raise ValueError("out: expected a memory map that is written to its file (r+ or w+), got mode 'c'")
    if mapped.filename:
        reserve(mapped.filename)
    return MemoryMap(tensor, mapped._mmap)


def _check_shape(actual: Sequence[int], expected: Shape) -> None:
    if tuple(actual) != expected:
        raise ValueError(f"out: expected shape {expected}, (B, C, H, W) of what is computed, got {tuple(actual)}")


def free_space(path: str | os.PathLike[str]) -> int:
    """Free bytes of the disk that holds a file's folder."""
    return shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free


def no_room(path: str | os.PathLike[str], needed: int) -> OSError:
    """An OSError for a full disk, which says how many bytes are needed and how many are free."""
    what = f"{human_bytes(needed)} needed, {human_bytes(free_space(path))} free: {os.strerror(errno.ENOSPC)}"
    return OSError(errno.ENOSPC, what, os.fspath(path))


def reserve(path: str | os.PathLike[str]) -> None:
    """Allocate all disk blocks of a file with holes: a write to its memory map on a full disk would kill the process.

    Raises OSError where the disk has no room, with the bytes that are needed and free.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    if not os.access(path, os.R_OK | os.W_OK):
        return  # a temporary file whose name is deleted already
    with open(path, "r+b") as file:
        status = os.fstat(file.fileno())
        needed = status.st_size - status.st_blocks * 512
        if needed <= 0:
            return
        try:
            os.posix_fallocate(file.fileno(), 0, status.st_size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                return  # the file system cannot allocate blocks ahead
            raise no_room(path, needed) from error


class _Memory:
    """A tensor, on any device."""

    multiple = 1

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self.dtype = out.dtype

    def write(self, rows: slice, columns: slice, piece: Tensor) -> None:
        self._out[:, :, rows, columns] = piece

    def finish(self) -> None:
        pass


class MemoryMap(_Memory):
    """A tensor over a map of a file."""

    def __init__(self, out: Tensor, mapping: mmap.mmap) -> None:
        super().__init__(out)
        self._mapping = mapping
        # Else the operating system reads neighbouring pages ahead, and so all of the file: the rows of a piece lie
        # apart.
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_RANDOM)

    def write(self, rows: slice, columns: slice, piece: Tensor) -> None:
        super().write(rows, columns, piece)
        self._mapping.flush()
        if hasattr(self._mapping, "madvise"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class _Chunked:
    """An array of zarr or h5py, which is written by assignment."""

    def __init__(self, out: Any, dtype: torch.dtype) -> None:
        self._out = out
        self.dtype = dtype
        chunks = getattr(out, "chunks", None)
        self.multiple = int(chunks[2]) if chunks else 1

    def write(self, rows: slice, columns: slice, piece: Tensor) -> None:
        self._out[:, :, rows, columns] = piece.to("cpu", self.dtype).contiguous().numpy()

    def finish(self) -> None:
        pass


@dataclass
class _OnItsWay:
    """A piece that is being copied to a buffer of the host; the copy is complete after `event`."""

    rows: slice
    columns: slice
    piece: Tensor
    event: Any


def _pinned(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=True)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """An event behind all work that is queued on a device, which need not be the current one."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Pinned:
    """Copies pieces from a GPU to the host through two pinned buffers.

    A piece is written to the destination when its buffer is needed for a later piece: meanwhile the GPU computes.
    """

    def __init__(
        self,
        host: Destination,
        make_buffer: Callable[[int, torch.dtype], Tensor] = _pinned,
        make_event: Callable[[torch.device], Any] = _recorded,
    ) -> None:
        self._host, self._make_buffer, self._make_event = host, make_buffer, make_event
        self.dtype, self.multiple = host.dtype, host.multiple
        self._buffers: list[Tensor | None] = [None, None]
        self._underway: list[_OnItsWay | None] = [None, None]
        self._turn = 0

    def write(self, rows: slice, columns: slice, piece: Tensor) -> None:
        turn = self._turn
        self._hand_on(turn)
        # Channels last, as the piece lies in memory, so that the copy is one block.
        source = piece.permute(0, 2, 3, 1).to(self.dtype).contiguous()
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < source.numel():
            buffer = self._buffers[turn] = self._make_buffer(source.numel(), self.dtype)
        held = buffer[: source.numel()].view(source.shape)
        held.copy_(source, non_blocking=True)
        event = self._make_event(source.device)
        self._underway[turn] = _OnItsWay(rows, columns, held.permute(0, 3, 1, 2), event)
        self._turn = 1 - turn

    def finish(self) -> None:
        for turn in (self._turn, 1 - self._turn):  # the older first
            self._hand_on(turn)
        self._host.finish()

    def _hand_on(self, turn: int) -> None:
        underway, self._underway[turn] = self._underway[turn], None
        if underway is not None:
            underway.event.synchronize()
            self._host.write(underway.rows, underway.columns, underway.piece)
