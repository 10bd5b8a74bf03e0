"""Before the first step: encoders, the features of all photographs, and what cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyup.encoders import Encoder, load_encoder
from anyup.reporting import Rate, Reporter
from anyup.training.config import Settings
from anyup.training.distributed import Engine
from anyup.training.feature_cache import FeatureCache, Recipe
from anyup.training.live_features import LiveFeatures
from anyup.training.photographs import split
from anyup.training.samples import FeatureSource


@dataclass(frozen=True)
class Prepared:
    """The photographs to learn from and those held out, each with its source of features."""

    source: FeatureSource
    paths: list[Path]
    held_out_source: FeatureSource
    held_out: list[Path]


def prepare(settings: Settings, found: Sequence[Path], engine: Engine, reporter: Reporter) -> Prepared:
    """Fill the cache, or get the encoders ready where there is none. Photographs that are broken or small are reported.

    Raises ValueError where no photograph is left, and what `load_encoder` raises.
    """
    data = settings.data
    learned, held_out = split(found, data.held_out_every)
    recipe = Recipe.of(data, max(settings.guidance.largest, data.crop_size), settings.seed)
    once = dataclasses.replace(recipe, views=1)

    def broken(error: Exception) -> None:
        reporter.note_once(f"left out: {error}")

    if not data.cache:
        encoders = {name: load_encoder(name, device=engine.device) for name in settings.encoders}
        source, unseen = (LiveFeatures(data.photographs, r, encoders, broken) for r in (recipe, once))
        return Prepared(source, learned, unseen, [path for path in held_out if unseen.usable(path)])
    cache, unseen_cache = (FeatureCache(data.cache, data.photographs, r) for r in (recipe, once))
    for name in settings.encoders:
        encoder = load_encoder(name, device=engine.device)
        for target, paths, what in ((cache, learned, "photographs"), (unseen_cache, held_out, "held out")):
            _fill(target, name, encoder, paths[engine.rank :: engine.world], what, broken, reporter)
        del encoder
    engine.wait()
    usable = [path for path in learned if cache.usable(path)]
    if not usable:
        raise ValueError(f"data.photographs: none of {len(learned)} in {data.photographs!r} can be used")
    return Prepared(cache, usable, unseen_cache, [path for path in held_out if unseen_cache.usable(path)])


def _fill(
    cache: FeatureCache,
    name: str,
    encoder: Encoder,
    paths: Sequence[Path],
    what: str,
    broken: Callable[[Exception], None],
    reporter: Reporter,
) -> None:
    rate, total = Rate(), len(paths)

    def done(count: int) -> None:
        left = rate.count_of(count, total)
        reporter.tick(f"features of {name}: {count} of {total} {what}{left}", last=count == total)

    cache.fill(name, encoder, paths, done=done, broken=broken)
