"""Attention and PCA pictures: independently known colours, determinism, odd inputs, and no window."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.patience import PATIENCE
from torch import Tensor

from anyup import visualization
from anyup.visualization import (
    attention_picture,
    encode_srgb,
    key_colors,
    oklab_to_linear_srgb,
    pca_picture,
    show_attention,
)

# OKLab of the sRGB primaries and of white, as CSS Color 4's sample colours and colour pickers print them.
KNOWN_COLORS = {
    "white": ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0)),
    "red": ((1.0, 0.0, 0.0), (0.62796, 0.22486, 0.12585)),
    "green": ((0.0, 1.0, 0.0), (0.86644, -0.23389, 0.17950)),
    "blue": ((0.0, 0.0, 1.0), (0.45201, -0.03246, -0.31153)),
    "black": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", KNOWN_COLORS)
def test_oklab_gives_the_known_linear_colour(name: str) -> None:
    linear, lab = KNOWN_COLORS[name]
    got = oklab_to_linear_srgb(torch.tensor(lab, dtype=torch.float64)[:, None])[:, 0]
    torch.testing.assert_close(got, torch.tensor(linear, dtype=torch.float64), atol=2e-4, rtol=0)


def _inverse_oklab(linear: Tensor) -> Tensor:
    """OKLab of linear sRGB by the publication's forward matrices, which the package does not contain."""
    to_cones = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ],
        dtype=torch.float64,
    )
    to_lab = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ],
        dtype=torch.float64,
    )
    cones = to_cones @ linear.reshape(3, -1)
    return (to_lab @ (cones.sign() * cones.abs().pow(1 / 3))).reshape(linear.shape)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (7, 9), (16, 5)])
def test_key_colours_are_the_plane_of_constant_lightness(h: int, w: int) -> None:
    lab = _inverse_oklab(key_colors(h, w, dtype=torch.float64))
    expected = torch.empty(3, h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            expected[:, i, j] = torch.tensor([0.7, -0.35 + 0.7 * i / h, -0.35 + 0.7 * j / w])
    torch.testing.assert_close(lab, expected, atol=2e-6, rtol=0)


def test_key_colours_are_not_clamped_and_have_the_asked_dtype() -> None:
    colors = key_colors(8, 8, dtype=torch.float16)
    assert colors.dtype == torch.float16 and colors.shape == (3, 8, 8)
    assert colors.min() < 0 and colors.max() > 1


def test_srgb_encoding_clamps_and_meets_the_standard_at_known_levels() -> None:
    linear = torch.tensor([-1.0, 0.0, 0.0031308, 0.214041, 0.5, 1.0, 7.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.0404499, 0.5, 0.735357, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(encode_srgb(linear), expected, atol=1e-5, rtol=0)


def test_attention_picture_has_the_key_grid_on_the_left_and_the_output_on_the_right() -> None:
    keys = key_colors(4, 6)
    painted = keys.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)  # each pixel looks at its own key
    picture = attention_picture((4, 6), painted)
    height, width = painted.shape[1:]
    assert picture.shape[1] == height and picture.shape[2] > 2 * width
    torch.testing.assert_close(picture[:, :, :width], picture[:, :, -width:])
    assert bool((picture[:, :, width : picture.shape[2] - width] == 1).all())
    # Top left is a = b = -0.35, blue-green; a grows downwards (redder), b to the right (yellower, less blue).
    assert picture[0, -1, 0] > picture[0, 0, 0]
    assert picture[2, 0, width - 1] < picture[2, 0, 0]


def test_attention_pictures_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"painted: expected \(3, H, W\)"):
        attention_picture((2, 2), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="key_grid"):
        show_attention((2, 2, 2), torch.zeros(3, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        key_colors(0, 3)


def test_show_attention_needs_no_window_and_does_not_collect_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    painted = torch.rand(3, 12, 10)
    before = len(pyplot.get_fignums())
    for _ in range(3):
        figure = show_attention((3, 5), painted)
    assert len(pyplot.get_fignums()) == before + 1
    assert figure is pyplot.gcf()
    keys, output = (axis.get_images()[0].get_array() for axis in figure.axes)
    assert keys is not None and keys.shape == (3, 5, 3)
    assert output is not None and output.shape == (12, 10, 3)
    pyplot.close(figure)


def test_show_attention_falls_back_where_the_window_toolkit_has_no_display() -> None:
    pytest.importorskip("matplotlib")
    if sys.platform != "linux":
        pytest.skip("a missing display is Linux's case")
    program = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from anyup.visualization import show_attention\n"
        "print(type(show_attention((2, 3), torch.rand(3, 4, 6)).canvas).__name__)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["MPLBACKEND"] = "tkagg"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FigureCanvasAgg"


def _features(channels: int, h: int, w: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.5, min(channels, 5))
    mix = torch.randn(channels, len(scales), generator=generator)
    return (mix * scales @ torch.randn(len(scales), h * w, generator=generator)).reshape(channels, h, w)


@pytest.mark.parametrize("channels", [3, 16, 100])  # fewer and more channels than the 48 positions
def test_pca_pictures_do_not_depend_on_the_order_of_channels(channels: int) -> None:
    low, high = _features(channels, 6, 8), _features(channels, 12, 10)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(pca_picture(low, high), pca_picture(low[order], high[order]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_pca_pictures_are_the_same_every_time_and_lie_in_0_to_1() -> None:
    low, high = _features(32, 6, 8), _features(32, 12, 16)
    once, again = pca_picture(low, high), pca_picture(low, high)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    assert [tuple(p.shape) for p in once] == [(3, 6, 8), (3, 12, 16)]


def test_pca_basis_is_that_of_a_singular_value_decomposition() -> None:
    low = _features(16, 6, 8).double()
    points = low.flatten(1)
    centred = points - points.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(centred, full_matrices=False)[0][:, :3].T
    coordinates = directions @ centred
    picture = pca_picture(low)[0].flatten(1).double()
    for channel in range(3):
        inside = (picture[channel] > 0) & (picture[channel] < 1)
        both = torch.stack([picture[channel][inside], coordinates[channel][inside]])
        assert abs(float(torch.corrcoef(both)[0, 1])) > 1 - 1e-6


def test_pca_gives_one_feature_one_colour_in_every_map() -> None:
    low = _features(24, 5, 7)
    enlarged = low.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    small, large = pca_picture(low, enlarged)
    torch.testing.assert_close(large[:, 1::3, 1::3], small)
    # ... and so takes basis and range from the named map alone.
    other = _features(24, 5, 7, seed=3) * 50
    assert torch.equal(pca_picture(low, other)[0], pca_picture(low)[0])
    torch.testing.assert_close(pca_picture(other, low, basis_from=1)[1], pca_picture(low)[0])


def test_an_outlier_does_not_turn_the_rest_of_the_map_into_one_colour() -> None:
    low = _features(8, 20, 20)
    low[:, 3, 4] += 40 * torch.nn.functional.normalize(torch.ones(8), dim=0)
    picture = pca_picture(low)[0]
    assert float(picture.flatten(1).std(dim=1).min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pca_takes_every_floating_dtype(dtype: torch.dtype) -> None:
    low = _features(16, 6, 8)
    expected = pca_picture(low)[0]
    got = pca_picture(low.to(dtype))[0]
    assert got.dtype == torch.float32
    assert float((got - expected).abs().mean()) < 0.02


@pytest.mark.parametrize("channels", [1, 2])
def test_pca_of_fewer_than_three_channels_is_still_a_picture(channels: int) -> None:
    picture = pca_picture(torch.linspace(-1, 2, 48 * channels).reshape(channels, 6, 8).sin())[0]
    assert picture.shape == (3, 6, 8)
    assert picture[0].min() < 0.1 and picture[0].max() > 0.9
    if channels == 1:
        assert torch.equal(picture[0], picture[1]) and torch.equal(picture[1], picture[2])
    else:
        assert bool((picture[2] == 0.5).all())


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -0.3])
def test_pca_of_a_constant_map_is_grey(value: float) -> None:
    for picture in pca_picture(torch.full((12, 4, 5), value), torch.full((12, 8, 10), value + 1)):
        assert bool((picture == 0.5).all())


def test_pca_shows_a_map_with_only_a_few_positions_that_differ() -> None:
    low = torch.zeros(4, 20, 20)
    low[:, 7, 7] = 1.0
    picture = pca_picture(low)[0]
    assert float((picture[0, 7, 7] - picture[0, 0, 0]).abs()) == 1.0


def test_pca_takes_the_first_of_a_batch() -> None:
    batch = torch.stack([_features(8, 4, 5), _features(8, 4, 5, seed=2)])
    assert torch.equal(pca_picture(batch)[0], pca_picture(batch[0])[0])


def test_pca_works_in_pieces_as_it_does_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    low = _features(16, 9, 11)
    whole = pca_picture(low)[0]
    monkeypatch.setattr(visualization, "_PCA_POSITIONS_AT_ONCE", 17)
    torch.testing.assert_close(pca_picture(low)[0], whole, atol=1e-5, rtol=0)


def test_pca_refuses_what_is_no_feature_map() -> None:
    good = torch.rand(4, 3, 3)
    with pytest.raises(ValueError, match="at least one"):
        pca_picture()
    with pytest.raises(ValueError, match=r"maps: expected \(C, h, w\) .* map 1 is"):
        pca_picture(good, torch.rand(3, 3))
    with pytest.raises(ValueError, match="expected 4 channels as in map 0, map 1 has 5"):
        pca_picture(good, torch.rand(5, 3, 3))
    with pytest.raises(TypeError, match="floating"):
        pca_picture(torch.ones(4, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="basis_from"):
        pca_picture(good, basis_from=1)
    for position in (0, 1):
        maps = [good.clone(), good.clone()]
        maps[position][2, 1, 1] = float("nan")
        with pytest.raises(ValueError, match=f"map {position} holds a NaN"):
            pca_picture(*maps)
