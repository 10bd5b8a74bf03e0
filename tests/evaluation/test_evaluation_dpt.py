"""The DPT head over four blocks: what of it comes before the upsampling, and what after."""

from __future__ import annotations

import pytest
import torch
from support.tiny_encoder import make_encoder
from torch import Tensor
from torch.nn import functional as F

from anyup.evaluation import dpt
from anyup.evaluation.attention_weights import BilinearWeights, NearestWeights
from anyup.evaluation.depth import depth_of_bins
from anyup.evaluation.dpt import BLOCKS, DptHead, DptProbes, FourBlocks
from anyup.evaluation.regression import Depth

pytestmark = pytest.mark.usefixtures("one_thread")

OF_BLOCK, WIDTH, OUTPUTS = 3, 4, 2
GRID, SIZE = (3, 4), (9, 11)


def make_probes(seeds: int = 2, tokens: int = 0, methods: tuple[str, ...] = ("bilinear",)) -> DptProbes:
    channels = BLOCKS * OF_BLOCK * (1 + tokens)
    return DptProbes(methods, range(seeds), channels, OUTPUTS, of_block=OF_BLOCK, width=WIDTH)


def published(head: DptHead, features: Tensor) -> Tensor:
    """The head on features (1, 4 * C, H, W) of the image's size, layer by layer as Probe3D orders them."""

    def residual(unit: torch.nn.Module, x: Tensor) -> Tensor:
        first, second = (unit.layers[i] for i in (0, 2))
        return (
            x
            + F.conv2d(
                F.conv2d(x, first.weight, first.bias, padding=1).relu(), second.weight, second.bias, padding=1
            ).relu()
        )

    weights, biases = head.project.weight.split(WIDTH), head.project.bias.split(WIDTH)
    blocks = [F.conv2d(x, *of) for x, *of in zip(features.split(OF_BLOCK, dim=1), weights, biases, strict=True)]
    x = residual(head.merged[3], blocks[3])
    for block in (2, 1, 0):
        x = residual(head.merged[block], residual(head.each[block], blocks[block]) + x)
    first, second = head.out[0], head.out[2]
    x = F.conv2d(x, first.weight, first.bias, padding=1).relu()
    return F.conv2d(x, second.weight, second.bias, padding=1)[0]


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("mode", ["bilinear", "nearest-exact"])
def test_the_head_is_the_published_one_on_upsampled_features_and_so_are_its_gradients(
    mode: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpt, "_AT_A_TIME", rows * OUTPUTS * SIZE[1] * 8)  # of float64
    probes = make_probes().double()
    features = torch.randn(1, BLOCKS * OF_BLOCK, *GRID, dtype=torch.float64)
    heads = list(probes.heads[0])
    upsampled = F.interpolate(features, SIZE, mode=mode)
    expected = torch.cat([published(head, upsampled) for head in heads])
    of_output = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * of_output).sum(), probes.parameters())

    weights = (BilinearWeights if mode == "bilinear" else NearestWeights)(SIZE, GRID)
    carrier = probes.carrier(0, weights)
    low = probes(features)
    assert low.shape == (1, 2 * BLOCKS * WIDTH, *GRID)
    found = carrier.whole(carrier.logits(low[0]))
    assert torch.allclose(found, expected, atol=1e-6)  # the interpolation is in float32
    for gradient, wanted in zip(
        torch.autograd.grad((found * of_output).sum(), probes.parameters()), expected_gradients, strict=True
    ):
        assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(probes.finish(0, F.interpolate(low, SIZE, mode=mode)[0]), expected, atol=1e-12)
    depths = depth_of_bins(expected.view(2, OUTPUTS, -1)).view(2, 1, *SIZE)
    assert torch.allclose(Depth(OUTPUTS).predict(carrier, low[0], 2), depths, atol=1e-5)
    labels = torch.randint(0, 2, SIZE, dtype=torch.uint8)
    assert torch.equal(next(carrier.targets(labels, 2)), labels.long())


def test_a_seed_begins_alike_for_all_methods_and_seeds_differ() -> None:
    probes = make_probes(methods=("nearest", "bilinear"))
    low = probes(torch.randn(1, BLOCKS * OF_BLOCK, *GRID))
    assert torch.equal(low[0], low[1])
    first, second = low[0].unflatten(0, (2, -1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("place", ["features", "token"])
def test_each_projection_sees_its_own_block_and_class_token_alone(place: str) -> None:
    probes = make_probes(seeds=1, tokens=1)
    seen = torch.randn(1, 2 * BLOCKS * OF_BLOCK, *GRID)
    other = seen.clone()
    other[:, (2 + (BLOCKS if place == "token" else 0)) * OF_BLOCK] += 1  # of the third block
    changed = (probes(seen) != probes(other)).flatten(2).any(dim=2).view(BLOCKS, WIDTH)
    assert changed.all(dim=1).tolist() == changed.any(dim=1).tolist() == [False, False, True, False]


def test_four_blocks_are_side_by_side_with_their_class_tokens() -> None:
    blocks = [make_encoder(4, 2, name=name) for name in "abcd"]
    for number, block in enumerate(blocks):
        block.convolution.weight.data += number
    encoder = FourBlocks(blocks)
    assert (encoder.name, encoder.channels, encoder.stride) == ("a, b, c, d", 8, 4)
    image = torch.randn(2, 3, 8, 12)
    features, token = encoder.with_class_token(image)
    assert torch.equal(features, encoder(image))
    assert torch.equal(features, torch.cat([block(image) for block in blocks], dim=1))
    assert torch.equal(token, torch.cat([block.with_class_token(image)[1] for block in blocks], dim=1))


def test_blocks_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder: expected four with the head dpt, the blocks it sees, got 3"):
        FourBlocks([make_encoder()] * 3)
    with pytest.raises(ValueError, match="encoder: expected four with the same channels, got 6, 6, 6, 5"):
        FourBlocks([make_encoder(), make_encoder(), make_encoder(), make_encoder(channels=5)])
