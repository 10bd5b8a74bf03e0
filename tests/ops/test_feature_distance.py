"""The feature distance: every backend against the reference, and the reference against its definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import BACKENDS, DTYPES, output_and_gradients
from support.feature_distance_cases import SHAPES, Shape, assert_distances_accurate, measured, tensors_of

from anyup.ops.feature_distance import explain_backends, feature_distance
from anyup.ops.feature_distance import operator as distance_operator

NAMES = [name for name in SHAPES if name != "empty batch"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_backend_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_distances_accurate(SHAPES[name], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_mean_of_one_minus_cosine_and_of_the_normalised_squares(backend: str) -> None:
    prediction, target, _ = tensors_of(SHAPES["whole maps"], torch.float64)
    cosine, error = feature_distance(prediction, target, backend=backend)
    expected = 1 - F.cosine_similarity(prediction, target, dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(cosine, expected)
    least, largest = target.amin(dim=1, keepdim=True), target.amax(dim=1, keepdim=True)
    both = [(x - least) / (largest - least + 1e-6) for x in (prediction, target)]
    torch.testing.assert_close(error, F.mse_loss(*both, reduction="none").mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_read_at_their_places(backend: str) -> None:
    prediction, target, places = tensors_of(SHAPES["windows that overlap"], torch.float64)
    assert places is not None
    near = torch.stack(
        [
            torch.stack([image[:, top : top + 5, left : left + 6] for top, left in corners])
            for image, corners in zip(prediction, places.tolist(), strict=True)
        ]
    )
    found = feature_distance(prediction, target, places, backend=backend)
    windows = feature_distance(near.flatten(0, 1), target.flatten(0, 1), backend=backend)
    for whole, each in zip(found, windows, strict=True):
        torch.testing.assert_close(whole, each.view(2, 3).mean(dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_at_no_distance_from_themselves(backend: str) -> None:
    _, target, _ = tensors_of(SHAPES["whole maps"])
    cosine, error = feature_distance(target, target, backend=backend)
    torch.testing.assert_close(cosine, torch.zeros(2), rtol=0, atol=1e-6)
    assert torch.equal(error, torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_of_zeros_have_finite_distances_and_gradients(backend: str) -> None:
    prediction, target, _ = tensors_of(SHAPES["whole maps"])
    prediction[:, :, 0], target[:, :, 1] = 0, 0
    found = output_and_gradients(measured(target, None), {"prediction": prediction}, backend)
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["whole maps", "windows that overlap", "one channel"])
def test_gradients_are_those_of_finite_differences(name: str, backend: str) -> None:
    prediction, target, places = tensors_of(SHAPES[name]._replace(channels=4), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: feature_distance(x, target, places, backend=backend), prediction.requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_random_shapes_obey_the_error_rule(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        height, width = rng.randint(1, 20), rng.randint(1, 20)
        shape = Shape(
            (height, width),
            rng.choice([1, 5, 64, 200]),
            rng.randint(0, 3),
            (rng.randint(1, height), rng.randint(1, width)),
            rng.randint(1, 3),
            rng.random() < 0.5,
        )
        dtype = rng.choice(DTYPES)
        try:
            assert_distances_accurate(shape, dtype, seed=seed)
        except AssertionError as error:
            raise AssertionError(f"{shape}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_mean_the_same_in_every_backend(name: str, dtype: torch.dtype, backend: str) -> None:
    prediction, target, places = tensors_of(SHAPES[name], dtype)
    target = target[:, None] if places is None else target
    (_, expected), (_, found) = (
        distance_operator._forward(prediction, target, places, each, True) for each in ("reference", backend)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_no_statistics_are_kept() -> None:
    prediction, target, _ = tensors_of(SHAPES["whole maps"])
    for backend in BACKENDS:
        assert not distance_operator._forward(prediction, target[:, None], None, backend, False)[1].numel()


@pytest.mark.parametrize("name", ["whole maps", "windows that overlap"])
def test_opcheck(name: str) -> None:
    prediction, target, places = tensors_of(SHAPES[name])
    target = target[:, None] if places is None else target
    arguments = (prediction.requires_grad_(), target, places, "torch", True)
    torch.library.opcheck(distance_operator._forward, arguments)
    with torch.no_grad():
        means, statistics = distance_operator._forward(*arguments)
        backward = (torch.ones_like(means), prediction, target, places, statistics, "torch")
        torch.library.opcheck(distance_operator._backward, backward)


def test_the_gradient_has_channels_last() -> None:
    prediction, target, _ = tensors_of(SHAPES["whole maps"])
    for given in (prediction, prediction.contiguous()):
        leaf = given.detach().requires_grad_()
        (grad,) = torch.autograd.grad(sum(t.sum() for t in feature_distance(leaf, target)), leaf)
        assert grad.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": torch.zeros(2, 3, 4)}, ValueError, r"prediction: expected \(B, C, H, W\)"),
        ({"prediction": torch.zeros(2, 3, 4, 5, dtype=torch.long)}, TypeError, "prediction: expected floating-point"),
        ({"target": torch.zeros(2, 3, 4, 4)}, ValueError, r"target: expected \(2, 3, 4, 5\) like the prediction"),
        ({"target": torch.zeros(2, 3, 4, 5, requires_grad=True)}, ValueError, "target: .*detach"),
        ({"target": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "target: expected to be on cpu"),
        ({"places": torch.zeros(2, 1, 2).long()}, ValueError, r"target: expected \(2, K, 3, h, w\)"),
        (
            {"target": torch.zeros(2, 1, 3, 5, 2), "places": torch.zeros(2, 1, 2).long()},
            ValueError,
            "h up to 4 and w up to 5",
        ),
        (
            {"target": torch.zeros(2, 1, 3, 2, 2), "places": torch.zeros(2, 1, 2)},
            TypeError,
            "places: expected int64",
        ),
        (
            {"target": torch.zeros(2, 1, 3, 2, 2), "places": torch.zeros(2, 2).long()},
            ValueError,
            r"places: expected \(2, 1, 2\)",
        ),
        (
            {"target": torch.zeros(2, 1, 3, 2, 2), "places": torch.tensor([[[0, 0]], [[3, 0]]])},
            ValueError,
            "places: expected windows within 4 x 5 pixels",
        ),
        (
            {"target": torch.zeros(2, 0, 3, 2, 2), "places": torch.zeros(2, 0, 2).long()},
            ValueError,
            "target: expected features to compare",
        ),
    ],
)
def test_a_mistake_is_told_with_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"prediction": torch.zeros(2, 3, 4, 5), "target": torch.zeros(2, 3, 4, 5), "places": None, **change}
    with pytest.raises(error, match=message):
        feature_distance(**arguments)
    with pytest.raises(error, match=message):
        explain_backends(**arguments)
