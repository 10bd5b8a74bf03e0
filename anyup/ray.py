"""Upsampling in a pipeline of Ray Data: `dataset.map_batches(anyup.ray.Upsample, fn_constructor_kwargs=..., ...)`.

Ray reads and writes the data, shares them among its workers and restarts what has died; the class says what becomes of
a batch. It needs nothing of Ray itself.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyup import encoders
from anyup.budget import parse_memory
from anyup.checkpoints import MINI, load
from anyup.devices import choose_device
from anyup.finite import check_features, check_map, overflow
from anyup.head import with_head
from anyup.images import (
    decode_photo,
    guidance_size,
    normalize_imagenet,
    read_photo,
    resize,
    resolve_size,
    round_to_multiple,
)
from anyup.visualization import principal_directions

if TYPE_CHECKING:
    import numpy

__all__ = ["Upsample"]

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Upsample:
    """Photographs in, upsampled features out: a class for `ray.data.Dataset.map_batches`.

    A batch (`batch_format="numpy"`, Ray's default) keeps its columns and gets two more: `output`, and `error`, which is
    "" or says why a photograph has no features. A photograph's features are what `anyup upsample` gives for it, to the
    last roundings, and do not depend on its batch.
    """

    def __init__(
        self,
        encoder: str | Callable[[], encoders.Encoder],
        weights: str | os.PathLike[str] = MINI,
        *,
        column: str = "bytes",
        output: str = "features",
        size: int | Sequence[int] | None = None,
        encoder_size: int | Sequence[int] = 448,
        dtype: str = "float16",
        head: nn.Conv2d | nn.Linear | None = None,
        components: int | None = None,
        points: str | None = None,
        device: str | None = None,
        backend: str | None = None,
        max_memory: float | str | None = None,
    ) -> None:
        """Load the encoder and the weights, once in each worker.

        Args:
            encoder: a name for `anyup.encoders.load_encoder`, or a function that makes an encoder.
            weights: a name or file for `anyup.load`.
            column: where the photographs are: files (bytes), their paths, or arrays (H, W, 3) of RGB in uint8.
            output: the name of the column to add.
            size: of the result in pixels, (height, width) or the longer side; None: the photograph's. A photograph
                with more pixels is first reduced to it. With (height, width) all rows have one shape.
            encoder_size: of the photograph that the encoder sees, rounded to its patches.
            dtype: of the result, "float16" or "float32".
            head: a linear layer or 1x1 convolution, in float32, whose outputs are upsampled instead of the features.
            components: the features' coordinates along so many principal components of the photograph's own grid are
                upsampled instead; the columns `output`_basis (components, C) and `output`_mean (C,), of float32, bring
                the features back: `basis.T @ coordinates + mean`.
            points: a column of arrays (N, 2) of rows and columns, as for `AnyUp.at_points`; the result is (N, C).
            device: by default cuda where there is one, else the CPU; Ray gives each worker its own with `num_gpus=1`.
            backend: as for `anyup.load`.
            max_memory: as for the call.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; and what `anyup.load` and
                `load_encoder` raise.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        if head is not None and components is not None:
            raise ValueError("components: expected without a head")
        if components is not None and (not isinstance(components, int) or components < 1):
            raise ValueError(f"components: expected a whole number of 1 or more, got {components!r}")
        if not (isinstance(encoder, str) or callable(encoder)):
            raise TypeError(f"encoder: expected a name or a function, got {type(encoder).__name__}")
        self._size, self._encoder_size = _sides("size", size), _sides("encoder_size", encoder_size)
        self._column, self._output, self._points = column, output, points
        self._dtype, self._components, self._max_memory = _DTYPES[dtype], components, parse_memory(max_memory)
        self._device = choose_device(device)
        made = encoders.load_encoder(encoder, device=self._device) if isinstance(encoder, str) else encoder()
        self._encoder = made.to(self._device)
        self._model = load(weights, device=self._device, backend=backend)
        self._head = None if head is None else with_head(self._model, head).to(self._device)
        if components is not None and components > self._encoder.channels:
            raise ValueError(f"components: expected at most the encoder's {self._encoder.channels}, got {components}")

    def __call__(self, batch: Mapping[str, numpy.ndarray]) -> dict[str, Any]:
        """A batch with the new columns: `output`, rows of (C, H, W), or of (N, C) at points, and `error`.

        Rows with an error have NaN where all rows have one shape, else nothing at all: (C, 0, 0) or (0, C). Raises
        ValueError where a column is missing or would be replaced.
        """
        import numpy

        for name in (self._column, self._points):
            if name is not None and name not in batch:
                raise ValueError(f"column {name!r}: expected one of {', '.join(map(repr, batch))}")
        if taken := batch.keys() & {*self._names(), "error"}:
            raise ValueError(f"output: the batch has a column {min(taken)!r} already")
        rows, errors = [], []
        for number, cell in enumerate(batch[self._column]):
            points = None if self._points is None else batch[self._points][number]
            try:
                rows.append(self._row(_photograph(cell), points))
                errors.append("")
            except (ValueError, OSError) as error:
                rows.append(self._nothing())
                errors.append(str(error))
        made = {name: _column([row[name] for row in rows], self._is_fixed(name)) for name in self._names()}
        return {**batch, **made, "error": numpy.array(errors, dtype=object)}

    def _names(self) -> list[str]:
        """The columns that are made, beside the error's."""
        return [self._output, *([f"{self._output}_basis", f"{self._output}_mean"] if self._components else [])]

    def _is_fixed(self, name: str) -> bool:
        return name != self._output or (self._points is None and self._size is not None and len(self._size) == 2)

    def _row(self, photo: Tensor, points: Any) -> dict[str, numpy.ndarray]:
        """The row's part of each column for a photograph (1, 3, H, W) in 0..1."""
        native = (int(photo.shape[2]), int(photo.shape[3]))
        seen = round_to_multiple(resolve_size(self._encoder_size, native), self._encoder.patch_size or 1)
        whole = resolve_size(self._size, native)
        guide = guidance_size(native, whole)
        with torch.inference_mode():
            features = self._encoder(self._encoder.normalize(resize(photo, seen).to(self._device)))
            check_features(features, f"features of {self._encoder.name}")
            low, beside = self._carried(features)
            if why := overflow(low, self._dtype):
                raise ValueError(f"dtype: {why}; take float32")
            image = normalize_imagenet(resize(photo, guide)).to(self._device)
            how: dict[str, Any] = {"values": None if low is features else low, "max_memory": self._max_memory}
            if points is None:
                result = self._model(image, features, whole, **how)
                check_map(result, "the result")
            else:
                result = self._model.at_points(image, features, _tensor(points)[None], whole, **how)
        return {self._output: result[0].to(self._dtype).cpu().numpy(), **beside}

    def _carried(self, features: Tensor) -> tuple[Tensor, dict[str, numpy.ndarray]]:
        """What is upsampled, and the other columns' arrays."""
        if self._head is not None:
            return self._head.logits(features.float()), {}
        if self._components is None:
            return features, {}
        points = features[0].flatten(1)
        mean, basis = principal_directions(points, self._components)
        basis = torch.cat((basis, basis.new_zeros(self._components - len(basis), len(mean))))  # of no variance
        coordinates = basis.to(points) @ (points - mean.to(points)[:, None])
        columns = {f"{self._output}_basis": basis.float().numpy(), f"{self._output}_mean": mean.float().numpy()}
        return coordinates.unflatten(1, features.shape[2:])[None], columns

    def _nothing(self) -> dict[str, numpy.ndarray]:
        """A row without features."""
        import numpy

        channels = self._encoder.channels
        found = {
            f"{self._output}_basis": numpy.zeros((self._components or 0, channels), "float32"),
            f"{self._output}_mean": numpy.zeros(channels, "float32"),
        }
        if self._components is not None:
            channels = self._components
        elif self._head is not None:
            channels = self._head.head.weight.shape[0]
        size = self._size if self._is_fixed(self._output) else (0, 0)
        shape = (channels, *(size or ())) if self._points is None else (0, channels)
        found[self._output] = numpy.full(shape, numpy.nan, str(self._dtype).removeprefix("torch."))
        return {name: found[name] for name in self._names()}


def _sides(name: str, given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    sides = [given] if isinstance(given, Integral) else [*given] if isinstance(given, Sequence) else []
    if len(sides) not in (1, 2) or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(f"{name}: expected the longer side or (height, width) in pixels, got {given!r}")
    return tuple(int(side) for side in sides)


def _photograph(cell: Any) -> Tensor:
    """The photograph (1, 3, H, W) in 0..1 of a cell: the bytes of a file, a path, or pixels; ValueError for others."""
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return decode_photo(io.BytesIO(cell), "the photograph")
    if isinstance(cell, (str, os.PathLike)):
        return read_photo(cell)
    dtype, shape = getattr(cell, "dtype", None), tuple(getattr(cell, "shape", ()))
    if dtype is None:
        raise ValueError(f"photograph: expected a file's bytes, a path or pixels, got {type(cell).__name__}")
    if str(dtype) != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"pixels: expected (H, W, 3) of uint8, got {shape} of {dtype}")
    return _tensor(cell).permute(2, 0, 1)[None].float().div_(255).contiguous()


def _tensor(cell: Any) -> Tensor:
    """A tensor of its own: Ray's arrays are often read-only, which torch warns of."""
    import numpy

    return torch.from_numpy(numpy.array(cell))


def _column(rows: Sequence[numpy.ndarray], fixed: bool) -> numpy.ndarray:
    import numpy

    if fixed:
        return numpy.stack(rows)
    column = numpy.empty(len(rows), dtype=object)
    for number, row in enumerate(rows):
        column[number] = row
    return column
