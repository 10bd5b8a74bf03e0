"""Pictures of attention and of feature maps, as tensors; only `show_attention` imports matplotlib.

The attention picture paints every key with a colour of its own and every output pixel with the
attention-weighted mean of those colours: where the two panels agree, pixels look at the keys around them.
The colours come from a plane of the OKLab colour space, in which equal steps look equally large. The PCA
picture projects feature maps on the first three principal components of one of them, so that the same
feature has the same colour in every map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.installing import pip_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "attention_picture",
    "encode_srgb",
    "key_colors",
    "oklab_to_linear_srgb",
    "pca_picture",
    "show_attention",
]

# Björn Ottosson, "A perceptual color space for image processing", bottosson.github.io/posts/oklab (2020), the
# constants as revised there in 2021: OKLab to the cube roots of cone responses, their cubes to linear sRGB.
_LAB_TO_CUBE_ROOTS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_CONES_TO_LINEAR_SRGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)

_PLANE_LIGHTNESS = 0.7
_PLANE_HALF_WIDTH = 0.35  # of OKLab's a and b; the corners lie outside the sRGB gamut

_PCA_PERCENTILES = (
    0.01,
    0.99,
)  # what becomes 0 and 1: a single outlier must not make the rest of the map grey
_PCA_SMALLEST_SHARE = 1e-10  # relative to the largest variance: a component with less is rounding noise
_PCA_POSITIONS_AT_ONCE = 1 << 16


def oklab_to_linear_srgb(lab: Tensor) -> Tensor:
    """Linear sRGB (3, ...) of OKLab colours (3, ...); unclamped, so out-of-gamut colours leave 0..1."""
    roots = torch.tensor(_LAB_TO_CUBE_ROOTS, dtype=lab.dtype, device=lab.device) @ lab.reshape(3, -1)
    cones = roots * roots * roots
    linear = torch.tensor(_CONES_TO_LINEAR_SRGB, dtype=lab.dtype, device=lab.device) @ cones
    return linear.reshape(lab.shape)


def key_colors(
    h: int, w: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One colour for each key of an (h, w) grid: (3, h, w), linear sRGB, unclamped.

    OKLab at L = 0.7 with a = -0.35 + 0.7 i / h down the rows and b = -0.35 + 0.7 j / w along the columns.
    """
    if h < 1 or w < 1:
        raise ValueError(f"h, w: expected at least 1 each, got {h} and {w}")
    # Computed in float64 on the CPU, because MPS has no float64; the grid is small.
    rows = torch.arange(h, dtype=torch.float64, device="cpu") / h
    columns = torch.arange(w, dtype=torch.float64, device="cpu") / w
    a = (2 * _PLANE_HALF_WIDTH * rows - _PLANE_HALF_WIDTH)[:, None].expand(h, w)
    b = (2 * _PLANE_HALF_WIDTH * columns - _PLANE_HALF_WIDTH)[None, :].expand(h, w)
    lab = torch.stack([torch.full_like(a, _PLANE_LIGHTNESS), a, b])
    return oklab_to_linear_srgb(lab).to(device=device, dtype=dtype)


def encode_srgb(linear: Tensor) -> Tensor:
    """Linear sRGB of any range, clamped to 0..1 and gamma-encoded (IEC 61966-2-1), float32 or float64."""
    if linear.dtype != torch.float64:
        linear = linear.float()
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308).pow(1 / 2.4) - 0.055)


def _check_attention(key_grid: tuple[int, int], painted: Tensor) -> None:
    if len(key_grid) != 2:
        raise ValueError(f"key_grid: expected (h, w), got {tuple(key_grid)}")
    if painted.dim() != 3 or painted.shape[0] != 3:
        raise ValueError(f"painted: expected (3, H, W) in linear sRGB, got {tuple(painted.shape)}")


def _attention_panels(key_grid: tuple[int, int], painted: Tensor) -> tuple[Tensor, Tensor]:
    keys = key_colors(*key_grid)
    return encode_srgb(keys), encode_srgb(painted.detach().to("cpu", torch.float32))


def attention_picture(key_grid: tuple[int, int], painted: Tensor) -> Tensor:
    """The key grid in its colours and, to its right, the output in the colours of what it attends to.

    `key_grid` is (h, w). `painted` is (3, H, W): for each output pixel the attention-weighted mean of
    `key_colors(h, w)`, in linear sRGB before any clamping. Returns (3, H, 2 W + gap), gamma-encoded sRGB in
    0..1, float32 on the CPU; the gap is white.
    """
    _check_attention(key_grid, painted)
    keys, output = _attention_panels(key_grid, painted)
    height, width = output.shape[1:]
    keys = F.interpolate(keys[None], size=(height, width), mode="nearest-exact")[0]
    gap = torch.ones(3, height, max(2, width // 50))
    return torch.cat([keys, gap, output], dim=2)


def show_attention(key_grid: tuple[int, int], painted: Tensor) -> Figure:
    """Draw the two panels with matplotlib, show them where a window or a notebook can, return the figure.

    Arguments as for `attention_picture`. Without a display nothing is shown and nothing is warned about:
    the figure is pyplot's current one (`matplotlib.pyplot.savefig("attention.png")` writes it) and is
    reused by the next call. A script with a display waits until the window is closed. Raises ImportError
    where matplotlib is missing.
    """
    _check_attention(key_grid, painted)
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(f"showing the attention needs matplotlib: {pip_install('matplotlib')}") from error
    figure: Figure
    try:
        from matplotlib import pyplot

        figure = pyplot.figure(num="AnyUp attention", figsize=(10, 5), layout="constrained", clear=True)
        can_show = pyplot.get_backend().lower() not in _FILE_ONLY_BACKENDS
    except ImportError:  # the user chose a window toolkit, and there is no display
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = matplotlib.figure.Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasAgg(figure)
        can_show = False

    keys, output = _attention_panels(key_grid, painted)
    axes = figure.subplots(1, 2)
    titles = (
        f"keys, {keys.shape[1]} x {keys.shape[2]}",
        f"where each pixel looks, {output.shape[1]} x {output.shape[2]}",
    )
    for axis, panel, title in zip(axes, (keys, output), titles, strict=True):
        axis.imshow(panel.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.set_axis_off()
    if can_show:
        pyplot.show()
    return figure


_FILE_ONLY_BACKENDS = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})


def _first_map(feature_map: Tensor, index: int) -> Tensor:
    """A map (C, h, w) from (C, h, w) or (B, C, h, w); of a batch the first."""
    if not isinstance(feature_map, Tensor):
        raise TypeError(f"maps: expected tensors, map {index} is a {type(feature_map).__name__}")
    if feature_map.dim() not in (3, 4) or 0 in feature_map.shape:
        raise ValueError(
            f"maps: expected (C, h, w) or (B, C, h, w), not empty, map {index} is {tuple(feature_map.shape)}"
        )
    if not feature_map.is_floating_point():
        raise TypeError(f"maps: expected floating point, map {index} is {feature_map.dtype}")
    return (feature_map[0] if feature_map.dim() == 4 else feature_map).detach()


def principal_directions(points: Tensor, most: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (C,) and up to `most` directions (k, C) of largest variance of points (C, N); float64, on the CPU.

    Directions without variance are left out, so k can be 0. Each direction points to where its largest
    entry is positive: the order and the signs of the eigenvectors do not depend on the machine or on the
    order of channels.
    """
    channels, count = points.shape
    pieces = points.split(_PCA_POSITIONS_AT_ONCE, dim=1)
    mean = torch.zeros(channels, dtype=torch.float64)
    for piece in pieces:
        mean += piece.to("cpu", torch.float64).sum(dim=1)
    mean /= count

    if channels <= count:
        covariance = torch.zeros(channels, channels, dtype=torch.float64)
        for piece in pieces:
            centred = piece.to("cpu", torch.float64) - mean[:, None]
            covariance += centred @ centred.T
        variances, vectors = torch.linalg.eigh(covariance)
        directions = vectors.T
    else:  # fewer points than channels: the same directions, from the products between points
        centred = points.to("cpu", torch.float64) - mean[:, None]
        variances, vectors = torch.linalg.eigh(centred.T @ centred)
        directions = (centred @ vectors).T

    variances, directions = variances.flip(0)[:most], directions.flip(0)[:most]
    rounding = torch.finfo(torch.float64).eps * count * mean.abs().max() ** 2
    directions = directions[(variances > _PCA_SMALLEST_SHARE * variances[0]) & (variances > rounding)]
    directions = F.normalize(directions, dim=1)
    if len(directions):
        largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
        directions = directions * largest.sign()
    return mean, directions


def _project(points: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Coordinates (k, N), float32, of points (C, N) along directions (k, C) from the mean."""
    to_coordinates = directions.to(points.device, torch.float32)
    origin = (directions @ mean).to(points.device, torch.float32)[:, None]
    pieces = points.split(_PCA_POSITIONS_AT_ONCE, dim=1)
    return torch.cat([to_coordinates @ piece.float() - origin for piece in pieces], dim=1)


def pca_picture(*maps: Tensor, basis_from: int = 0) -> list[Tensor]:
    """Feature maps as colours: one picture (3, h, w) in 0..1 for each map, float32, on the map's device.

    `maps` are (C, h, w) or (B, C, h, w) (the first of the batch), of one C and any sizes and floating
    dtypes. The three principal components, and the range of each that becomes 0..1 (its 1st to 99th
    percentile), are taken from `maps[basis_from]` alone: the same feature has the same colour in every
    picture. The result does not depend on the order of the channels. One component (C = 1, say) gives a
    grey picture, two leave blue at 0.5, and a constant `maps[basis_from]` gives 0.5 everywhere. Raises
    ValueError or TypeError for other shapes and dtypes and for a map that holds a NaN or an infinity.
    """
    if not maps:
        raise ValueError("maps: expected at least one, got none")
    if not -len(maps) <= basis_from < len(maps):
        raise ValueError(f"basis_from: expected the number of one of {len(maps)} maps, got {basis_from}")
    first = [_first_map(feature_map, index) for index, feature_map in enumerate(maps)]
    basis = first[basis_from]
    for index, feature_map in enumerate(first):
        if feature_map.shape[0] != basis.shape[0]:
            raise ValueError(
                f"maps: expected {basis.shape[0]} channels as in map {basis_from % len(maps)}, map {index} has "
                f"{feature_map.shape[0]}"
            )
    if not bool(torch.isfinite(basis).all()):
        raise ValueError(f"maps: map {basis_from % len(maps)} holds a NaN or an infinity")

    mean, directions = principal_directions(basis.flatten(1))
    if not len(directions):
        return [torch.full((3, *m.shape[1:]), 0.5, device=m.device) for m in first]

    ordered = _project(basis.flatten(1), mean, directions).sort(dim=1).values
    last = ordered.shape[1] - 1
    low = ordered[:, int(_PCA_PERCENTILES[0] * last)].cpu()
    high = ordered[:, last - int((1 - _PCA_PERCENTILES[1]) * last)].cpu()
    # More than 98 % of the map on one value: the percentiles meet, the extremes do not.
    flat = high <= low
    low, high = torch.where(flat, ordered[:, 0].cpu(), low), torch.where(flat, ordered[:, -1].cpu(), high)
    span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)

    pictures = []
    for index, feature_map in enumerate(first):
        coordinates = _project(feature_map.flatten(1), mean, directions)
        if not bool(torch.isfinite(coordinates).all()):
            raise ValueError(f"maps: map {index} holds a NaN or an infinity")
        scaled = (coordinates - low.to(coordinates.device)[:, None]) / span.to(coordinates.device)[:, None]
        scaled = scaled.clamp(0, 1).reshape(-1, *feature_map.shape[1:])
        if len(scaled) == 1:
            scaled = scaled.expand(3, *feature_map.shape[1:]).contiguous()
        elif len(scaled) == 2:
            scaled = torch.cat([scaled, torch.full_like(scaled[:1], 0.5)])
        pictures.append(scaled)
    return pictures
