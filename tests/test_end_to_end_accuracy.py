"""The whole forward in float32 against float64: no further from it than the published forward is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.recipe import CASES, fill, golden_call, wave
from torch import Tensor

from anyup import AnyUp
from anyup.bench.baseline import Published

WORST = 1.3
"""Of the root mean square errors' ratio in any one case; over all of them the geometric mean is at most 1."""

# Below this the result is a feature as it is: a window of a single key.
_EXACT = 1e-9


def ratio(config: dict[str, Any], image: Tensor, features: Tensor, size: tuple[int, int] | None, seed: int) -> float:
    """The root mean square error of ours over the published forward's, in float32 on the golden recipe's weights."""
    model = fill(AnyUp(**config), seed).eval()
    reference = fill(AnyUp(**config, backend="reference"), seed).double().eval()
    with torch.no_grad():
        exact = reference(image.double(), features.double(), size)
        ours, published = model(image, features, size), Published(model)(image, features, None, size)
    errors = [
        ((result.double() - exact).square().mean() / exact.square().mean()).sqrt() for result in (ours, published)
    ]
    return (errors[0].item() + _EXACT) / (errors[1].item() + _EXACT)


def draw(seed: int) -> tuple[dict[str, Any], Tensor, Tensor, tuple[int, int] | None, int]:
    """Constructor, image, features, output size and the recipe's seed, small enough for the dense float64 forward."""
    pick = random.Random(seed)
    dim = pick.choice([16, 32, 64, 96, 128])
    config = {
        "qk_dim": dim,
        "num_heads": pick.choice([n for n in (1, 2, 4, 8) if dim % n == 0]),
        "lfu_dim": pick.choice([None, 8, 32, 64, 128]),
        "kernel_size": pick.choice([1, 1, 1, 2, 3, 4, 5]),
        "kernel_size_lfu": pick.choice([1, 3, 5, 5, 7]),
        "window_ratio": pick.choice([0.1, 0.1, 0.01, 0.05, 0.25, 0.5, 0.0, -1.0]),
        "window": pick.choice(["ratio", "ratio", "ratio", "cell"]),
    }
    grid = pick.randint(2, 12), pick.randint(2, 12)
    height, width = (max(8, int(length * pick.choice([2, 3.5, 4, 6]))) for length in grid)
    scale = pick.choice([None, None, 0.5, 1.3])
    size = None if scale is None else (max(4, int(height * scale)), max(4, int(width * scale)))
    batch, channels = pick.choice([1, 1, 2]), pick.choice([3, 16, 48, 96, 130, 192])
    image, features = wave((batch, 3, height, width), 3 + seed, 0.8), wave((batch, channels, *grid), 7 + seed)
    return config, image, features, size, seed % 7


def assert_as_accurate(ratios: Sequence[float]) -> None:
    """Raise an AssertionError unless each ratio is at most `WORST`, and their geometric mean at most 1."""
    assert max(ratios) <= WORST, f"worst ratio {max(ratios):.2f}, of number {ratios.index(max(ratios))}"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert mean <= 1, f"geometric mean {mean:.2f}"


def test_every_golden_case_is_as_near_to_float64_as_the_published_forward(one_thread: None) -> None:
    ratios = []
    for name, case in CASES.items():
        call = golden_call(name)
        ratios.append(ratio(case.get("model", {}), call.image, call.features, call.output_size, call.seed))
    assert_as_accurate(ratios)


@pytest.mark.parametrize(
    "draws", [range(16), pytest.param(range(16, 216, 4), marks=pytest.mark.slow, id="50 more")], ids=str
)
def test_any_constructor_and_sizes_are_as_near_to_float64_as_the_published_forward(
    draws: range, one_thread: None
) -> None:
    assert_as_accurate([ratio(*draw(seed)) for seed in draws])


def test_a_larger_error_in_one_case_or_in_the_mean_fails() -> None:
    assert_as_accurate([0.5, 1.29])
    with pytest.raises(AssertionError, match="worst ratio 1.31, of number 1"):
        assert_as_accurate([0.5, 1.31])
    with pytest.raises(AssertionError, match="geometric mean 1.05"):
        assert_as_accurate([1.05, 1.05])
