"""The pixel encoder in plain PyTorch, tile by tile.

Between two group normalisations everything is pixelwise. So the map passes through the encoder in five steps, each
of which reads a tile of pixels, normalises, activates and multiplies it while it is in the cache, stores the result
over what is not needed any more, and takes the statistics that the next step's normalisation waits for. Two maps of
D channels are alive. Where the first projection has few inputs its map is never stored: its statistics follow from
the mean and covariance of its input, and recomputing it is cheaper than reading it.
Where the result is pooled, the last convolution and the residual commute with the pooling and run on the small grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.memory import empty
from anyup.ops.pixel_encoder.problem import EPS, GROUPS, BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.statistics import Affine, Statistics

# Pixels of a tile: on a CPU a tile's working set of some 10 MB stays in a shared cache and still amortises handing
# work to the threads; elsewhere a tile bounds the scratch memory.
_TILE_PIXELS = {"cpu": 8192}
_TILE_PIXELS_ELSEWHERE = 2**18

# Up to this many input channels the first projection is recomputed, not stored.
_FEW_INPUTS = 16


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(
    pixels: Tensor, parameters: EncoderParameters, *, frequencies: Tensor | None, output_size: tuple[int, int]
) -> Tensor:
    """(B, H, W, Cin) -> (B, *output_size, D)."""
    batch, height, width, _ = pixels.shape
    dim = parameters.block1.weight1.shape[0]
    pools = output_size != (height, width)
    shrinks = pools and output_size[0] <= height and output_size[1] <= width and frequencies is None
    out = empty((batch, *(output_size if shrinks else (height, width)), dim), pixels)
    for image, result in zip(pixels, out, strict=True):
        band = Band(image.flatten(0, 1), parameters, trunk=None if shrinks else result.flatten(0, 1))
        norms: list[Affine] = []
        for norm_weight, norm_bias in _norm_parameters(parameters):
            statistics = band.advance(norms[-1] if norms else None)
            norms.append(Affine.of(statistics, norm_weight, norm_bias, band.work_dtype))
        if shrinks:
            band.finish_pooled(norms[-1], (height, width), result)
        else:
            band.finish(norms[-1])
            if frequencies is not None:
                _rotate(result, frequencies)
    if pools and not shrinks:
        return F.adaptive_avg_pool2d(out.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1).contiguous()
    return out


class Band:
    """A run of an image's pixels on its way through the encoder.

    `advance` is called once for each of the four normalisations, in order: it takes the affine map that the
    previous normalisation has become (None at first) and returns the statistics of the next one's input over the
    band. With several bands, merge their statistics before going on. `finish` applies the last one.
    """

    def __init__(self, pixels: Tensor, parameters: EncoderParameters, trunk: Tensor | None = None) -> None:
        """(n, Cin) pixels; `trunk` is where the result goes, (n, D), a new tensor if None."""
        self._pixels = pixels
        self._parameters = parameters
        self.work_dtype = torch.float64 if pixels.dtype == torch.float64 else torch.float32
        dim = parameters.block1.weight1.shape[0]
        self._trunk = empty((pixels.shape[0], dim), pixels) if trunk is None else trunk
        self._branch: Tensor | None = None
        self._norms_done = 0
        self._recomputes = parameters.projection is not None and parameters.projection.shape[1] <= _FEW_INPUTS

    def advance(self, norm: Affine | None) -> Statistics:
        """Apply a normalisation and what follows it, up to the next; the statistics of the next one's input."""
        step = self._norms_done
        self._norms_done += 1
        if step == 0:
            return self._project()
        assert norm is not None
        if self._branch is None:
            self._branch = empty(tuple(self._trunk.shape), self._trunk)
        block = self._parameters.block1 if step < 3 else self._parameters.block2
        weight = block.weight2 if step == 2 else block.weight1
        weight = weight.to(self.work_dtype)
        parts = []
        for tile in self._tiles():
            source = self._branch[tile] if step == 2 else self._trunk_tile(tile, step)
            result = project(_activate(source.to(self.work_dtype), norm), weight)
            if step == 2:
                result += self._trunk_tile(tile, step)
            (self._trunk if step == 2 else self._branch)[tile] = result
            parts.append(Statistics.of(result))
        return Statistics.merge(parts)

    def finish(self, norm: Affine) -> Tensor:
        """Apply the last normalisation and what follows it: the encoded pixels (n, D), in the trunk."""
        assert self._branch is not None
        weight = self._parameters.block2.weight2.to(self.work_dtype)
        for tile in self._tiles():
            result = project(_activate(self._branch[tile].to(self.work_dtype), norm), weight)
            self._trunk[tile] = result.add_(self._trunk[tile])
        return self._trunk

    def finish_pooled(self, norm: Affine, size: tuple[int, int], out: Tensor) -> None:
        """The same for a band of whole rows, pooled to `out` (h, w, D): no larger than `size`, which it covers."""
        assert self._branch is not None
        (height, width), (h, w, _) = size, out.shape
        branch, trunk = (t.view(height, width, -1) for t in (self._branch, self._trunk))
        activated, passed = (torch.empty(h, w, out.shape[2], dtype=self.work_dtype, device=out.device) for _ in range(2))
        for row in range(h):
            rows = slice(row * height // h, -((row + 1) * height // -h))
            activated[row] = _pool_rows(_activate(branch[rows].to(self.work_dtype), norm), w)
            passed[row] = _pool_rows(trunk[rows].to(self.work_dtype), w)
        weight = self._parameters.block2.weight2.to(self.work_dtype)
        out.copy_(project(activated.flatten(0, 1), weight).view_as(passed).add_(passed))

    def _project(self) -> Statistics:
        projection = self._parameters.projection
        parts = []
        if self._recomputes:
            assert projection is not None
            for tile in self._tiles():
                parts.append(Statistics.of_projection(self._pixels[tile], projection))
            return Statistics.merge(parts)
        for tile in self._tiles():
            result = self._pixels[tile].to(self.work_dtype)
            if projection is not None:
                result = project(result, projection.to(self.work_dtype))
            self._trunk[tile] = result
            parts.append(Statistics.of(result))
        return Statistics.merge(parts)

    def _trunk_tile(self, tile: slice, step: int) -> Tensor:
        if self._recomputes and step < 3:
            projection = self._parameters.projection
            assert projection is not None
            return project(self._pixels[tile].to(self.work_dtype), projection.to(self.work_dtype))
        return self._trunk[tile]

    def _tiles(self) -> Iterator[slice]:
        length = _TILE_PIXELS.get(self._pixels.device.type, _TILE_PIXELS_ELSEWHERE)
        for first in range(0, self._pixels.shape[0], length):
            yield slice(first, min(first + length, self._pixels.shape[0]))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for (n, Cin) and (Cout, Cin)."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # As a 1x1 convolution it runs in oneDNN, which on some CPUs is twice as fast as the BLAS behind `F.linear`.
        image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
        return F.conv2d(image, weight[:, :, None, None]).permute(0, 2, 3, 1).view(-1, weight.shape[0])
    return F.linear(x, weight)


def backward(
    grad: Tensor,
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    """The gradients of the pixels, the parameters and the frequencies.

    Nothing was kept from the forward pass: the map before each normalisation is computed again (four maps of D
    channels), and autograd sees one normalisation, activation and convolution at a time.
    """
    projection, block1, block2 = parameters
    x = pixels.permute(0, 3, 1, 2)
    first = x if projection is None else F.conv2d(x, projection[:, :, None, None])
    hidden1 = _half_block(first, block1[:3])
    second = first + _half_block(hidden1, block1[3:])
    hidden2 = _half_block(second, block2[:3])

    def end(encoded: Tensor, frequencies: Tensor | None = None) -> Tensor:
        if frequencies is not None:
            encoded = _rotated(encoded.permute(0, 2, 3, 1), frequencies).permute(0, 3, 1, 2)
        if tuple(encoded.shape[2:]) != output_size:
            encoded = F.adaptive_avg_pool2d(encoded, output_size)
        return encoded

    encoded = second + _half_block(hidden2, block2[3:])
    tensors = (encoded,) if frequencies is None else (encoded, frequencies)
    grad_encoded, *grad_frequencies = torch.func.vjp(end, *tensors)[1](grad.permute(0, 3, 1, 2))
    del encoded
    grad_hidden, grad_norm4 = torch.func.vjp(_half_block, hidden2, block2[3:])[1](grad_encoded)
    grad_second, grad_norm3 = torch.func.vjp(_half_block, second, block2[:3])[1](grad_hidden)
    grad_second = grad_second + grad_encoded
    grad_hidden, grad_norm2 = torch.func.vjp(_half_block, hidden1, block1[3:])[1](grad_second)
    grad_first, grad_norm1 = torch.func.vjp(_half_block, first, block1[:3])[1](grad_hidden)
    grad_first = grad_first + grad_second
    grad_projection = None
    if projection is not None:
        grad_projection = torch.einsum("bohw,bihw->oi", grad_first, x)
        grad_first = F.conv2d(grad_first, projection.T[:, :, None, None])
    grads = EncoderParameters(
        grad_projection, BlockParameters(*grad_norm1, *grad_norm2), BlockParameters(*grad_norm3, *grad_norm4)
    )
    return grad_first.permute(0, 2, 3, 1), grads, grad_frequencies[0] if grad_frequencies else None


def _half_block(x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    norm_weight, norm_bias, weight = parameters
    return F.conv2d(F.silu(F.group_norm(x, GROUPS, norm_weight, norm_bias, EPS)), weight[:, :, None, None])


def _norm_parameters(parameters: EncoderParameters) -> Iterator[tuple[Tensor, Tensor]]:
    for block in (parameters.block1, parameters.block2):
        yield block.norm1_weight, block.norm1_bias
        yield block.norm2_weight, block.norm2_bias


def _activate(x: Tensor, norm: Affine) -> Tensor:
    return F.silu(torch.addcmul(norm.shift, x, norm.scale), inplace=True)


def _pool_rows(rows: Tensor, w: int) -> Tensor:
    """(r, W, D) -> (w, D): the mean over all rows and over each of w adaptive cells of columns."""
    pooled = F.adaptive_avg_pool2d(rows.permute(2, 0, 1)[None], (1, w))
    return pooled[0, :, 0].T


def _rotate(encoded: Tensor, frequencies: Tensor) -> None:
    """Apply the rotary embedding to (H, W, D) in place, some rows at a time."""
    height, width, _ = encoded.shape
    length = max(1, _TILE_PIXELS.get(encoded.device.type, _TILE_PIXELS_ELSEWHERE) // width)
    for first in range(0, height, length):
        rows = encoded[first : first + length]
        rows.copy_(_rotated(rows, frequencies, first, height))


def _rotated(x: Tensor, frequencies: Tensor, first: int = 0, height: int | None = None) -> Tensor:
    """The rotary embedding of (..., rows, W, D), which are rows `first` and on of a map of `height` rows.

    x cos(angle) + rotate_half(x) sin(angle); channel j's angle is row * frequencies[0, j] + column *
    frequencies[1, j], row and column in [0, 1].
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = (torch.arange(n, device=x.device, dtype=wide) for n in x.shape[-3:-1])
    rows = (rows + first) / max((height or x.shape[-3]) - 1, 1)
    columns = columns / max(x.shape[-2] - 1, 1)
    row_frequency, column_frequency = frequencies.to(wide)
    angle = (rows[:, None] * row_frequency)[:, None] + columns[:, None] * column_frequency  # (rows, W, D)
    half = x.shape[-1] // 2
    cos, sin = angle.cos(), angle.sin()
    x = x.to(wide)
    x1, x2 = x[..., :half], x[..., half:]
    rotated = (x1 * cos[..., :half] - x2 * sin[..., :half], x2 * cos[..., half:] + x1 * sin[..., half:])
    return torch.cat(rotated, dim=-1)
