"""What torch's counter of floating-point operations sees of the operators: what it sees of the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anyup import AnyUp
from anyup.ops import feature_unification, pixel_encoder, query_projection
from anyup.ops.feature_unification import reference as unification_reference
from anyup.ops.pixel_encoder import reference as encoder_reference
from anyup.ops.query_projection import reference as projection_reference
from anyup.ops.window_attention import attend_points, window_attention
from anyup.ops.window_attention import reference as attention_reference
from anyup.window import CellWindow, Part, RatioWindow, Window


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def counted(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Of a call, and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def block(dim: int) -> Any:
    shapes = [(dim,), (dim,), (dim, dim)]
    return pixel_encoder.BlockParameters(*(tensor(*shape) for shape in 2 * shapes))


@pytest.mark.parametrize(("projects", "rotates"), [(True, True), (False, False)])
def test_the_pixel_encoder_counts_as_its_reference(projects: bool, rotates: bool) -> None:
    pixels = tensor(2, 9, 7, 3 if projects else 16)
    parameters = pixel_encoder.EncoderParameters(tensor(16, 3) if projects else None, block(16), block(16))
    settings: Any = {"frequencies": tensor(2, 16) if rotates else None, "output_size": (4, 3)}
    ours = counted(lambda: pixel_encoder.encode_pixels(pixels, parameters, **settings))
    assert ours == counted(lambda: encoder_reference.forward(pixels, parameters, **settings))


def test_the_feature_unification_counts_as_its_reference() -> None:
    features, basis = tensor(2, 5, 6, 4), tensor(8, 1, 3, 3)
    ours = counted(lambda: feature_unification.unify_features(features, basis))
    assert ours == counted(lambda: unification_reference.forward(features, basis))


def test_the_query_projection_counts_as_its_reference() -> None:
    encoded = tensor(2, 9, 7, 16)
    parameters = query_projection.ProjectionParameters(tensor(16, 16, 3, 3), tensor(16), tensor(16, 16), tensor(16))
    ours = counted(lambda: query_projection.project_queries(encoded, parameters))
    assert ours == counted(lambda: projection_reference.forward(encoded, parameters))


@pytest.mark.parametrize("window", [None, RatioWindow(0.1), CellWindow(0.2)])
def test_the_window_attention_counts_as_its_reference_but_the_keys_of_the_windows_alone(window: Window) -> None:
    query, key, value = tensor(2, 12, 9, 4, 8), tensor(2, 6, 5, 4, 8), tensor(2, 6, 5, 7)
    share = attention_reference.window_mask(window, (12, 9), (6, 5)).double().mean().item()
    ours = counted(lambda: window_attention(query, key, value, window=window))
    dense = counted(lambda: attention_reference.forward(query, key, value, window=window, scale=1.0)[0])
    assert ours == tuple(round(share * number) for number in dense)


def test_a_part_of_the_pixels_counts_as_it_does_in_the_whole() -> None:
    query, key, value = (t.detach() for t in (tensor(1, 12, 9, 4, 8), tensor(1, 6, 5, 4, 8), tensor(1, 6, 5, 7)))

    def count(query: Tensor, part: Part | None) -> int:
        with FlopCounterMode(display=False) as counter:
            window_attention(query, key, value, window=RatioWindow(0.1), part=part)
        return counter.get_total_flops()

    parts = [(top, query[:, top : top + 5]) for top in (0, 5, 10)]
    assert sum(count(part, Part(top, 0, 12, 9)) for top, part in parts) == count(query, None)


@pytest.mark.parametrize("window", [None, RatioWindow(0.1), CellWindow(0.2)])
def test_all_pixels_one_by_one_count_as_the_map(window: Window) -> None:
    query, key, value = tensor(1, 12, 9, 4, 8), tensor(1, 6, 5, 4, 8), tensor(1, 6, 5, 7)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(12), torch.arange(9), indexing="ij"))
    each = (query[0].flatten(0, 1), key[0], value[0], rows, columns)
    ours = counted(lambda: attend_points(*each, window=window, size=(12, 9)))
    assert ours == counted(lambda: window_attention(query, key, value, window=window))


def test_a_model_s_cost_is_told_by_module() -> None:
    model = AnyUp(qk_dim=16).requires_grad_(False)
    image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 6, 4, 4)
    with FlopCounterMode(display=False) as counter:
        model(image, features)
    counts = counter.get_flop_counts()
    assert counts["AnyUp.query_encoder"] == {torch.ops.anyup.pixel_encoder: 2 * 16 * 16 * 5 * 16**2}
    assert {torch.ops.anyup.feature_unification, torch.ops.anyup.window_attention} <= set(counts["AnyUp"])


def test_the_formulas_are_there_where_the_counter_is_imported_first() -> None:
    """And where `anyup` is, as in this process."""
    program = """
import torch.utils.flop_counter
import anyup
from torch.utils.flop_counter import flop_registry
print(sum("anyup" in str(operator) for operator in flop_registry))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "11\n", run.stderr
