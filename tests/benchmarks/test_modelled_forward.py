"""`python -m benchmarks.modelled_gpu --model`: the whole forward, step by step, against what a forward really does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.allocations import Allocations, operators_open
from support.recipe import INTERPRETED, fill, wave

import anyup
from anyup import AnyUp
from anyup.bench.workloads import Workload, square
from anyup.kernels.launch import Launch, Target
from anyup.limited_memory.prediction import _OVERHEAD_ELSEWHERE
from benchmarks.modelled_gpu import model, roofline, training_step
from benchmarks.modelled_gpu.model_steps import ENCODERS, STAGES, Step, noted, pretended_card, steps_of

Row = dict[str, Any]

pytestmark = pytest.mark.usefixtures("as_on_a_card")

SMALL: dict[str, Any] = {"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3}
AMPERE = Target("cuda", 80)

REACHED_MS = {
    ("A100 SXM 80GB", "bfloat16"): 1.41,
    ("H100 SXM", "bfloat16"): 0.54,
    ("H200", "bfloat16"): 0.48,
    ("RTX 4090", "bfloat16"): 2.14,
}
"""The most that the whole forward may take at 448 from 32, C = 384, by device and dtype."""


def described(launch: Launch) -> tuple[Any, ...]:
    """A launch but for the memory that it works in."""
    arguments = {
        name: (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a
        for name, a in launch.arguments.items()
    }
    return launch.kernel.__name__, launch.grid, arguments, dict(launch.constants), dict(launch.options)


@pytest.mark.slow
@INTERPRETED
@pytest.mark.parametrize(("filters", "keys"), [(16, 5), (32, 4 + 1 + 4)], ids=["in steps", "by kernels alone"])
def test_the_steps_are_what_a_real_forward_launches(filters: int, keys: int) -> None:
    workload, arguments = Workload((9, 14), (4, 3), channels=32), {**SMALL, "lfu_dim": filters}
    image, features = wave((1, 3, *workload.size), 3, 0.8), wave((1, 32, *workload.grid), 7)
    upsampler = fill(AnyUp(**arguments, backend="triton"), 0).eval()
    launched: list[tuple[Any, ...]] = []

    def launch(self: Launch, really: Any = Launch.__call__) -> None:
        launched.append(described(self))
        really(self)

    with torch.no_grad(), patch.object(Launch, "__call__", launch):
        upsampler(image, features)
    steps = steps_of(workload, torch.float32, None, arguments=arguments)
    assert [described(step.launch) for step in steps if step.launch is not None] == launched
    assert len(launched) == 5 + 5 + 1 + 2 + keys + 1
    assert {step.stage for step in steps} == set(STAGES)


@INTERPRETED
def test_torch_s_products_and_normalisations_are_those_of_a_real_forward() -> None:
    workload = Workload((6, 7), (4, 3), channels=16)
    image, features = wave((1, 3, *workload.size), 3, 0.8), wave((1, 16, *workload.grid), 7)
    upsampler = fill(AnyUp(**SMALL, backend="triton"), 0).eval()
    with torch.no_grad(), noted("cpu", launches=True) as real:
        upsampler(image, features)
    planned = steps_of(workload, torch.float32, AMPERE, arguments=SMALL)

    def of_keys(steps: Sequence[Step]) -> tuple[int, Counter[str]]:
        own = [step for step in steps if step.stage == "keys"]
        named = ("native_group_norm", "silu", "convolution", "cat", "bmm", "baddbmm_")
        kinds = Counter(step.name for step in own if step.name in named)
        return sum(step.operations for step in own), kinds

    assert of_keys(planned) == of_keys(real)
    # The blocks of the unified features, whose width changes, are torch's; those of the aggregation are kernels. Its
    # convolution of 64 channels is products of two taps each, but the last; a border is joined along each axis.
    products = {"bmm": 1, "baddbmm_": 4}
    assert of_keys(planned)[1] == {"native_group_norm": 4, "silu": 4, "cat": 1 + 2 + 4, **products}


@pytest.mark.parametrize(
    ("dtype", "arch", "maps", "keys"),
    [
        (torch.float32, 80, "float16x3", "tf32x3"),
        (torch.float32, 120, "tf32x3", "tf32x3"),
        (torch.bfloat16, 80, "tf32x3", "tf32x3"),
    ],
)
def test_products_of_large_maps_of_float32_are_of_float16(dtype: torch.dtype, arch: int, maps: str, keys: str) -> None:
    steps = steps_of(Workload((128, 128), (4, 4), channels=16), dtype, Target("cuda", arch))
    found: dict[str, set[str]] = {"maps": set(), "keys": set()}
    for step in steps:
        if step.launch is not None and step.stage in (*ENCODERS, "query projection", "keys"):
            found["keys" if step.stage == "keys" else "maps"].add(step.launch.constants.get("PRECISION", maps))
    assert found == {"maps": {maps}, "keys": {keys}}


def test_a_call_counts_with_what_it_reads_and_writes_and_a_view_does_not() -> None:
    with noted("cpu", launches=True) as steps:
        x = torch.ones(3, 4)
        torch.relu(x.T)
        x.expand(5, 3, 4).sum()
        x @ torch.ones(4, 2)
    told = [(step.name, step.bytes_moved, step.operations) for step in steps if step.name != "ones"]
    assert told == [("relu", 96, 0), ("sum", 52, 0), ("mm", 48 + 32 + 24, 48)]


# The stored table.


@pytest.fixture(scope="module")
def stored() -> list[Row]:
    return json.loads(model.RESULT.read_text())


def part(rows: Sequence[Row], level: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["level"] == level and all(row[name] == v for name, v in wanted.items())]


def test_the_stored_table_is_what_the_forward_and_its_counted_code_give_now(stored: Sequence[Row]) -> None:
    """A launch that is not the stored one would have to be compiled, which fails where kernels are interpreted."""
    counted = model.Executions(stored)
    for device in (roofline.DEVICES[0], roofline.DEVICES[-1]):
        for dtype in ("bfloat16", "float32"):
            now = model.rows(square(448, 32), dtype, [device], counted)
            known = {"device": device.name, "dtype": dtype, "workload": "448 from 32"}
            assert now == [row for row in stored if known.items() <= row.items()]


@pytest.mark.parametrize("device", [device.name for device in roofline.DEVICES])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stages_are_sums_of_their_launches_and_the_forward_of_its_stages(
    dtype: str, device: str, stored: Sequence[Row]
) -> None:
    chosen = {"dtype": dtype, "device": device, "workload": "448 from 32"}
    (whole,) = part(stored, "sum", **chosen)
    stages = part(stored, "stage", **chosen)
    assert [row["stage"] for row in stages] == list(STAGES)
    for name in ("passes", "bytes", "bytes_asked", "operations", "floor_us", "modelled_us"):
        exact = {"abs": 1} if name.endswith("_us") else {"abs": 40}
        assert sum(row[name] for row in stages) == pytest.approx(whole[name], **exact)
        for stage in stages:
            inside = [*part(stored, "launch", stage=stage["stage"], **chosen)]
            inside += part(stored, "torch", stage=stage["stage"], **chosen)
            assert sum(row[name] for row in inside) == pytest.approx(stage[name], **exact)
    assert 0 < whole["floor_us"] < whole["modelled_us"]
    assert whole["host_us"] > 0


def test_every_launch_s_instructions_are_the_compiler_s_but_for_the_small_ones(stored: Sequence[Row]) -> None:
    counted = {row["kernel"] for row in part(stored, "launch") if row["source"] != "code"}
    assert not counted


@pytest.mark.parametrize(("case", "most"), REACHED_MS.items(), ids=lambda value: str(value))
def test_the_modelled_forward_takes_no_more_than_it_did(
    case: tuple[str, str], most: float, stored: Sequence[Row]
) -> None:
    (whole,) = part(stored, "sum", device=case[0], dtype=case[1], workload="448 from 32", channels=384)
    assert whole["modelled_us"] <= 1e3 * most


@pytest.mark.parametrize("device", [device.name for device in roofline.DEVICES])
def test_the_encoders_move_at_most_4_kb_a_pixel_and_ask_for_little_more(device: str, stored: Sequence[Row]) -> None:
    """Asked for without the weights and tables that all programs read, which the caches hold."""
    chosen = {"device": device, "dtype": "bfloat16", "workload": "448 from 32"}
    rows = [r for stage in ENCODERS for r in part(stored, "launch", stage=stage, **chosen)]
    passes = [row for row in rows if row["kernel"] != "pixel_encoder_moments"]
    assert (len(passes), len(rows)) == (9, 10)
    pixels = 448 * 448
    moved = sum(row["bytes"] for row in passes) / pixels
    assert 3072 < moved <= 4096
    assert sum(row["bytes"] for row in rows) / pixels <= 4096
    asked = sum(row["bytes_asked"] - row["bytes_shared"] for row in rows) / pixels
    assert moved < asked <= 1.3 * moved


@pytest.mark.parametrize("text", ["448", "448 from 0", "a from b", "448 from 32 from 7"])
def test_a_workload_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="workload: expected sizes such as"):
        model.workload_of(text, 384)


# Memory.


def peak_of(workload: Workload, dtype: torch.dtype, output: tuple[int, int] | None = None, **arguments: Any) -> int:
    """The most bytes alive at a time in a forward whose launches allocate nothing, inputs and weights left out."""
    with torch.device("meta"):
        upsampler = AnyUp(**arguments, backend="triton").to(dtype).eval()
        image = torch.empty(workload.batch, 3, *workload.size, dtype=dtype)
        features = torch.empty(workload.batch, workload.channels, *workload.grid, dtype=dtype)
    allocations = Allocations()
    allocations.ignore(image, features, *upsampler.parameters())
    patches = pytest.MonkeyPatch()
    patches.setattr(Launch, "__call__", lambda self: None)
    with patches.context() as patched, torch.no_grad(), pretended_card(AMPERE), operators_open(patched), allocations:
        upsampler(image, features, output)
    patches.undo()
    return allocations.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [16, 64, 384, 1024])
def test_no_more_than_3_maps_or_the_output_and_one_and_a_half_are_alive(channels: int, dtype: torch.dtype) -> None:
    """At 1024 x 1024: nothing is computed on the meta device."""
    workload = square(1024, 64, channels=channels)
    map_bytes, output = workload.pixels * 128 * dtype.itemsize, workload.pixels * channels * dtype.itemsize
    peak = peak_of(workload, dtype)
    # Beside the encoded image, those of the key and the query encoder, and what small tensors take.
    assert max(2 * map_bytes, output) < peak <= max(3.01 * map_bytes, output + 1.5 * map_bytes)


@pytest.mark.parametrize("output", [None, (1200, 900), (3000, 2500)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_has_room_for_the_maps_of_two_encoders_at_once(batch: int, output: tuple[int, int] | None) -> None:
    workload = Workload((2048, 1600), (128, 100), channels=16, batch=batch)
    peak = peak_of(workload, torch.bfloat16, output)
    plan = anyup.plan(workload.size, workload.grid, 16, torch.bfloat16, "cuda", output_size=output, batch=batch)
    (image,) = (stage.peak_bytes - _OVERHEAD_ELSEWHERE for stage in plan.stages if stage.name == "image")
    assert plan.order == "whole" and peak <= image <= 1.6 * peak


def test_a_training_step_keeps_both_results_and_five_maps() -> None:
    """And in its backward pass has the encoders' maps: what docs/training.md says of memory."""
    objective, batch = training_step.published_step(torch.bfloat16)
    one_map = training_step.BATCH * training_step.GUIDANCE**2 * 128 * 2
    result = one_map * training_step.CHANNELS // 128
    allocations = Allocations()
    allocations.ignore(*objective.parameters(), *batch.tensors().values())
    patches = pytest.MonkeyPatch()
    patches.setattr(Launch, "__call__", lambda self: None)
    with patches.context() as patched, pretended_card(AMPERE), operators_open(patched), allocations:
        loss = objective(batch, training_step.BATCH, training_step.BATCH)["loss"]
        kept, forward = allocations.live, allocations.peak
        loss.backward()
    patches.undo()
    # The augmented and the clean result; encoded guidance and queries of all images, projected ones of the augmented.
    maps = 2 * result + 5 * one_map
    assert maps < kept <= 1.06 * maps and forward <= 1.06 * (maps + one_map)  # the clean half's projected queries
    assert kept < allocations.peak <= 1.35 * maps


def test_a_training_step_is_mostly_kernels_of_ours() -> None:
    steps = training_step.steps_of(torch.bfloat16, Target("cuda", 90), multiprocessors=132)
    launched = Counter(step.stage for step in steps if step.launch is not None)
    assert launched.keys() == {
        *(stage.replace("_", " ") for stage in training_step.DIFFERENTIABLE),
        *(f"{stage.replace('_', ' ')}, back" for stage in training_step.DIFFERENTIABLE),
    }
    assert launched.total() <= 181, launched  # what has been reached
    torch_s = Counter(step.stage for step in steps if step.launch is None)
    assert torch_s.total() <= 241, torch_s
    # No loss is written in operations on maps: these join and add gradients of maps, and pool queries.
    assert sum(step.bytes_moved for step in steps if step.stage == training_step.OUTSIDE) < 1.1e9
    table = training_step.table([{**dict.fromkeys(("device", "dtype", "stage", "launches", "torch_kernels"), "x"),
                                  "bytes": 2e9, "floor_us": 1000.0, "modelled_us": 2500.0}])  # fmt: skip
    assert "| 2.00 | 1.00 | 2.50 |" in table
