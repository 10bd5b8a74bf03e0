"""The tool that gives trained weights waves of place as fine as a cell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("PIL")

from anyup.model import AnyUp
from anyup.training.samples import Batch


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "add_place_channels.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(cells: int = 12, side: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(cells)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    targets = normal(1, 1, 6, side, side)
    places = torch.zeros(1, 1, 2, dtype=torch.long)
    empty = torch.empty(1, 0, side, side)
    return Batch(normal(1, 3, 48, 48), empty, normal(1, 6, cells, cells), targets, places, empty, side)


def upsampler() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp(qk_dim=64, num_heads=2, lfu_dim=8, kernel_size_lfu=3).eval()


def test_what_is_measured_is_the_upsampler(tool: ModuleType) -> None:
    model, sample = upsampler(), batch()
    with torch.no_grad():
        measured = tool.forward(model, sample, lambda name, x: x)
        torch.testing.assert_close(measured, model(sample.guidance, sample.low, sample.side), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [12, 24])
def test_with_strong_waves_a_pixel_looks_at_its_own_cell_most(tool: ModuleType, cells: int) -> None:
    side = 2 * cells
    sample = batch(cells, side)
    one_hot = torch.eye(cells * cells).view(1, -1, cells, cells)
    own = torch.arange(side) // 2
    own = own[:, None] * cells + own

    def at_own_cell(model: AnyUp) -> float:
        with torch.no_grad():
            carried = model(sample.guidance, sample.low, (side, side), values=one_hot)
        return float((carried[0].argmax(0) == own).float().mean())

    model = upsampler()
    before = at_own_cell(model)
    tool.add_place_channels(model, [batch(), sample], 6.0)
    assert before < 0.2 and at_own_cell(model) > 0.7


def test_with_weak_waves_the_result_is_about_what_it_was(tool: ModuleType) -> None:
    model, sample = upsampler(), batch()
    with torch.no_grad():
        before = model(sample.guidance, sample.low, (24, 24))
        tool.add_place_channels(model, [sample], 0.01)
        after = model(sample.guidance, sample.low, (24, 24))
    bilinear = torch.nn.functional.interpolate(sample.low, (24, 24), mode="bilinear")
    assert (after - before).norm() < 0.2 * (bilinear - before).norm()


def test_no_strength_and_narrow_heads_are_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="above 0"):
        tool.add_place_channels(upsampler(), [batch()], 0.0)
    narrow = AnyUp(qk_dim=32, num_heads=4, lfu_dim=8, kernel_size_lfu=3)
    with pytest.raises(ValueError, match="more than 8"):
        tool.add_place_channels(narrow, [batch()], 1.0)
