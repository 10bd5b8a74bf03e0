"""Features computed when they are asked for: no disk, fresh crops in each epoch, the encoders' time in each step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from anyup.encoders import Encoder
from anyup.images import resize
from anyup.training.feature_cache import Features, Grid, Recipe, cut_crops, draw_places, encode, input_sizes
from anyup.training.photographs import draw_view, read_large, view_of

_ENDLESS = 2**31  # of the pools: each draw is another one
_PHOTOGRAPHS_KEPT = 4  # decoded; a sample asks for its own several times


class LiveFeatures:
    """What a `FeatureCache` gives, from the photographs and the encoders themselves."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        recipe: Recipe,
        encoders: Mapping[str, Encoder],
        broken: Callable[[Exception], None],
    ) -> None:
        self.recipe = recipe
        self.views = 1 if recipe.views == 1 else _ENDLESS
        self.crops = _ENDLESS
        self.grids = {name: Grid.of(encoder, recipe) for name, encoder in encoders.items()}
        self.input_sizes = {name: input_sizes(encoder, recipe) for name, encoder in encoders.items()}
        self._encoders = dict(encoders)
        self._root = Path(root)
        self._broken = broken
        self._unreadable: set[Path] = set()
        self._read = lru_cache(_PHOTOGRAPHS_KEPT)(lambda path: read_large(path, recipe.min_side))

    def usable(self, path: Path) -> bool:
        """Whether a photograph can be read and is large enough; reported once where not."""
        if path in self._unreadable:
            return False
        try:
            self._read(path)
        except (OSError, ValueError) as error:
            self._unreadable.add(path)
            self._broken(error)
            return False
        return True

    def guidance(self, path: Path, view: int) -> Tensor:
        """The pixels of a view (3, S, S) as bytes, S the recipe's guidance size."""
        return self._view(path, view, self.recipe.guidance_size)[0].mul(255).round().to(torch.uint8)

    def features(self, path: Path, encoder: str, view: int, input_size: int, crops: Sequence[int]) -> Features:
        """An encoder's features of a view in float32: at an input size, and of these crops of an endless pool."""
        network, grid, recipe = self._encoders[encoder], self.grids[encoder], self.recipe
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        image = self._view(path, view, recipe.image_size)
        name = path.relative_to(self._root).as_posix()
        places = torch.tensor(draw_places(crops, grid, recipe.seed, network.name, name, view))
        low = encode(network, resize(image, (input_size, input_size)), device)
        targets = encode(network, cut_crops(image, places[None], grid.stride, recipe.crop_size), device)
        return Features(low[0].float(), targets.float(), places)

    def _view(self, path: Path, index: int, side: int) -> Tensor:
        name = path.relative_to(self._root).as_posix()
        return view_of(self._read(path), draw_view(name, index, self.recipe.seed, self.recipe.view_scales), side)
