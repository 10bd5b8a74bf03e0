"""What a training run reads: photographs, views, cached features, samples, augmentations."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

from support.small_training import TinyEncoder, make_photographs, settings

from anyup.photographs import find_photographs
from anyup.training import samples
from anyup.training.augmentations import CHANGES, augment
from anyup.training.config import ConfigError
from anyup.training.feature_cache import FeatureCache, Recipe
from anyup.training.live_features import LiveFeatures
from anyup.training.photographs import View, draw_view, split, square_crop, view_of

RECIPE = Recipe(
    seed=0,
    image_size=64,
    crop_size=32,
    input_sizes=(32, 20),
    views=2,
    view_scales=(0.6, 1.0),
    crops=3,
    guidance_size=32,
    min_side=48,
)


# Photographs.


def test_photographs_are_found_in_folders_of_folders_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/c.webp", ".hidden/d.png", ".e.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_photographs(tmp_path)] == [
        "a.JPG",
        "b.png",
        "deep/c.webp",
    ]


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_linked_folders_are_followed_once_and_real_paths_come_first(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for path in (root / "z" / "deep" / "a.png", root / "b.png", other / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for link, target in (("itself", root), ("z/deep/up", root / "z"), ("a_link_to_z", root / "z"), ("x", other)):
        (root / link).symlink_to(target, target_is_directory=True)
    (root / "x2").symlink_to(other, target_is_directory=True)
    (other / "back").symlink_to(root, target_is_directory=True)
    found = [path.relative_to(root).as_posix() for path in find_photographs(root)]
    assert found == ["b.png", "x/c.png", "z/deep/a.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_cannot_be_read_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.warns(UserWarning, match="left out: .*closed"):
        assert len(find_photographs(tmp_path)) == 1


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no pictures .* in the folder '{tmp_path}'"):
        find_photographs(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        find_photographs(tmp_path / "none")


def test_every_tenth_by_name_is_held_out_whatever_the_order() -> None:
    paths = [Path(f"folder/{n:03}.png") for n in range(25)]
    learned, held_out = split(paths[::-1])
    assert [path.name for path in held_out] == ["009.png", "019.png"]
    assert sorted(learned + held_out) == paths


def test_zero_holds_nothing_out() -> None:
    paths = [Path("a"), Path("b")]
    assert split(paths, 0) == (paths, [])


def test_square_crop_is_the_middle_of_the_photograph() -> None:
    photo = torch.zeros(1, 3, 40, 80)
    photo[:, :, :, 20:60] = 1
    assert square_crop(photo, 40).shape == (1, 3, 40, 40)
    assert square_crop(photo, 40).min() == 1
    assert square_crop(photo, 20).min() > 0.999


def test_a_mirrored_view_is_the_view_mirrored() -> None:
    photo = torch.rand(1, 3, 40, 60)
    view = View(0.5, 0.2, 0.7)
    torch.testing.assert_close(
        view_of(photo, dataclasses.replace(view, mirrored=True), 16), view_of(photo, view, 16).flip(3)
    )


def test_the_first_view_is_the_whole_and_others_differ() -> None:
    views = [draw_view("a.png", index, 0, (0.6, 0.9)) for index in range(20)]
    assert views[0] == View()
    assert all(0.6 <= view.scale <= 0.9 for view in views[1:])
    assert len(set(views)) == 20
    assert {view.mirrored for view in views} == {True, False}


# The cache.


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    return find_photographs(make_photographs(tmp_path / "photographs", 3))


def cache(tmp_path: Path, recipe: Recipe = RECIPE) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", tmp_path / "photographs", recipe)


def test_cached_features_are_those_of_the_encoder(tmp_path: Path, photographs: list[Path]) -> None:
    encoder = TinyEncoder(8)
    stored = cache(tmp_path)
    stored.fill("tiny:8", encoder, photographs)
    features = stored.features(photographs[1], "tiny:8", 1, 32, [2, 0])
    assert features.low.shape == (6, 4, 4) and features.targets.shape == (2, 6, 4, 4)

    from anyup.images import read_photo, resize

    image = view_of(read_photo(photographs[1]), draw_view(photographs[1].name, 1, 0, (0.6, 1.0)), 64)
    low = encoder(encoder.normalize(resize(image, (32, 32))))[0]
    torch.testing.assert_close(features.low, low, rtol=1e-3, atol=1e-3)
    # Patches of a convolution without padding: the features of a crop are a window of the whole view's.
    whole = encoder(encoder.normalize(image))
    windows = torch.stack([whole[0, :, top : top + 4, left : left + 4] for top, left in features.places.tolist()])
    torch.testing.assert_close(features.targets, windows, rtol=1e-3, atol=1e-3)


def test_places_differ_between_crops_and_stay_inside(tmp_path: Path, photographs: list[Path]) -> None:
    stored = cache(tmp_path, dataclasses.replace(RECIPE, crops=40))
    stored.fill("tiny:4", TinyEncoder(4), photographs[:1])
    places = stored.features(photographs[0], "tiny:4", 0, 32, range(40)).places
    assert places.min() == 0 and places.max() == 8  # 16 cells of the view, 8 of the crop
    assert len({tuple(place) for place in places.tolist()}) > 20


def test_a_filled_cache_runs_no_encoder(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path).fill("tiny:8", TinyEncoder(8), photographs)

    def refuse(*_: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(TinyEncoder, "features", refuse)
    again = cache(tmp_path)
    again.fill("tiny:8", TinyEncoder(8), photographs)
    assert all(again.usable(path) for path in photographs)


@pytest.mark.parametrize("change", [{"seed": 1}, {"crops": 4}, {"views": 3}, {"view_scales": (0.5, 1.0)}])
def test_a_changed_recipe_reads_no_stale_features(
    tmp_path: Path, photographs: list[Path], change: dict[str, object]
) -> None:
    cache(tmp_path).fill("tiny:8", TinyEncoder(8), photographs)
    other = cache(tmp_path, dataclasses.replace(RECIPE, **change))
    other.register("tiny:8", TinyEncoder(8))
    assert not other.usable(photographs[0])


def test_other_weights_read_no_stale_features(tmp_path: Path, photographs: list[Path]) -> None:
    cache(tmp_path).fill("tiny:8", TinyEncoder(8), photographs)
    changed = TinyEncoder(8)
    changed.weight.data[0, 0, 0, 0] += 1
    other = cache(tmp_path)
    other.register("tiny:8", changed)
    assert not other.usable(photographs[0])


def test_another_guidance_size_keeps_the_features(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path).fill("tiny:8", TinyEncoder(8), photographs)
    monkeypatch.setattr(TinyEncoder, "features", None)
    larger = cache(tmp_path, dataclasses.replace(RECIPE, guidance_size=48))
    larger.fill("tiny:8", TinyEncoder(8), photographs)
    assert larger.guidance(photographs[0], 1).shape == (3, 48, 48)


def test_a_photograph_that_changed_is_encoded_again(tmp_path: Path, photographs: list[Path]) -> None:
    stored = cache(tmp_path)
    stored.fill("tiny:8", TinyEncoder(8), photographs)
    photographs[0].write_bytes(photographs[1].read_bytes())
    assert not stored.usable(photographs[0])


def test_broken_and_small_photographs_are_told_once_and_left_out(tmp_path: Path, photographs: list[Path]) -> None:
    photographs[0].write_bytes(photographs[0].read_bytes()[:200])
    small = make_photographs(tmp_path / "photographs" / "small", 1, size=(40, 90))
    told: list[str] = []
    stored = cache(tmp_path)
    every = [*photographs, small / "photo_00.png"]
    stored.fill("tiny:8", TinyEncoder(8), every, broken=lambda error: told.append(str(error)))
    assert [stored.usable(path) for path in every] == [False, True, True, False]
    assert len(told) == 2
    assert "photo_00.png" in told[0]
    assert "short side is 40 pixels, less than data.min_side, 48" in told[1]


def test_an_interrupted_write_leaves_no_file(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).fill("tiny:8", TinyEncoder(8), photographs)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_damaged_file_of_the_cache_is_named(tmp_path: Path, photographs: list[Path]) -> None:
    stored = cache(tmp_path)
    stored.fill("tiny:8", TinyEncoder(8), photographs)
    (file,) = (tmp_path / "cache").glob("tiny*/photo_00*")
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="photo_00.*damaged file of the cache"):
        stored.features(photographs[0], "tiny:8", 0, 32, [0])


def test_an_encoder_whose_stride_does_not_divide_the_crop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.image_size: expected a multiple of tiny:12:6's stride 12, got 64"):
        cache(tmp_path).register("tiny:12", TinyEncoder(12))


def test_input_sizes_off_the_grid_of_an_encoder_are_left_out(tmp_path: Path) -> None:
    stored = cache(tmp_path)
    stored.register("tiny:8", TinyEncoder(8))
    stored.register("tiny:4", TinyEncoder(4))
    assert stored.input_sizes == {"tiny:8": [32], "tiny:4": [32, 20]}


def test_live_features_are_those_of_the_cache(tmp_path: Path, photographs: list[Path]) -> None:
    stored = cache(tmp_path)
    stored.fill("tiny:8", TinyEncoder(8), photographs)
    live = LiveFeatures(tmp_path / "photographs", RECIPE, {"tiny:8": TinyEncoder(8)}, lambda error: None)
    for path in photographs:
        torch.testing.assert_close(live.guidance(path, 1), stored.guidance(path, 1), rtol=0, atol=0)
        ours, theirs = (source.features(path, "tiny:8", 1, 32, [1, 2]) for source in (live, stored))
        assert ours.places.tolist() == theirs.places.tolist()
        torch.testing.assert_close(ours.low, theirs.low, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.targets, theirs.targets, rtol=1e-3, atol=1e-3)


def test_a_live_photograph_that_breaks_is_replaced_and_told_once(tmp_path: Path, photographs: list[Path]) -> None:
    photographs[0].write_bytes(b"no picture")
    told: list[str] = []
    live = LiveFeatures(
        tmp_path / "photographs", RECIPE, {"tiny:8": TinyEncoder(8)}, lambda error: told.append(str(error))
    )
    chosen = settings(tmp_path, "data.cache=", "optimizer.batch=9")
    step = samples.plan(chosen, live, 3, 0, 0)
    batch = samples.assemble(step, step.samples, live, photographs, 0)
    assert len(batch.low) == 9
    assert len(told) == 1 and told[0].startswith(f"{photographs[0]}: ")


# Samples.


@pytest.fixture
def source(tmp_path: Path, photographs: list[Path]) -> FeatureCache:
    stored = cache(tmp_path)
    for stride in (8, 4):
        stored.fill(f"tiny:{stride}", TinyEncoder(stride), photographs)
    return stored


def test_each_epoch_takes_each_photograph_once_in_its_own_order(tmp_path: Path, source: FeatureCache) -> None:
    chosen = settings(tmp_path, "optimizer.batch=4")
    taken = [s.photograph for n in range(30) for s in samples.plan(chosen, source, 12, n, 4 * n).samples]
    epochs = [taken[first : first + 12] for first in range(0, 120, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_a_plan_depends_on_its_number_alone(tmp_path: Path, source: FeatureCache) -> None:
    chosen = settings(tmp_path, "encoders=['tiny:8', 'tiny:4']")
    forward = [samples.plan(chosen, source, 12, n, 4 * n) for n in range(10)]
    backward = [samples.plan(chosen, source, 12, n, 4 * n) for n in reversed(range(10))]
    assert forward == backward[::-1]
    assert {step.encoder for step in forward} == {"tiny:8", "tiny:4"}
    assert {step.input_size for step in forward} == {32, 20}
    assert all(step.input_size == 32 for step in forward if step.encoder == "tiny:8")


def test_a_step_draws_a_stride_first_or_any_encoder(tmp_path: Path, source: FeatureCache) -> None:
    source.register("tiny:16", TinyEncoder(16))
    source.register("other:8", TinyEncoder(8, channels=5))
    three = "encoders=['tiny:8', 'other:8', 'tiny:16']"
    shares = []
    for draw in ("stride", "encoder"):
        chosen = settings(tmp_path, three, f"draw={draw}")
        drawn = [samples.plan(chosen, source, 12, n, 4 * n).encoder for n in range(300)]
        shares.append(drawn.count("tiny:16") / 300)
    assert abs(shares[0] - 1 / 2) < 0.1 and abs(shares[1] - 1 / 3) < 0.08


def test_another_seed_gives_other_samples(tmp_path: Path, source: FeatureCache) -> None:
    plans = [samples.plan(settings(tmp_path, f"seed={seed}"), source, 12, 0, 0) for seed in (0, 1)]
    assert plans[0] != plans[1]


def test_a_share_of_the_batch_is_augmented_and_comes_first(
    tmp_path: Path, source: FeatureCache, photographs: list[Path]
) -> None:
    chosen = settings(tmp_path, "loss.self_consistency_share=0.3", "optimizer.batch=5")
    step = samples.plan(chosen, source, 3, 0, 0)
    assert sum(sample.augmented for sample in step.samples) == 2
    batch = samples.assemble(step, step.samples[::-1], source, photographs, 0)
    assert batch.augmented.shape == (2, 3, 16, 16)
    nearest = [(batch.guidance - changed).abs().mean(dim=(1, 2, 3)).argmin().item() for changed in batch.augmented]
    assert set(nearest) <= {0, 1}


def test_parts_of_a_step_together_are_the_step(tmp_path: Path, source: FeatureCache, photographs: list[Path]) -> None:
    step = samples.plan(settings(tmp_path), source, 3, 5, 20)
    whole = samples.assemble(step, step.samples, source, photographs, 0)
    parts = [samples.assemble(step, step.samples[i::2], source, photographs, 0) for i in (0, 1)]
    for name in ("guidance", "augmented", "low", "targets", "places"):
        together = torch.stack([getattr(parts[i % 2], name)[i // 2] for i in range(4)])
        torch.testing.assert_close(together, getattr(whole, name), rtol=0, atol=0)


# Augmentations.


def test_augmentations_depend_on_the_key_alone() -> None:
    image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = augment(image, 0, 7)
    torch.manual_seed(2)
    assert torch.equal(augment(image, 0, 7), first)
    assert not torch.equal(augment(image, 0, 8), first)


def test_augmented_images_are_images_of_the_same_size() -> None:
    image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for key in range(40):
        changed = augment(image, key)
        assert changed.shape == (3, 24, 20) and changed.dtype == torch.float32
        assert 0 <= changed.min() and changed.max() <= 1


def test_probabilities_are_the_published_ones() -> None:
    assert [probability for probability, _ in CHANGES] == [0.5, 0.5, 0.1, 0.35, 1.0, 0.2, 0.15, 0.2, 0.1, 0.05, 0.02]
