"""The upsampler, alone or behind an encoder, as one ONNX file of standard operators, for runtimes without PyTorch.

The graph consists of the references of `anyup.ops`, except for the attention, whose reference is dense. The sizes are
fixed when the file is written, so each rectangle of output pixels has its own few keys. The rectangles of one row have
products of one shape, and a bias hides the keys outside a pixel's window. There is no mask of all pixels by all keys.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.argument_checks import OutputSize, check_output_size, check_size
from anyup.encoders import Encoder
from anyup.images import complete_or_absent, normalize_imagenet, resize, resizing_of_axis, round_to_multiple
from anyup.installing import pip_install
from anyup.layers import BorderConv2d, LearnedFeatureUnification
from anyup.layers import Encoder as PixelEncoder
from anyup.model import AnyUp
from anyup.ops.feature_unification import reference as feature_unification
from anyup.ops.pixel_encoder import reference as pixel_encoder
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.query_projection import reference as query_projection
from anyup.window import Window, axis_bounds

OPSET = 20

# Along each axis a rectangle has as many pixels as a cell of the grid, within these limits. So it has few keys, and its
# products are not too small.
_SHORTEST, _LONGEST = 4, 32

# The largest difference, relative to the largest output, that float32 explains; a broken file differs by more. The file
# computes the keys in float32, the package in float64 on a CPU. Measured at 448 from 32: 2e-4 in onnxruntime, and 7e-5
# for the same graph in PyTorch.
_TOLERANCE = 1e-3


def to_onnx(
    upsampler: AnyUp,
    path: str | os.PathLike[str],
    *,
    image_size: Sequence[int],
    feature_size: Sequence[int] | None = None,
    output_size: OutputSize = None,
    channels: int = 384,
    encoder: Encoder | None = None,
    encoder_size: Sequence[int] | None = None,
) -> float:
    """Write an upsampler, in float32, as an ONNX file, and check the file against it.

    The graph takes `image` (B, input_dim, *image_size), normalised as for the call, and `features` (B, C,
    *feature_size), and gives `upsampled` (B, C, *output_size), all float32; B and C are any. It holds standard
    operators of opset 20 alone, and its weights. The file is complete or absent. All of it is float32, the
    keys too, which the package makes in float64 on a CPU.

    With an encoder it takes `photograph` (B, 3, *image_size), RGB in 0..1, alone: resizing it for the encoder, both
    normalisations and the encoder are in the graph.

    Args:
        upsampler: on any device; it is not changed.
        path: ends in .onnx.
        image_size: (height, width).
        feature_size: (height, width). With an encoder the features have the size that it gives them.
        output_size: as in the call.
        channels: of the features that the file is checked with; not with an encoder.
        encoder: on any device; it is not changed.
        encoder_size: (height, width) of the photograph that the encoder sees, rounded to its patches; None: the
            image's.

    Returns:
        The largest difference between the file's result, in onnxruntime on a CPU, and the package's, on random inputs,
        relative to the largest value.

    Raises:
        ValueError, TypeError: which argument, what was expected, what came; before any work.
        torch.onnx.OnnxExporterError: the exporter has no standard operators for what the encoder does.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the file's results are not the package's; nothing is written.
    """
    if not isinstance(upsampler, AnyUp):
        raise TypeError(f"upsampler: expected an AnyUp, got {type(upsampler).__name__}")
    if Path(path).suffix.lower() != ".onnx":
        raise ValueError(f"path: expected a file name that ends in .onnx, got {str(path)!r}")
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels: expected a positive integer, got {channels!r}")
    image = check_size("image_size", image_size)
    size = check_output_size(output_size, image)
    if encoder is None:
        if encoder_size is not None:
            raise ValueError("encoder_size: expected with an encoder alone")
        grid = check_size("feature_size", feature_size)
    else:
        seen = _check_encoder(encoder, upsampler, feature_size, encoder_size or image)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    model = copy.deepcopy(upsampler).cpu().float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with complete_or_absent(path) as partial, torch.no_grad():
        if encoder is None:
            normalised = torch.randn(2, model.config["input_dim"], *image, generator=generator)
            inputs = {"image": normalised, "features": torch.randn(2, channels, *grid, generator=generator)}
            expected = model(*inputs.values(), size)
            graph: nn.Module = _Graph(model, image, grid, size)
        else:
            encoder = copy.deepcopy(encoder).cpu().float().eval().requires_grad_(False)
            photograph = torch.rand(2, 3, *image, generator=generator)
            inputs = {"photograph": photograph}
            features = encoder(encoder.normalize(resize(photograph, seen)))
            expected = model(normalize_imagenet(photograph), features, size)
            graph = _GraphWithEncoder(
                encoder, seen, image, _Graph(model, image, (features.shape[2], features.shape[3]), size)
            )
        _write(graph, inputs, partial)
        difference = float((_run(partial, inputs) - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"{path}: the file's results differ from the package's by {difference:.1e}, relative")
    return difference


def _check_encoder(
    encoder: Any, upsampler: AnyUp, feature_size: object, encoder_size: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of what the encoder sees; raises a ValueError or TypeError unless it fits the upsampler."""
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: expected an Encoder of anyup.encoders, got {type(encoder).__name__}")
    if feature_size is not None:
        raise ValueError(f"feature_size: expected None beside an encoder, which gives the features, got {feature_size}")
    if upsampler.config["input_dim"] != 3:
        raise ValueError(f"upsampler: expected one of RGB images, got one of {upsampler.config['input_dim']} channels")
    nbytes = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    if nbytes >= 2**31:
        raise ValueError(f"encoder: expected less than 2 GB of weights, as one file holds, got {nbytes / 1e9:.1f} GB")
    return round_to_multiple(check_size("encoder_size", encoder_size), encoder.patch_size or 1)


@dataclass(frozen=True)
class _Axis:
    """An axis of the output, cut into pieces of one length, and the keys of each piece, of one number.

    Attributes:
        pixels: (n, length), the pixels of each piece; the last pixel repeats where a piece reaches beyond the end.
        first: the first key of each piece.
        keys: (n, K), the keys of each piece, which are consecutive.
        bias: (n, length, K), 0 where a pixel sees a key and -inf elsewhere.
    """

    pixels: Tensor
    first: list[int]
    keys: Tensor
    bias: Tensor

    @classmethod
    def of(cls, window: Window, count: int, keys: int) -> _Axis:
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
    """The forward in standard operators, for fixed sizes."""

    def __init__(self, model: AnyUp, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid, self.size = model, grid, size
        rows, self.columns = (_Axis.of(model.window, *counts) for counts in zip(size, grid, strict=True))
        self.keys_of_row = rows.keys.shape[1]
        self.rows = list(zip(rows.pixels, rows.first, rows.bias, strict=True))

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        model = self.model
        encoded = _encode(model.image_encoder, image, model.rope.freqs)
        query = _pooled(_encode(model.query_encoder, encoded), self.size)
        image_keys = _pooled(_encode(model.key_encoder, encoded), self.grid)
        unification, *blocks = model.key_features_encoder
        assert isinstance(unification, LearnedFeatureUnification)
        feature_keys = feature_unification.forward(F.normalize(features, dim=1), unification.basis)
        for block in blocks:
            feature_keys = block(feature_keys)
        key = _encode(model.aggregation, torch.cat((image_keys, feature_keys), dim=1))
        decode = model.cross_decode
        query = query_projection.forward(query.permute(0, 2, 3, 1), decode.query_parameters(query.dtype))
        query = decode.split_heads(query) * (model.qk_dim // decode.num_heads) ** -0.5
        out = self._attend(query, decode.project_keys(key.permute(0, 2, 3, 1)), features.permute(0, 2, 3, 1))
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


class _GraphWithEncoder(nn.Module):
    """A photograph in 0..1 to upsampled features; the encoder sees it resized to `seen` (height, width)."""

    def __init__(self, encoder: Encoder, seen: tuple[int, int], image: tuple[int, int], graph: _Graph) -> None:
        super().__init__()
        self.encoder, self.upsampling = encoder, graph  # the exporter reserves the name `graph`
        self.rows, self.columns = (
            None if length == count else resizing_of_axis(length, count)
            for length, count in zip(image, seen, strict=True)
        )

    def forward(self, photograph: Tensor) -> Tensor:
        seen = photograph
        if self.rows is not None:
            seen = self.rows @ seen
        if self.columns is not None:
            seen = seen @ self.columns.T
        features = self.encoder.features(self.encoder.normalize(seen.clamp(0, 1)))
        return self.upsampling(normalize_imagenet(photograph), features)


def _encode(encoder: PixelEncoder, x: Tensor, frequencies: Tensor | None = None) -> Tensor:
    """(B, in, H, W) to (B, D, H, W)."""
    convolution, *_ = encoder
    assert isinstance(convolution, BorderConv2d)
    pixels = F.conv2d(convolution.bordered(x).permute(0, 3, 1, 2), convolution.weight).permute(0, 2, 3, 1)
    parameters = encoder.parameters_for_op(x.dtype)._replace(projection=None)  # which is this convolution
    size = (pixels.shape[1], pixels.shape[2])
    return pixel_encoder.forward(pixels, parameters, frequencies=frequencies, output_size=size).permute(0, 3, 1, 2)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling as two products, because torch's operator exports for certain sizes only."""
    for axis, count in zip((2, 3), size, strict=True):
        length = x.shape[axis]
        if count != length:
            cells = Cells(0, count, count, length)
            mean = cells.indicator(x.dtype, x.device) / cells.sizes(x.dtype, x.device)[:, None]
            x = mean @ x if axis == 2 else x @ mean.T
    return x


def _write(graph: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    batch, channels = torch.export.Dim("batch"), torch.export.Dim("channels")
    sizes = {"image": {0: batch}, "photograph": {0: batch}, "features": {0: batch, 1: channels}}
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of the exporter's own making
        program: Any = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["upsampled"],
            dynamic_shapes=tuple(sizes[name] for name in inputs),
        )
        program.save(str(path), external_data=False)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Silence a logger's warnings: the exporter's name optional packages that it does not find and does not need."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _run(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(found)


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(f"an ONNX file needs {package}: {pip_install(package)}") from error
