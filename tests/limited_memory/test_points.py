"""`AnyUp.at_points` gives what the whole output has at these points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_close_enough
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.window import CellWindow

SMALL: dict[str, Any] = {"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3}


def small(**arguments: Any) -> AnyUp:
    return fill(AnyUp(**{**SMALL, **arguments}), 0).eval()


def inputs(
    size: tuple[int, int] = (24, 20), grid: tuple[int, int] = (6, 5), channels: int = 7, batch: int = 2
) -> tuple[Tensor, Tensor]:
    return wave((batch, 3, *size), 3, 0.8), wave((batch, channels, *grid), 7)


def some_points(size: tuple[int, int], batch: int = 2, count: int = 40) -> Tensor:
    """Corners among them, and one pixel twice."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randint(length, (batch, count), generator=generator) for length in size], dim=2)
    last = [length - 1 for length in size]
    drawn[:, :5] = torch.tensor([[0, 0], [0, last[1]], [last[0], 0], last, last])
    return drawn


def picked(whole: Tensor, points: Tensor) -> Tensor:
    """(B, N, C) of a map (B, C, H, W)."""
    return torch.stack([each[:, p[:, 0], p[:, 1]].T for each, p in zip(whole, points, strict=True)])


def wide(model: AnyUp) -> AnyUp:
    again = AnyUp(**model.config, backend="reference").double().eval()
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("max_memory", [None, "60MB"])
@pytest.mark.parametrize("size", [(24, 20), (48, 40), (31, 47), (11, 7), (1, 1), (24, 1)])
@torch.no_grad()
def test_points_are_those_of_the_whole_output(size: tuple[int, int], max_memory: str | None) -> None:
    model, (image, features) = small(), inputs()
    points = some_points(size)
    exact = picked(wide(model)(image.double(), features.double(), size), points)
    reference = picked(small(backend="reference")(image, features, size), points)
    found = model.at_points(image, features, points, size, max_memory=max_memory)
    assert found.shape == (2, 40, 7) and found.dtype == features.dtype
    assert_close_enough(found, reference, exact)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 4},
        {"input_dim": 40},
        {"window": "cell"},
        {"window_ratio": 0.0},
        {"window_ratio": 0.4, "num_heads": 1},
    ],
)
@torch.no_grad()
def test_any_constructor_has_points(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    image, features = wave((1, model.config["input_dim"], 22, 19), 3, 0.8), wave((1, 9, 7, 5), 7)
    for size in ((22, 19), (30, 11)):
        points = some_points(size, 1)
        exact = picked(wide(model)(image.double(), features.double(), size), points)
        reference = picked(small(backend="reference", **arguments)(image, features, size), points)
        assert_close_enough(model.at_points(image, features, points, size), reference, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_has_points(dtype: torch.dtype) -> None:
    model, (image, features) = small().to(dtype), inputs()
    image, features, points = image.to(dtype), features.to(dtype), some_points((24, 20))
    exact = picked(wide(model)(image.double(), features.double()), points)
    found = model.at_points(image, features, points)
    assert found.dtype == dtype
    assert_close_enough(found, picked(model(image, features), points), exact)


@torch.no_grad()
def test_values_and_contexts_have_points() -> None:
    model, (image, features) = small(), inputs()
    values, points = wave((2, 3, 6, 5), 9), some_points((24, 20))
    expected = picked(model(image, features, values=values), points)
    for grids in ([], [(6, 5)]):
        context = model.encode_image(image, grids=grids)
        found = model.at_points(context, features, points, values=values)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_points_between_pixels_are_interpolated_as_grid_sample_does() -> None:
    model, (image, features) = small(), inputs()
    size = (24, 20)
    points = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * (torch.tensor(size) - 1)
    points[:, 0], points[:, 1] = torch.tensor([23.0, 19.0]), torch.tensor([0.0, 3.5])
    grid = (points / (torch.tensor(size) - 1) * 2 - 1).flip(2)[:, :, None]
    expected = F.grid_sample(model(image, features), grid, align_corners=True)[..., 0].transpose(1, 2)
    torch.testing.assert_close(model.at_points(image, features, points), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_features_and_values() -> None:
    points = some_points((24, 20))
    grads = []
    for frozen in (True, False):
        model, (image, features) = small(), inputs()
        model.requires_grad_(not frozen)
        values = wave((2, 3, 6, 5), 9)
        leaves = [features.requires_grad_(), values.requires_grad_()]
        weight = wave((2, 40, 3), 11)
        ours = torch.autograd.grad((model.at_points(image, features, points, values=values) * weight).sum(), leaves)
        whole = picked(model(image, features, values=values), points)
        for found, expected in zip(ours, torch.autograd.grad((whole * weight).sum(), leaves), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        grads.append(ours)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_weights_and_the_image_get_gradients_too() -> None:
    model, (image, features) = small(), inputs()
    points = some_points((24, 20))
    leaves = [image.requires_grad_(), model.query_encoder[0].weight, model.cross_decode.conv2d.weight]
    ours = torch.autograd.grad(model.at_points(image, features, points).square().sum(), leaves)
    expected = torch.autograd.grad(picked(model(image, features), points).square().sum(), leaves)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="max_memory: the gradient"):
        model.at_points(image, features, points, max_memory="1GB")


@torch.no_grad()
def test_a_key_outside_of_a_points_window_changes_nothing() -> None:
    model = small(window_ratio=0.1)
    image, features = inputs((40, 40), (20, 20), batch=1)
    values = features.clone()
    values[0, :, -1, -1] = torch.nan
    points = torch.tensor([[[0, 0], [17, 20], [39, 0]]])
    found = model.at_points(image, features, points, values=values)
    assert torch.equal(found, model.at_points(image, features, points))
    assert model.at_points(image, features, torch.tensor([[[39, 39]]]), values=values).isnan().all()


@torch.no_grad()
def test_a_window_that_the_border_configs_hides_what_fills_it_up() -> None:
    model = small(window="cell", window_ratio=0.2)
    assert isinstance(model.window, CellWindow)
    image, features = inputs((24, 20), (12, 10), batch=1)
    points = some_points((24, 20), 1)
    torch.testing.assert_close(
        model.at_points(image, features, points), picked(model(image, features), points), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_no_points_and_no_images_are_allowed() -> None:
    model, (image, features) = small(), inputs()
    assert model.at_points(image, features, torch.zeros(2, 0, 2, dtype=torch.long)).shape == (2, 0, 7)
    assert model.at_points(image[:0], features[:0], torch.zeros(0, 3, 2, dtype=torch.long)).shape == (0, 3, 7)


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        ([[0, 0]], TypeError, "points: expected a tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.long), ValueError, r"points: expected rows and columns \(2, N, 2\)"),
        (torch.zeros(1, 3, 2, dtype=torch.long), ValueError, r"for a batch of 2, got \(1, 3, 2\)"),
        (torch.zeros(2, 3, 2, dtype=torch.bool), TypeError, "points: expected integers or floating-point"),
        (torch.tensor([[[0, 0]], [[24, 0]]]), ValueError, r"rows from 0 to 23 and columns from 0 to 19, got \[24, 0\]"),
        (torch.tensor([[[0, 0]], [[0, -1]]]), ValueError, r"got \[0, -1\]"),
        (torch.full((2, 1, 2), torch.nan), ValueError, r"got \[nan, nan\]"),
        (torch.full((2, 1, 2), 19.5), ValueError, r"got \[19.5, 19.5\]"),
    ],
)
def test_other_points_are_refused(points: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small().at_points(*inputs(), points)


@torch.no_grad()
def test_nothing_of_the_outputs_size_is_made() -> None:
    image, features = inputs((16, 16), (4, 4), batch=1)
    # The output would take 120 GB.
    found = small().at_points(image, features, torch.tensor([[[65535, 3]]]), 65536)
    assert found.shape == (1, 1, 7) and found.isfinite().all()


@torch.no_grad()
def test_kernels_encode_points_and_attend() -> None:
    image, features = inputs((12, 10), batch=1)
    points = some_points((12, 10), 1, 9)
    exact = picked(wide(small())(image.double(), features.double()), points)
    reference = picked(small(backend="reference")(image, features), points)
    model = small(backend={"pixel_encoder": ("triton", "torch"), "window_attention": ("triton", "torch")})
    assert_close_enough(model.at_points(image, features, points), reference, exact)
