"""The tool that trains the packaged weights."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")

from anyup.model import AnyUp

STRIDES = {"dinov2_s_derived": 14, "mobilenet_v2:6": 8, "mobilenet_v2:13": 16}


class Mean(nn.Module):
    """An encoder that knows no surroundings: the mean of each patch."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def normalize(self, rgb01: Tensor) -> Tensor:
        return rgb01

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, self.patch)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "train_mini.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return module


def upsampler() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp(qk_dim=64, num_heads=2, kernel_size_lfu=3)


def features() -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)

    def maps(side: int) -> Tensor:
        return torch.randn(2, 10, side, side, generator=generator).half()

    sides = {"l112": 112, "l224": 224, "whole": 448, "quarters": 448}
    guidance = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    return guidance, {n: {key: maps(side // stride) for key, side in sides.items()} for n, stride in STRIDES.items()}


def labelled(tool: ModuleType) -> Any:
    """Four views, left and right of another class each, which the first channel tells; a column between is void."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.zeros(4, 224, 224, dtype=torch.uint8)
    labels[:, :, 112:] = torch.arange(1, 5, dtype=torch.uint8)[:, None, None] % 3
    labels[:, :, 112:128] = tool.VOID
    maps = {}
    for key, side in (("l224", 16), ("whole", 32)):
        cells = labels[:, :: 224 // side, :: 224 // side].float()
        maps[key] = torch.randn(4, 10, side, side, generator=generator).half() / 10
        maps[key][:, 0] = cells.where(cells < tool.VOID, 0)
    guidance = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8, generator=generator)
    return tool.Labelled(guidance, labels, maps)


def test_scores_are_of_a_classifier_that_learned_from_the_other_half(tool: ModuleType) -> None:
    of = labelled(tool)
    assert of.classes == 3 and {key: scores.shape for key, scores in of.scores.items()} == {
        "l224": (4, 3, 16, 16),
        "whole": (4, 3, 32, 32),
    }
    # On the right the first half has classes 1 and 2, the second 0 and 1: the other's classifier knows 1 alone.
    right = of.scores["l224"][:, :, :, 10:].argmax(1)
    assert (right[0] == 1).float().mean() > 0.9 and (right[1] != 2).all()
    assert (of.scores["l224"][:, :, :, :7].argmax(1) == 0).float().mean() > 0.9


def test_its_forward_is_the_upsampler_s(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, low, values = upsampler(), torch.randn(2, 3, 32, 32), torch.randn(2, 5, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(image, low, (16, 16))
        rounded = tool.Forward(model)(image, low, 16)
        assert 0 < (rounded - expected).norm() / expected.norm() < 0.01
        product = tool.product
        monkeypatch.setattr(tool, "product", lambda x, weight, half: product(x, weight, False))
        torch.testing.assert_close(tool.Forward(model)(image, low, 16), expected, rtol=1e-4, atol=1e-5)
        carried = model(image, low, (16, 16), values=values)
        torch.testing.assert_close(tool.Forward(model)(image, low, 16, values), carried, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(f"{name} {ratio}", marks=pytest.mark.slow) for name in STRIDES for ratio in ("2x", "4x")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("place", "labels")),
        "synthetic",
    ],
)
def test_each_kind_of_step_has_a_loss_to_descend(tool: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "SHARES", {kind: 1.0})
    model, samples = upsampler(), tool.Samples(*features(), [labelled(tool)] if kind == "labels" else [])
    name, share = samples.loss(tool.Forward(model), random.Random(0), late=kind.startswith("mobilenet_v2:13"))
    share.backward()
    assert name == kind and 0.1 < share.item() < 10
    gradients = [p.grad for name, p in model.named_parameters() if "out_proj" not in name]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_training_changes_what_has_an_influence_and_leaves_the_filters(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "SHARES", {"mobilenet_v2:13 2x": 1.0})
    model = upsampler()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = tool.train(model, tool.Samples(*features()), 1e6, most_steps=2)
    still = {name for name, tensor in average.items() if torch.equal(tensor, before[name])}
    assert still == {
        "key_features_encoder.0.basis",
        "cross_decode.cross_attn.attention.out_proj.weight",
        "cross_decode.cross_attn.attention.out_proj.bias",
    }
    weight = "cross_decode.cross_attn.attention.in_proj_weight"
    assert torch.equal(average[weight][128:], before[weight][128:])


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_muon_s_steps_are_nearly_orthogonal(tool: ModuleType, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(tool._orthogonal(matrix))
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_descends(tool: ModuleType) -> None:
    torch.manual_seed(0)
    layer, x, truth = nn.Linear(64, 8), torch.randn(32, 64), torch.randn(32, 8)
    optimizer, losses = tool.Muon(layer), []
    for _ in range(60):
        layer.zero_grad()
        loss = (layer(x) - truth).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(1e-2)
    assert losses[-1] < 0.3 * losses[0]


def test_features_of_photographs(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in "ab":
        Image.effect_noise((460, 450), 60).convert("RGB").save(tmp_path / f"{name}.png")
    monkeypatch.setattr(tool, "load_encoder", lambda name: Mean(16))
    guidance, maps = tool.make_features(str(tmp_path), {"one"}, 2)
    assert guidance.shape == (4, 3, 224, 224) and maps["one"]["l112"].shape == (4, 3, 7, 7)
    # A mean knows no surroundings: the quarters are the whole.
    assert torch.equal(maps["one"]["quarters"], maps["one"]["whole"])
    assert maps["one"]["whole"].shape == (4, 3, 28, 28) and maps["one"]["l224"].shape == (4, 3, 14, 14)


def test_labelled_frames(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    for name in "abcd":
        Image.effect_noise((96, 80), 60).convert("RGB").save(tmp_path / "train" / f"{name}.png")
        mask = Image.new("L", (96, 80), 2)
        mask.paste(1, (0, 0, 48, 80))
        mask.save(tmp_path / "trainannot" / f"{name}.png")
    monkeypatch.setattr(tool, "load_encoder", lambda name: Mean(14))
    of = tool.make_labelled(str(tmp_path))
    assert of.guidance.shape == (4, 3, 224, 224) and of.classes == 3
    assert (of.labels[:, :, :112] == 1).all() and (of.labels[:, :, 112:] == 2).all()
    assert of.maps["l224"].shape == (4, 3, 16, 16) and of.maps["whole"].shape == (4, 3, 32, 32)
