"""Changes to samples that leave the task as it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")

from support.small_training import TinyEncoder, make_photographs, settings

from anyup.training import samples
from anyup.training.feature_augmentations import TURNS, draw_channels, recolour, turn, turn_places
from anyup.training.feature_cache import FeatureCache, Recipe

ALL = ("variation.turns=true", "variation.recolour=1.0", "variation.channels=0.5")


def image(side: int = 12) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_turns_are_the_eight_of_a_square() -> None:
    square = image()[0]
    turned = [turn(square, number) for number in range(TURNS)]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    assert torch.equal(turned[0], square)


@pytest.mark.parametrize("number", range(TURNS))
def test_a_window_of_the_turned_map_is_the_window_turned(number: int) -> None:
    square, window = image(), 5
    places = torch.tensor([[0, 0], [7, 0], [1, 4], [3, 7]])
    turned = turn(square, number)
    for before, after in zip(places.tolist(), turn_places(places, number, 12, window).tolist(), strict=True):
        expected = turn(square[:, before[0] : before[0] + window, before[1] : before[1] + window], number)
        assert torch.equal(turned[:, after[0] : after[0] + window, after[1] : after[1] + window], expected)


def test_recolouring_keeps_equal_pixels_equal_and_others_apart() -> None:
    picture = image(4)
    picture[:, 2:] = picture[:, :2]
    changed = recolour(picture, 3)
    assert torch.equal(changed[:, 2:], changed[:, :2])
    assert len({tuple(pixel) for pixel in changed.flatten(1).T.tolist()}) == 8
    assert 0 <= changed.min() and changed.max() <= 1
    assert (changed - picture).abs().mean() > 0.05


def test_recolouring_depends_on_the_key_alone() -> None:
    assert torch.equal(recolour(image(), 1, 2), recolour(image(), 1, 2))
    assert not torch.equal(recolour(image(), 1, 2), recolour(image(), 1, 3))


def test_recolouring_turns_any_colour_into_any_other() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    strongest = {int(recolour(red, key).argmax()) for key in range(40)}
    assert strongest == {0, 1, 2}


def test_channels_are_a_share_without_repetition() -> None:
    counts = set()
    for seed in range(60):
        chosen = draw_channels(10, 0.5, random.Random(seed))
        assert len(set(chosen)) == len(chosen) and set(chosen) <= set(range(10))
        counts.add(len(chosen))
    assert counts == {5, 6, 7, 8, 9, 10}
    assert len(draw_channels(1, 0.1, random.Random(0))) == 1


@pytest.fixture
def source(tmp_path: Path) -> FeatureCache:
    folder = make_photographs(tmp_path / "photographs", 3)
    recipe = Recipe.of(settings(tmp_path).data, 32, 0)
    stored = FeatureCache(tmp_path / "cache", folder, recipe)
    stored.fill("tiny:8", TinyEncoder(8), sorted(folder.iterdir()))
    return stored


def batch_of(tmp_path: Path, source: FeatureCache, *overrides: str) -> tuple[samples.Step, samples.Batch]:
    paths = sorted((tmp_path / "photographs").iterdir())
    step = samples.plan(settings(tmp_path, *overrides), source, len(paths), 3, 12)
    return step, samples.assemble(step, step.samples, source, paths, 0)


def test_nothing_varies_unless_it_is_asked_for(tmp_path: Path, source: FeatureCache) -> None:
    step, batch = batch_of(tmp_path, source)
    assert all(sample.turn == 0 and not sample.recoloured for sample in step.samples)
    assert batch.low.shape[1] == 6


def test_the_same_photographs_views_and_crops_are_taken(tmp_path: Path, source: FeatureCache) -> None:
    plain, varied = (batch_of(tmp_path, source, *overrides)[0] for overrides in ((), ALL))
    same = [(s.photograph, s.view, s.crops, s.augmented) for s in plain.samples]
    assert [(s.photograph, s.view, s.crops, s.augmented) for s in varied.samples] == same
    assert any(sample.turn for sample in varied.samples) and all(sample.recoloured for sample in varied.samples)


def test_guidance_features_and_crops_turn_together(tmp_path: Path, source: FeatureCache) -> None:
    step, batch = batch_of(tmp_path, source, "variation.turns=true")
    _, plain = batch_of(tmp_path, source)
    # The order within a batch is that of the augmented first, the same in both.
    ordered = sorted(step.samples, key=lambda sample: not sample.augmented)
    for index, sample in enumerate(ordered):
        torch.testing.assert_close(batch.low[index], turn(plain.low[index], sample.turn), rtol=0, atol=0)
        torch.testing.assert_close(batch.guidance[index], turn(plain.guidance[index], sample.turn), rtol=0, atol=1e-5)
        # The crops' windows of the enlarged low map stay what they were, turned.
        for crop in range(batch.targets.shape[1]):
            config = [_window(b, index, crop) for b in (batch, plain)]
            torch.testing.assert_close(config[0], turn(config[1], sample.turn), rtol=0, atol=0)
            target = turn(plain.targets[index, crop], sample.turn)
            torch.testing.assert_close(batch.targets[index, crop], target, rtol=0, atol=0)


def _window(batch: samples.Batch, index: int, crop: int) -> torch.Tensor:
    enlarged = F.interpolate(batch.low[index : index + 1], size=(batch.side, batch.side), mode="nearest")[0]
    top, left = batch.places[index, crop].tolist()
    size = batch.targets.shape[-1]
    return enlarged[:, top : top + size, left : left + size]


def test_low_features_and_targets_keep_the_same_channels(tmp_path: Path, source: FeatureCache) -> None:
    _, plain = batch_of(tmp_path, source)
    _, batch = batch_of(tmp_path, source, "variation.channels=0.3")
    assert batch.low.shape[1] == batch.targets.shape[2] < 6
    for channel in range(batch.low.shape[1]):
        (origin,) = [c for c in range(6) if torch.equal(plain.low[:, c], batch.low[:, channel])]
        assert torch.equal(plain.targets[:, :, origin], batch.targets[:, :, channel])


def test_parts_of_a_varied_step_together_are_the_step(tmp_path: Path, source: FeatureCache) -> None:
    paths = sorted((tmp_path / "photographs").iterdir())
    step = samples.plan(settings(tmp_path, *ALL), source, 3, 5, 20)
    whole = samples.assemble(step, step.samples, source, paths, 0)
    parts = [samples.assemble(step, step.samples[i::2], source, paths, 0) for i in (0, 1)]
    for name in ("guidance", "augmented", "low", "targets", "places"):
        together = torch.stack([getattr(parts[i % 2], name)[i // 2] for i in range(4)])
        torch.testing.assert_close(together, getattr(whole, name), rtol=0, atol=0)
