"""Maps that are known at every pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anyup.training.losses import squared_error
from anyup.training.position_targets import FIELDS, position_maps


def fields(side: int = 32) -> torch.Tensor:
    return torch.stack([position_maps(torch.zeros(3, 8, 8), 16, side, number)[3:] for number in range(16)])


def test_known_maps_are_the_colours_and_fields_of_the_key_alone() -> None:
    guidance = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    maps = position_maps(guidance, 6, 24, 1, 2)
    assert maps.shape == (3 + FIELDS, 24, 24)
    torch.testing.assert_close(maps[:3], guidance)
    assert torch.equal(maps, position_maps(guidance, 6, 24, 1, 2))
    assert not torch.equal(maps[3:], position_maps(guidance, 6, 24, 1, 3)[3:])


def test_weights_beside_the_pixel_or_too_wide_cost_more_than_interpolation() -> None:
    known = fields()
    low = F.adaptive_avg_pool2d(known, 16)
    blurred = F.avg_pool2d(F.pad(low, (1, 1, 1, 1), mode="replicate"), 3, 1)
    errors = {
        "bilinear": squared_error(F.interpolate(low, (32, 32), mode="bilinear"), known),
        "nearest": squared_error(F.interpolate(low, (32, 32), mode="nearest"), known),
        "a cell beside": squared_error(F.interpolate(low.roll(1, 3), (32, 32), mode="bilinear"), known),
        "wide": squared_error(F.interpolate(blurred, (32, 32), mode="bilinear"), known),
    }
    shares = {name: float(error.mean() / known.var()) for name, error in errors.items()}
    assert shares["bilinear"] == pytest.approx(0.09, abs=0.02)
    assert shares["nearest"] == pytest.approx(0.13, abs=0.02)
    assert shares["wide"] == pytest.approx(0.44, abs=0.05)
    assert shares["a cell beside"] > 0.5


def test_the_error_of_a_map_is_its_mean_square_and_none_of_itself() -> None:
    known = fields()
    assert squared_error(known, known).tolist() == [0.0] * 16
    torch.testing.assert_close(squared_error(known + 0.5, known), torch.full((16,), 0.25))
