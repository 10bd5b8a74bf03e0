"""The statistics that the pixel encoder's kernels take of many pixels, against float64."""

from __future__ import annotations

from typing import Any

import torch


def assert_statistics_lose_nothing(count: int, dim: int, batch: int, offset: float, device: str = "cpu") -> None:
    """Raise an AssertionError unless five programs' statistics give the normalisation of float64."""
    from anyup.kernels.pixel_encoder_config import EncoderConfig
    from anyup.kernels.pixel_encoder_passes import (
        HalfBlock,
        Join,
        allocate_norms,
        allocate_parts,
        map_source,
        plan_pass,
    )

    values = torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(0)) * 0.1 + offset
    weight, bias = torch.full((dim,), 2.0), torch.full((dim,), 0.5)
    source, programs = map_source(values.to(device)), 5
    parts, nobody_s = (allocate_parts(batch, programs, source.pixels.device) for _ in range(2))
    norms = allocate_norms(batch, 2, dim, torch.float32, source.pixels.device)
    join = Join(parts, weight.to(device), bias.to(device), 1e-5)
    known: dict[str, Any] = {"out": None, "size": (1, count), "form": "plain", "precision": "ieee"}
    config = EncoderConfig(128, num_warps=4, piece=32)
    plan_pass(source, (), parts=parts, programs=programs, config=config, **known)()
    half = HalfBlock(join, torch.eye(dim, device=device))
    plan_pass(source, (half,), norms=norms, parts=nobody_s, programs=2, config=config, **known)()
    assert torch.equal(norms[0], norms[1])  # each program makes it for itself
    scale, shift, center = norms[0].cpu().double()[:, :, None].unbind(1)
    wide = values.double().transpose(1, 2)
    exact = torch.nn.functional.group_norm(wide, 8, weight.double(), bias.double()).transpose(1, 2)
    found = (values.double() - center) * scale + shift
    # A program's mean is rounded to float32.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 + offset * 1e-6)
