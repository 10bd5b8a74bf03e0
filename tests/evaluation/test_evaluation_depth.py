"""Depth and normals by Probe3D's protocol: heads, losses and metrics against NumPy in float64 and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.evaluation import attention_weights, depth, normals
from anyup.evaluation.attention_weights import AttentionWeights, BilinearWeights, FixedWeights, NearestWeights, tile
from anyup.evaluation.depth import (
    depth_loss,
    depth_metrics,
    depth_of_bins,
    depth_of_sigmoid,
    gradient_loss,
    relative_depth,
    scale_invariant_loss,
    scaled_and_shifted,
)
from anyup.evaluation.normals import Camera, normals_loss, normals_metrics, normals_of_depth
from anyup.evaluation.probe import LinearProbes
from anyup.evaluation.regression import Depth, Normals, Regression
from anyup.window import RatioWindow

pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_depth(*shape: int, seed: int = 0) -> Tensor:
    """Depth in metres, a fifth of it unknown."""
    metres = uniform(*shape, low=0.5, high=8, seed=seed)
    return metres.masked_fill(uniform(*shape, seed=seed + 100) < 0.2, 0)


# Depth


def test_depth_is_the_mean_of_the_bins_weighted_by_their_shares() -> None:
    logits = uniform(2, 256, 7, low=-3, high=3)
    shares = np.maximum(logits.double().numpy(), 0) + 0.1
    expected = (shares * np.linspace(0.001, 10, 256)[:, None]).sum(1) / shares.sum(1)
    assert depth_of_bins(logits).shape == (2, 1, 7)
    assert np.abs(depth_of_bins(logits)[:, 0].numpy() - expected).max() < 1e-5


def test_without_an_active_bin_depth_is_that_of_the_middle() -> None:
    assert float(depth_of_bins(torch.full((1, 256, 1), -5.0))) == pytest.approx((0.001 + 10) / 2)
    # One bin of 100.1 beside 3 of 0.1, between 0.001 and 1 metre.
    logits = torch.tensor([[[-1.0], [100.0], [-2.0], [-1.0]]])
    bins = np.linspace(0.001, 1, 4)
    assert float(depth_of_bins(logits, 1)) == pytest.approx((100 * bins[1] + 0.1 * bins.sum()) / 100.4)


def test_the_direct_head_stays_between_the_smallest_and_the_largest_depth() -> None:
    depths = depth_of_sigmoid(torch.tensor([-100.0, 0.0, 100.0]), 4.0)
    assert depths.tolist() == pytest.approx([0.001, 0.001 + 3.999 / 2, 4.0])


def scale_invariant_by_numpy(prediction: np.ndarray, target: np.ndarray) -> float:
    known = target > 0
    g = np.log(prediction[known] + 0.001) - np.log(target[known] + 0.001)
    return float(np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2))


def gradient_by_numpy(prediction: np.ndarray, target: np.ndarray) -> float:
    total = 0.0
    for stride in (1, 2, 4, 6):
        p, t = prediction[:, ::stride, ::stride], target[:, ::stride, ::stride]
        g = np.log(p + 0.001) - np.log(np.where(t > 0, t, 1) + 0.001)
        summed = 0.0
        for image, known in zip(g, t > 0, strict=True):
            for row, column in np.argwhere(known):
                for other in ((row + 2, column), (row, column + 2)):
                    if other[0] < image.shape[0] and other[1] < image.shape[1] and known[other]:
                        summed += abs(image[row, column] - image[other])
        total += summed / (t > 0).sum()
    return total


def test_the_losses_are_those_of_numpy_for_each_probe() -> None:
    prediction, target = uniform(3, 4, 15, 13, low=0.2, high=9), some_depth(4, 15, 13, seed=1)
    invariant, gradient = scale_invariant_loss(prediction, target), gradient_loss(prediction, target)
    for index, of_probe in enumerate(prediction.double().numpy()):
        truth = target.double().numpy()
        assert float(invariant[index]) == pytest.approx(scale_invariant_by_numpy(of_probe, truth), rel=1e-5)
        assert float(gradient[index]) == pytest.approx(gradient_by_numpy(of_probe, truth), rel=1e-5)
    assert torch.allclose(depth_loss(prediction, target), 10 * invariant + 0.5 * gradient)


def test_the_losses_by_hand() -> None:
    # Twice the depth everywhere: g = log 2 nearly, of which 0.15 of the square is left, and no gradient.
    target = torch.full((1, 8, 8), 1000.0)
    double = 2 * target[None]
    assert float(scale_invariant_loss(double, target)) == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-4)
    assert float(gradient_loss(double, target)) == 0
    # A step of log 2 between columns 3 and 4: at stride 1 two differences a row cross it, at stride 2 and 4 columns
    # apart: 2 of 4 columns and none of 2; of 8 x 8 pixels, 4 x 4, 2 x 2 and 2 x 2.
    step = target[None].clone()
    step[..., 4:] *= 2
    expected = math.log(2) * (2 * 8 / 64 + 2 * 4 / 16)
    assert float(gradient_loss(step, target)) == pytest.approx(expected, rel=1e-4)


def test_the_published_gradient_compares_images_of_the_batch() -> None:
    target = torch.ones(5, 6, 6)
    prediction = torch.ones(1, 5, 6, 6)
    prediction[0, :, :3] = 2
    assert float(gradient_loss(prediction, target)) > 0
    assert float(gradient_loss(prediction, target, published=True)) == 0
    prediction = torch.ones(1, 5, 6, 6)
    prediction[0, 0] = 2
    g = math.log(2.001 / 1.001)
    # Images 0 and 2 differ, of 5; of every second image (0, 2, 4) the first and the last, of 3; then there are two.
    assert float(gradient_loss(prediction, target, published=True)) == pytest.approx(g * (1 / 5 + 1 / 3), rel=1e-5)


def test_unknown_pixels_change_no_loss_and_have_no_gradient() -> None:
    target = some_depth(2, 9, 9, seed=3)
    prediction = uniform(1, 2, 9, 9, low=0.5, high=5).requires_grad_()
    changed = torch.where(target > 0, prediction, 7.0)
    assert torch.equal(depth_loss(prediction, target), depth_loss(changed, target))
    (gradient,) = torch.autograd.grad(depth_loss(prediction, target).sum(), prediction)
    assert bool((gradient[0][target == 0] == 0).all()) and float(gradient.abs().max()) > 0


def test_a_perfect_fit_has_a_finite_gradient() -> None:
    target = some_depth(2, 9, 9)
    prediction = torch.where(target > 0, target, 1.0)[None].requires_grad_()
    (gradient,) = torch.autograd.grad(depth_loss(prediction, target).sum(), prediction)
    assert bool(gradient.isfinite().all())


def test_the_metrics_of_depth_by_hand() -> None:
    target = torch.tensor([[1.0, 1.0, 2.0, 4.0, 0.0]])
    prediction = torch.tensor([[1.2, 0.7, 2.0, 8.0, 9.0]])  # factors 1.2, 1.43, 1, 2; the last is unknown
    metrics = depth_metrics(prediction, target)
    assert tuple(metrics) == depth.METRICS
    assert [metrics[name] for name in ("delta1", "delta2", "delta3")] == [0.5, 0.75, 0.75]
    assert metrics["rmse"] == pytest.approx(math.sqrt((0.2**2 + 0.3**2 + 4**2) / 4), rel=1e-6)
    below_zero = depth_metrics(torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    assert below_zero["delta3"] == 0.5


def test_relative_depth_by_hand() -> None:
    found = relative_depth(torch.tensor([[0, 2.0], [2.5, 3.0]]))
    assert torch.allclose(found, torch.tensor([[0, 0.01], [0.505, 1]])) and float(found.max()) <= 1
    flat = relative_depth(torch.tensor([[2.0, 2.005]]))  # stretched as if 10 mm were between them
    assert torch.allclose(flat, torch.tensor([[0.01, 0.505]]), atol=1e-4)
    assert torch.equal(relative_depth(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_scale_and_shift_are_those_of_least_squares() -> None:
    target = some_depth(9, 11, seed=5)
    prediction = uniform(9, 11, low=1, high=4, seed=6)
    known = (target > 0).numpy()
    of, to = prediction.double().numpy(), target.double().numpy()
    design = np.stack([of[known], np.ones(known.sum())], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(design, to[known], rcond=None)
    assert np.allclose(scaled_and_shifted(prediction, target).numpy(), scale * of + shift, atol=1e-9)
    exact = scaled_and_shifted((target - 3) / 2, target)
    assert depth_metrics(exact, target)["rmse"] < 1e-6
    assert torch.allclose(scaled_and_shifted(torch.full((2, 2), 3.0), torch.tensor([[1.0, 2], [0, 6]])).float(),
                          torch.full((2, 2), 3.0))  # fmt: skip


# Normals


def unit(vectors: Tensor, dim: int) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=dim)


def test_the_loss_of_normals_is_that_of_numpy() -> None:
    prediction = uniform(2, 3, 4, 5, 6, low=-2, high=2)
    target = unit(uniform(3, 3, 5, 6, low=-1, high=1, seed=1), 1)
    target[:, :, :2] = 0
    expected = []
    for probe in prediction.double().numpy():
        vectors, truth = probe[:, :3], target.double().numpy()
        cosine = (vectors * truth).sum(1) / np.linalg.norm(vectors, axis=1)
        angle = np.arccos(np.clip(cosine, -1 + 1e-4, 1 - 1e-4))
        fourth = probe[:, 3]
        kappa = np.where(fourth > 0, fourth, np.exp(fourth) - 1) + 1.01
        each = np.log(1 + np.exp(-kappa * np.pi)) - np.log(kappa**2 + 1) + kappa * angle
        expected.append(each[:, 2:].mean())
    assert normals_loss(prediction, target).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_normals_by_hand() -> None:
    prediction, target = torch.zeros(1, 1, 4, 1, 1), torch.zeros(1, 3, 1, 1)
    prediction[0, 0, 0], prediction[0, 0, 3], target[0, 1] = 5, -0.01, 1  # a right angle, kappa 1 nearly
    kappa = math.expm1(-0.01) + 1.01
    expected = math.log(1 + math.exp(-math.pi * kappa)) - math.log(kappa**2 + 1) + kappa * math.pi / 2
    assert float(normals_loss(prediction, target)) == pytest.approx(expected, rel=1e-6)


def test_the_metrics_of_normals_by_hand() -> None:
    degrees = torch.tensor([0.0, 10.0, 20.0, 25.0, 90.0, 45.0])
    angle = torch.deg2rad(degrees)
    prediction = 3 * torch.stack([torch.sin(angle), torch.zeros(6), -torch.cos(angle), torch.ones(6)])[:, None]
    target = torch.tensor([0.0, 0.0, -1.0])[:, None, None].repeat(1, 1, 6)
    target[:, 0, 5] = 0  # unknown
    metrics = normals_metrics(prediction, target)
    assert tuple(metrics) == normals.METRICS
    shares = [metrics[name] for name in ("below_11_25", "below_22_5", "below_30")]
    assert shares == pytest.approx([0.4, 0.6, 0.8])
    assert metrics["mean"] == pytest.approx(145 / 5, rel=1e-6) and metrics["median"] == pytest.approx(20, rel=1e-6)
    assert metrics["rmse"] == pytest.approx(math.sqrt((100 + 400 + 625 + 8100) / 5), rel=1e-6)
    assert normals_metrics(target[:, :, :5], target[:, :, :5])["rmse"] < 1e-9


CAMERA = Camera(fx=60.0, fy=70.0, cx=19.0, cy=14.0)


def plane(normal: Tensor, distance: float, height: int = 30, width: int = 40) -> Tensor:
    """The depth of the plane <normal, point> = -distance, seen by the camera."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    rays = torch.stack([(x - CAMERA.cx) / CAMERA.fx, (y - CAMERA.cy) / CAMERA.fy, torch.ones_like(x)])
    return -distance / (normal[:, None, None] * rays).sum(dim=0)


@pytest.mark.parametrize("direction", [(0.0, 0.0, -1.0), (0.3, -0.2, -1.0), (-0.6, 0.5, -0.8)])
@pytest.mark.parametrize("window", [3, 5])
def test_a_planes_normal_is_found_wherever_it_is_seen(direction: tuple[float, float, float], window: int) -> None:
    normal = unit(torch.tensor(direction, dtype=torch.float64), 0)
    depth = plane(normal, 2.0)
    assert bool((depth > 0).all())
    found = normals_of_depth(depth, CAMERA, window)
    assert float((found - normal[:, None, None].float()).abs().max()) < 1e-6


def test_normals_end_at_an_edge_of_depth_and_where_depth_is_unknown() -> None:
    wall, other = (unit(torch.tensor(n, dtype=torch.float64), 0) for n in ((0.0, 0.0, -1.0), (0.4, 0.0, -1.0)))
    depth = plane(wall, 2.0)
    depth[:, 20:] = plane(other, 4.0)[:, 20:]
    depth[:4, :4] = 0
    found = normals_of_depth(depth, CAMERA, 5)
    assert torch.equal(found[:, :4, :4], torch.zeros(3, 4, 4))
    assert float((found[:, 8:, :20] - wall[:, None, None].float()).abs().max()) < 1e-6
    assert float((found[:, :, 20:] - other[:, None, None].float()).abs().max()) < 1e-6
    alone = torch.zeros(9, 9)
    alone[4, 4] = 1
    assert not bool(normals_of_depth(alone, CAMERA, 3).any())


@pytest.mark.parametrize("window", [1, 4, -3])
def test_a_window_that_has_no_centre_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window: expected an odd number of 3 and more, got {window}"):
        normals_of_depth(torch.ones(5, 5), CAMERA, window)


@pytest.mark.parametrize("task", [Depth(), Normals()], ids=["depth", "normals"])
def test_a_task_names_its_metrics_in_their_order(task: Regression) -> None:
    target = uniform(1 if isinstance(task, Depth) else 3, 5, 6, low=0.5, high=3)
    prediction = uniform(1 if isinstance(task, Depth) else 4, 5, 6, low=0.5, high=3, seed=1)
    assert tuple(task.metrics(prediction, target)) == task.metric_names


# Carried


def fixed_weights(method: str, size: tuple[int, int], grid: tuple[int, int]) -> FixedWeights:
    if method == "nearest":
        return NearestWeights(size, grid)
    if method == "bilinear":
        return BilinearWeights(size, grid)
    tiling = tile(RatioWindow(0.1), size, grid)
    weights = uniform(tiling.count // tiling.keys, tiling.keys, seed=9)
    return AttentionWeights(tiling, weights / weights.sum(dim=1, keepdim=True))


def carried_whole(method: str, weights: FixedWeights, values: Tensor) -> Tensor:
    """Maps (C, h, w) brought to (C, H, W) channel by channel, as features are before a head sees them."""
    if isinstance(weights, AttentionWeights):
        return weights.whole(weights.logits(values))
    size = (weights.whole(weights.logits(values))).shape[1:]
    mode = "nearest-exact" if method == "nearest" else "bilinear"
    return F.interpolate(values[None], size=size, mode=mode)[0]


METHODS = ["nearest", "bilinear", "attention"]
GRIDS = [((24, 40), (6, 10)), ((23, 37), (7, 9))]


@pytest.mark.parametrize(("size", "grid"), GRIDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "task", [Depth(bins=12), Depth(bins=1, largest=4), Normals()], ids=["bins", "direct", "normals"]
)
def test_a_head_before_the_upsampling_is_the_head_after_it(
    task: Regression, method: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    features, seeds = uniform(1, 5, *grid, low=-2, high=2), 2
    probes = LinearProbes([method], range(seeds), 5, task.outputs)
    weights = fixed_weights(method, size, grid)
    before = task.predict(weights, probes(features)[0], seeds)
    upsampled = carried_whole(method, weights, features[0])[None]
    after = probes(upsampled)[0].unflatten(0, (seeds, task.outputs))
    if isinstance(task, Depth):
        flat = after.flatten(2)
        after = depth_of_bins(flat, task.largest) if task.bins > 1 else depth_of_sigmoid(flat, task.largest)
        after = after.unflatten(2, size)
    assert before.shape == (seeds, 1 if isinstance(task, Depth) else 4, *size)
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4000, 1 << 20])
def test_the_gradient_of_carried_bins_is_that_of_all_logits_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_weights._AT_A_TIME, "cpu", chunk)
    near = uniform(5, 16, 4, low=-1, high=1).double().requires_grad_()
    weights = uniform(5, 9, 4, seed=1).double()
    carried = depth.CarriedDepth.apply(near, weights, 10.0)
    at_once = depth_of_bins(near @ weights.transpose(1, 2))
    assert torch.allclose(carried, at_once, atol=1e-12)
    factor = uniform(5, 1, 9, seed=2).double()
    gradients = [torch.autograd.grad((factor * d).sum(), near)[0] for d in (carried, at_once)]
    assert torch.allclose(*gradients, atol=1e-12) and float(gradients[0].abs().max()) > 0
