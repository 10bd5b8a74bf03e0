"""The joint bilateral filter that a training may start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")

from support.small_training import settings

import anyup
from anyup.model import AnyUp
from anyup.training.config import ConfigError
from anyup.training.initial import start_as_bilateral
from anyup.training.trainer import make_upsampler


def upsampler() -> AnyUp:
    torch.manual_seed(0)
    model = AnyUp(qk_dim=128, num_heads=4, lfu_dim=8, kernel_size_lfu=3)
    start_as_bilateral(model)
    return model.eval()


def weights(image: torch.Tensor, cells: int, side: int, features: torch.Tensor | None = None) -> torch.Tensor:
    """(side, side, cells, cells): of each pixel, the weights of the cells."""
    features = torch.ones(1, 2, cells, cells) if features is None else features
    one_hot = torch.eye(cells * cells).view(1, -1, cells, cells)
    with torch.no_grad():
        carried = upsampler()(image, features, (side, side), values=one_hot)
    return carried[0].permute(1, 2, 0).unflatten(2, (cells, cells))


@pytest.mark.parametrize(("cells", "spread"), [(8, 0.5), (16, 0.6), (32, 0.8), (48, 1.1)])
def test_without_colours_weights_lie_about_the_pixel_on_coarse_grids_and_on_fine_ones(
    cells: int, spread: float
) -> None:
    side = 2 * cells
    rows = weights(torch.zeros(1, 3, side, side), cells, side).sum(3)
    # Along the rows, in cells, away from the border, where a window is cut.
    away = torch.arange(cells) + 0.5 - (torch.arange(side)[:, None] + 0.5) / 2
    inside = slice(side // 4, -side // 4)
    mean = (rows * away[:, None]).sum(2)[inside, inside]
    square = (rows * away[:, None] ** 2).sum(2)[inside, inside]
    assert mean.abs().mean() < 0.2
    assert square.mean().sqrt() < spread


@pytest.mark.parametrize("cells", [8, 16, 32])
def test_weights_stay_on_the_pixels_side_of_an_edge(cells: int) -> None:
    side, edge = 2 * cells, cells
    image = torch.full((1, 3, side, side), -1.0)
    image[..., edge:] = 1.0
    other = weights(image, cells, side)[:, edge - 1, :, cells // 2 :].sum((1, 2))
    bilinear = F.interpolate(torch.eye(cells)[None], side, mode="linear")[0, cells // 2 :, edge - 1].sum()
    assert bilinear == pytest.approx(0.25)
    assert other.max() < 0.1


def test_features_weigh_nothing_before_the_training() -> None:
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    first, second = (torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    torch.testing.assert_close(weights(image, 8, 16, first), weights(image, 8, 16, second))


def test_training_takes_up_all_that_begins_at_zero() -> None:
    model = upsampler().train()
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    target = torch.randn(1, 5, 16, 16, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (model(image, features) - target).square().mean().backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {f"cross_decode.cross_attn.attention.out_proj.{name}" for name in ("weight", "bias")}


def test_a_head_too_narrow_for_place_and_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 12 channels for each of 8 heads, and model.qk_dim is 64"):
        start_as_bilateral(AnyUp(qk_dim=64, num_heads=8))


def test_a_run_starts_as_its_settings_say(tmp_path: Path) -> None:
    wide = ("model.qk_dim=32", "model.num_heads=2")
    started = make_upsampler(settings(tmp_path, "model.initial=bilateral", *wide)).state_dict()
    again = make_upsampler(settings(tmp_path, "model.initial=bilateral", *wide)).state_dict()
    random = make_upsampler(settings(tmp_path, *wide)).state_dict()
    assert all(torch.equal(started[name], again[name]) for name in started)
    assert not torch.equal(started["rope.freqs"], random["rope.freqs"])


def test_weights_that_are_named_come_before_any_other_start(tmp_path: Path) -> None:
    """As where `--config mini`, which starts as a filter, goes on from weights of one's own."""
    wide = ("model.qk_dim=32", "model.num_heads=2")
    stored = AnyUp(qk_dim=32, num_heads=2, lfu_dim=8, kernel_size_lfu=3)
    anyup.save(stored, tmp_path / "own.pth")
    weights = f"model.weights={(tmp_path / 'own.pth').as_posix()}"
    started = make_upsampler(settings(tmp_path, "model.initial=bilateral", weights, *wide)).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in stored.state_dict().items())


def test_a_start_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.initial: expected one of random, bilateral, got 'bilinear'"):
        settings(tmp_path, "model.initial=bilinear")
