"""Each kernel launched directly, with the configs that ship and with odd ones, against the reference in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from passes import (
    Configs,
    channels_first,
    device_tensors,
    reference_passes,
    run_forward_of_part,
    run_passes,
    shipped_configs,
    with_gaps,
)
from support.accuracy import assert_close_enough
from support.card import DTYPES, in_dtypes, under_ttsem
from support.recipe import AttentionShape, parts_of
from torch import Tensor

from anyup.kernels.window_attention_config import BackwardGridConfig, BackwardQueryConfig, ForwardConfig
from anyup.ops.window_attention import reference
from anyup.window import CellWindow, Part, RatioWindow, Window

pytestmark = pytest.mark.gpu


# Small, because ttsem executes each program in Python; no side is a multiple of any tile's.
SHAPES = {
    "partial tiles": AttentionShape((11, 18), (4, 5), channels=37, batch=2, head_dim=16),
    "many keys": AttentionShape((3, 9), (17, 16), channels=21, window=None, head_dim=16),
    "cell window, one channel": AttentionShape(
        (17, 10), (7, 5), channels=1, window=CellWindow(0.1), heads=1, head_dim=32
    ),
    "one key": AttentionShape((9, 19), (1, 1), channels=19, head_dim=16),
    "one pixel": AttentionShape((1, 1), (6, 5), channels=65, window=RatioWindow(0.3), head_dim=16),
    "keys finer than pixels": AttentionShape((5, 4), (13, 11), channels=7, head_dim=16),
    "three heads": AttentionShape((5, 9), (3, 4), channels=16, heads=3, head_dim=32),
    "one wide head": AttentionShape((3, 9), (2, 3), channels=16, heads=1, head_dim=128),
}
LAYOUTS = {"partial tiles": channels_first, "many keys": with_gaps, "one pixel": channels_first}

ODD_CONFIGS = {
    "rows of pixels, keys in columns": Configs(
        ForwardConfig(1, 16, 16, 0, 16, 3, num_warps=4, num_stages=1, row_partials=1, load_once=False, piece=16),
        BackwardQueryConfig(1, 16, 16, 0, 16, num_warps=4, num_stages=1),
        BackwardGridConfig(16, 1, 16, 16, 2, 2, num_warps=4, num_stages=1),
    ),
    "tall tiles, more blocks than keys": Configs(
        ForwardConfig(16, 2, 16, 3, 32, 1, num_warps=4, num_stages=1, row_partials=2),
        BackwardQueryConfig(16, 2, 32, 2, 32, num_warps=4, num_stages=1, tail_keys=16, waiting_blocks=1),
        BackwardGridConfig(2, 8, 32, 16, 1, 1, num_warps=4, num_stages=1, tall=True, refetch=True),
    ),
    "weights in memory": Configs(
        ForwardConfig(4, 4, 16, 0, 16, 2, num_warps=4, num_stages=2, kept_programs=1),
        BackwardQueryConfig(4, 4, 16, 0, 16, num_warps=4, num_stages=1),
        BackwardGridConfig(4, 4, 16, 16, 2, 1, num_warps=4, num_stages=1),
    ),
    "one tile for everything": Configs(
        ForwardConfig(8, 16, 64, 1, 128, 1, num_warps=8, num_stages=1),
        BackwardQueryConfig(8, 16, 64, 1, 64, num_warps=8, num_stages=1),
        BackwardGridConfig(8, 8, 128, 64, 2, 2, num_warps=8, num_stages=1),
    ),
}


def assert_accurate(tensors: dict[str, Tensor], window: Window, configs: Configs) -> None:
    actual = run_passes(**tensors, window=window, configs=configs)
    narrow = {name: tensor.cpu() for name, tensor in tensors.items()}
    expected = reference_passes(**narrow, window=window)
    exact = reference_passes(**{name: tensor.double() for name, tensor in narrow.items()}, window=window)
    for name in exact:
        assert_close_enough(actual[name].cpu(), expected[name], exact[name], f"{name}, {configs}")


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(SHAPES))
def test_shipped_configs_obey_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    """Every config in every dtype for the first shape; for each other shape one in each dtype, by turns."""
    shape = SHAPES[name]
    layout = LAYOUTS.get(name, Tensor.contiguous)
    tensors = {key: layout(tensor) for key, tensor in device_tensors(shape, dtype, dtype).items()}
    chosen = shipped_configs(shape, half=dtype != torch.float32)
    turn = [*SHAPES].index(name) + DTYPES.index(dtype)
    if name != "partial tiles":
        chosen = [chosen[turn % len(chosen)]]
    for configs in chosen:
        assert_accurate(tensors, shape.window, configs)
    assert launched.total() == 5 * len(chosen)


KEPT = "weights in memory"


# No other test launches the kernel that keeps weights: it has all dtypes under ttsem, too.
@pytest.mark.parametrize(
    ("config", "dtype"), [*in_dtypes([name for name in ODD_CONFIGS if name != KEPT]), *in_dtypes([KEPT])]
)
def test_a_config_changes_speed_alone(config: str, dtype: torch.dtype) -> None:
    shape = SHAPES["partial tiles"]._replace(output=(7, 13), window=RatioWindow(0.2), batch=1)
    assert_accurate(device_tensors(shape, dtype, dtype), shape.window, ODD_CONFIGS[config])


@pytest.mark.parametrize(
    ("name", "dtype"), in_dtypes(("partial tiles", "cell window, one channel", "keys finer than pixels"))
)
def test_a_part_of_an_output_obeys_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    """Its queries are a rectangle of a larger map, as a stream's are: next to them in memory lie others."""
    shape = SHAPES[name]
    tensors = device_tensors(shape, dtype, dtype)
    tensors.pop("grad")
    rows, columns = parts_of(shape.output)[2]
    part = Part(rows.start, columns.start, *shape.output)
    query = tensors.pop("query")[:, rows, columns]
    narrow = {name: tensor.cpu() for name, tensor in (("query", query), *tensors.items())}
    settings: dict[str, Any] = {"window": shape.window, "scale": query.shape[4] ** -0.5, "save_lse": True, "part": part}
    expected, exact = (
        reference.forward(**{name: tensor.to(wide) for name, tensor in narrow.items()}, **settings)
        for wide in (dtype, torch.float64)
    )
    all_configs = [configs.forward for configs in shipped_configs(shape, half=dtype != torch.float32)]
    for config in all_configs:
        actual = run_forward_of_part(query, **tensors, window=shape.window, part=part, config=config)
        for name, *others in zip(actual, expected, exact, strict=True):
            assert_close_enough(actual[name].cpu(), *others, f"{name}, {config}")
    assert launched.total() == len(all_configs)


MIXED = [(True, torch.float16), (False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)]


@pytest.mark.parametrize(("queries_are_half", "half"), MIXED[:2] if under_ttsem() else MIXED)
def test_mixed_dtypes_obey_the_error_rule(queries_are_half: bool, half: torch.dtype) -> None:
    shape = SHAPES["partial tiles"]
    dtypes = (half, torch.float32) if queries_are_half else (torch.float32, half)
    assert_accurate(device_tensors(shape, *dtypes), shape.window, shipped_configs(shape, half=False)[0])
