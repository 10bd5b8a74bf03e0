"""The upsampler as one ONNX file of standard operators, for runtimes that know no PyTorch.

Sizes are fixed when the file is written, so each rectangle of output pixels has its own few keys: products of one shape
for a row of rectangles, and a bias that hides what a pixel's window does not hold. No mask of all pixels by all keys.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.argument_checks import OutputSize, check_output_size, check_size
from anyup.bench.published import rotate, run_block, run_encoder, unify
from anyup.images import complete_or_absent
from anyup.installing import pip_install
from anyup.model import AnyUp
from anyup.ops.pixel_encoder.cells import Cells
from anyup.window import Window, axis_bounds

OPSET = 20

# Along an axis a rectangle has as many pixels as a cell of the grid, within these limits: its keys are few then, and
# its products not too small.
_SHORTEST, _LONGEST = 4, 32

# Of the largest output: what tells a broken file from float32. All of it is float32 there, where the package makes the
# keys in float64 on a CPU: 2e-4 was seen at 448 from 32, 7e-5 of the same graph in PyTorch.
_TOLERANCE = 1e-3


def to_onnx(
    upsampler: AnyUp,
    path: str | os.PathLike[str],
    *,
    image_size: Sequence[int],
    feature_size: Sequence[int],
    output_size: OutputSize = None,
    channels: int = 384,
) -> float:
    """Write an upsampler, in float32, as an ONNX file, and check the file against it.

    The graph takes `image` (B, input_dim, *image_size), normalised as for the call, and `features` (B, C,
    *feature_size), and gives `upsampled` (B, C, *output_size), all float32; B and C are any. It holds standard
    operators of opset 20 alone, and its weights. The file is complete or absent. All of it is float32, the
    keys too, which the package makes in float64 on a CPU.

    Args:
        upsampler: on any device; it is not changed.
        path: ends in .onnx.
        image_size, feature_size: (height, width).
        output_size: as in the call.
        channels: of the features that the file is checked with.

    Returns:
        The largest difference between the file's result, in onnxruntime on a CPU, and the package's, on random inputs,
        relative to the largest value.

    Raises:
        ValueError, TypeError: which argument, what was expected, what came; before any work.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the file's results are not the package's; nothing is written.
    """
    if not isinstance(upsampler, AnyUp):
        raise TypeError(f"upsampler: expected an AnyUp, got {type(upsampler).__name__}")
    if Path(path).suffix.lower() != ".onnx":
        raise ValueError(f"path: expected a file name that ends in .onnx, got {str(path)!r}")
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels: expected a positive integer, got {channels!r}")
    image, grid = check_size("image_size", image_size), check_size("feature_size", feature_size)
    size = check_output_size(output_size, image)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    model = copy.deepcopy(upsampler).cpu().float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, depth, *each, generator=generator)
        for depth, each in ((model.config["input_dim"], image), (channels, grid))
    ]
    with complete_or_absent(path) as partial, torch.no_grad():
        _write(_Graph(model, image, grid, size), inputs, partial)
        expected = model(*inputs, size)
        difference = float((_run(partial, inputs) - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"{path}: the file's results differ from the package's by {difference:.1e}, relative")
    return difference


@dataclass(frozen=True)
class _Axis:
    """An axis of the output in pieces of one length, and the keys that each needs, as many for all.

    Attributes:
        pixels: (n, length) of each piece; what would be beyond the end is the last pixel again.
        first: the first key of each piece.
        keys: (n, K), which follow each other.
        bias: (n, length, K), 0 where a pixel sees a key and -inf elsewhere.
    """

    pixels: Tensor
    first: list[int]
    keys: Tensor
    bias: Tensor

    @classmethod
    def cut(cls, window: Window, count: int, keys: int) -> _Axis:
        length = min(max(round(count / keys), _SHORTEST), _LONGEST, count)
        start, stop = (torch.tensor(bounds) for bounds in axis_bounds(window, count, keys))
        pixels = (torch.arange(0, count, length)[:, None] + torch.arange(length)).clamp(max=count - 1)
        first, last = start[pixels].amin(dim=1), stop[pixels].amax(dim=1)
        most = int((last - first).max())
        first = first.clamp(max=keys - most)
        seen = first[:, None] + torch.arange(most)
        hidden = (seen[:, None] < start[pixels][..., None]) | (seen[:, None] >= stop[pixels][..., None])
        return cls(pixels, first.tolist(), seen, torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf))


class _Graph(nn.Module):
    """The forward in standard operators, of fixed sizes."""

    def __init__(self, model: AnyUp, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid, self.size = model, grid, size
        rows, self.columns = (_Axis.cut(model.window, *counts) for counts in zip(size, grid, strict=True))
        self.keys_of_row = rows.keys.shape[1]
        self.rows = list(zip(rows.pixels, rows.first, rows.bias, strict=True))

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        model = self.model
        encoded = rotate(run_encoder(model.image_encoder, image), model.rope.freqs)
        query = _pooled(run_encoder(model.query_encoder, encoded), self.size)
        image_keys = _pooled(run_encoder(model.key_encoder, encoded), self.grid)
        unification, *blocks = cast(Any, model.key_features_encoder)
        feature_keys = unify(F.normalize(features, dim=1), unification.basis)
        for block in blocks:
            feature_keys = run_block(block, feature_keys)
        key = run_encoder(model.aggregation, torch.cat((image_keys, feature_keys), dim=1))
        attention = model.cross_decode.cross_attn
        dim, heads = model.qk_dim, model.cross_decode.num_heads
        weight, bias = attention.attention.in_proj_weight, attention.attention.in_proj_bias
        query = attention.norm_q(model.cross_decode.conv2d(query).permute(0, 2, 3, 1))
        query = F.linear(query, weight[:dim], bias[:dim]) * (dim // heads) ** -0.5
        key = F.linear(attention.norm_k(key.permute(0, 2, 3, 1)), weight[dim : 2 * dim], bias[dim : 2 * dim])
        out = self._attend(query.unflatten(3, (heads, -1)), key.unflatten(3, (heads, -1)), features.permute(0, 2, 3, 1))
        return out[:, : self.size[0], : self.size[1]].permute(0, 3, 1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C) to (B, rows, columns, C), of whole rectangles."""
        columns = self.columns
        (number, wide), most = columns.pixels.shape, columns.keys.shape[1]
        query = query[:, :, columns.pixels.flatten()].unflatten(2, (number, wide))
        key, value = (x[:, :, columns.keys.flatten()].unflatten(2, (number, most)) for x in (key, value))
        parts = []
        for pixels, first, bias in self.rows:
            high, keys = len(pixels), slice(first, first + self.keys_of_row)
            q = query[:, pixels].permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
            k = key[:, keys].permute(0, 2, 4, 5, 1, 3).flatten(4, 5)
            v = value[:, keys].permute(0, 2, 1, 3, 4).flatten(2, 3)
            hidden = bias[None, :, None, :, None] + columns.bias[:, None, :, None, :]
            logits = q @ k + hidden.flatten(3, 4).flatten(1, 2)[:, None]  # (B, n, heads, pixels, keys)
            out = logits.softmax(dim=4).mean(dim=2) @ v
            parts.append(out.unflatten(2, (high, wide)).permute(0, 2, 1, 3, 4).flatten(2, 3))
        return torch.cat(parts, dim=1)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling as two products: its own operator exports for some sizes alone."""
    for axis, count in zip((2, 3), size, strict=True):
        length = x.shape[axis]
        if count != length:
            cells = Cells(0, count, count, length)
            mean = cells.indicator(x.dtype, x.device) / cells.sizes(x.dtype, x.device)[:, None]
            x = mean @ x if axis == 2 else x @ mean.T
    return x


def _write(graph: nn.Module, inputs: list[Tensor], path: Path) -> None:
    batch, channels = torch.export.Dim("batch"), torch.export.Dim("channels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        program: Any = torch.onnx.export(
            graph,
            tuple(inputs),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["image", "features"],
            output_names=["upsampled"],
            dynamic_shapes=({0: batch}, {0: batch, 1: channels}),
        )
        program.save(str(path), external_data=False)


def _run(path: Path, inputs: list[Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: t.numpy() for name, t in zip(("image", "features"), inputs, strict=True)})
    return torch.from_numpy(found)


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(f"an ONNX file needs {package}: {pip_install(package)}") from error
