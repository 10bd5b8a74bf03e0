"""Features that are made of the photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")

from support.small_training import TinyEncoder, make_photographs, settings

from anyup.training import samples
from anyup.training.feature_cache import FeatureCache, Recipe
from anyup.training.synthetic import CHANNELS, draw_cells, draw_width, synthetic_features


def guidance(side: int = 32) -> torch.Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_key_alone_draws_the_encoder() -> None:
    first = synthetic_features(guidance(), 7, 1, 2)
    assert first.shape == (7, 32, 32)
    assert torch.equal(first, synthetic_features(guidance(), 7, 1, 2))
    assert not torch.allclose(first, synthetic_features(guidance(), 7, 1, 3))


def test_features_change_where_the_colours_do() -> None:
    halves = torch.full((3, 32, 32), -1.0)
    halves[:, :, 16:] = 1.0
    shares = []
    for key in range(20):
        made = synthetic_features(halves, 8, key)
        steps = (made[:, :, 1:] - made[:, :, :-1]).square().sum((0, 1))
        shares.append(steps / steps.sum())
    mean = torch.stack(shares).mean(0)
    assert mean.argmax() == 15
    assert mean[12:19].sum() > 0.5


def test_grids_are_of_every_size_up_to_half_the_guidance() -> None:
    drawn = [draw_cells(64, number) for number in range(400)]
    assert min(drawn) == 8 and max(drawn) == 32
    assert 140 < sum(cells < 16 for cells in drawn) < 260
    assert {draw_cells(8, number) for number in range(20)} == {4}
    widths = {draw_width(number) for number in range(400)}
    assert CHANNELS[0] <= min(widths) < max(widths) <= CHANNELS[1]


@pytest.fixture
def source(tmp_path: Path) -> FeatureCache:
    folder = make_photographs(tmp_path / "photographs", 3)
    stored = FeatureCache(tmp_path / "cache", folder, Recipe.of(settings(tmp_path).data, 32, 0))
    stored.fill("tiny:8", TinyEncoder(8), sorted(folder.iterdir()))
    return stored


def test_a_synthetic_step_gives_the_mean_over_cells_and_wants_the_map(tmp_path: Path, source: FeatureCache) -> None:
    paths = sorted((tmp_path / "photographs").iterdir())
    asked = settings(tmp_path, "variation.synthetic=1.0", "loss.place=1.0")
    step = samples.plan(asked, source, 3, 3, 12)
    batch = samples.assemble(step, step.samples, source, paths, 0)
    side = step.guidance_size
    assert batch.side == side and batch.known.shape[2:] == (side, side)
    assert batch.places.tolist() == [[[0, 0]]] * 4
    assert batch.low.shape[2:] == (step.input_size, step.input_size)
    assert torch.equal(batch.low, F.adaptive_avg_pool2d(batch.targets[:, 0], step.input_size))
    for index, sample in enumerate(step.samples):
        made = synthetic_features(batch.guidance[index], batch.low.shape[1], 0, sample.number)
        assert torch.equal(batch.targets[index, 0], made)


def test_the_share_of_synthetic_steps_is_what_was_asked_for(tmp_path: Path, source: FeatureCache) -> None:
    asked = settings(tmp_path, "variation.synthetic=0.3")
    drawn = [samples.plan(asked, source, 3, number, 4 * number).encoder for number in range(200)]
    assert set(drawn) == {"tiny:8", samples.SYNTHETIC}
    assert 40 < drawn.count(samples.SYNTHETIC) < 80


def test_the_other_steps_are_what_they_are_without(tmp_path: Path, source: FeatureCache) -> None:
    some, none = settings(tmp_path, "variation.synthetic=0.5"), settings(tmp_path)
    steps = [[samples.plan(asked, source, 3, number, 4 * number) for number in range(20)] for asked in (some, none)]
    assert all(mixed == plain for mixed, plain in zip(*steps, strict=True) if mixed.encoder != samples.SYNTHETIC)
