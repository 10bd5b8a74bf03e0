"""What only a real card can show: numbers at a realistic size, memory, determinism, capture; `pytest -m gpu`.

What is measured is stored as JSON under the card's name (see `conftest.py`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import card
from support.accuracy import assert_close_enough, output_and_gradients
from support.card import no_card, rehearsed
from support.recipe import AttentionShape, attention_tensors, fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.kernels.window_attention_config import backward_grid_configs, backward_key_value_configs
from anyup.limited_memory import choice, prediction
from anyup.limited_memory.plans import Bands
from anyup.ops import explain_backends, window_attention
from anyup.ops.kernel_device import target
from anyup.training import pass_graphs
from anyup.training.config import Loss
from anyup.training.objective import Objective
from anyup.training.samples import Batch
from anyup.window import RatioWindow

pytestmark = pytest.mark.gpu


# 448 x 448 from 32 x 32, ViT-S features; where a card is pretended as much as can be waited for.
SIDE, GRID, CHANNELS = (8, 4, 16) if rehearsed else (448, 32, 384)
HEADS, HEAD_DIM = (1, 16) if rehearsed else (4, 32)
DTYPES = card.DTYPES[-1:] if rehearsed else card.DTYPES  # each dtype's kernels have their own tests
REPEATS = 1 if rehearsed else 4  # nothing is recorded where no card is
REAL = AttentionShape((SIDE, SIDE), (GRID, GRID), channels=CHANNELS, heads=HEADS, head_dim=HEAD_DIM)


@pytest.fixture(autouse=True)
def _card_or_skip(launched: Any) -> None:
    reason = no_card()
    if reason is not None:
        pytest.skip(f"needs a real card: {reason}")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whoever waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def run_without_waiting(call: Callable[[], object]) -> None:
    """The call may wait once, to compile and to load kernels and tables, and not again."""
    if not rehearsed:
        call()
    with no_waiting():
        call()


def attention(shape: AttentionShape) -> Callable[..., Tensor]:
    """The operator in the layout of the model's output, as the error rule calls it."""

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query, key, value, window=shape.window, backend=backend).permute(0, 3, 1, 2)

    return run


def on_card(shape: AttentionShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in attention_tensors(shape, seed, dtype).items()}


def model(dtype: torch.dtype = torch.float32, backend: str | None = None) -> AnyUp:
    widths = {"qk_dim": HEAD_DIM, "lfu_dim": 16, "num_heads": HEADS} if rehearsed else {}
    return fill(AnyUp(**widths, backend=backend), 0).cuda().to(dtype).eval()


def model_inputs(dtype: torch.dtype = torch.float32, phase: int = 3) -> tuple[Tensor, Tensor]:
    image, features = wave((1, 3, SIDE, SIDE), phase, 0.8), wave((1, CHANNELS, GRID, GRID), phase + 4)
    return image.cuda().to(dtype), features.cuda().to(dtype)


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of device memory that a call asks for beyond what is held before it, and its result.

    The allocator counts as allocated what a tensor was given: whole blocks, of which it leaves up to a mebibyte unused.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result


def assert_within(least: int, peak: int, most: int) -> None:
    """Of a peak that a card has counted."""
    assert rehearsed or least <= peak <= most, (least, peak, most)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_448_obeys_the_error_rule(dtype: torch.dtype, measured: dict[str, Any]) -> None:
    """Measured with the `torch` backend, in float64 too: the reference would need tens of gigabytes."""
    tensors = on_card(REAL, dtype)
    actual = output_and_gradients(attention(REAL), tensors, "triton")
    narrow = output_and_gradients(attention(REAL), tensors, "torch")
    exact = output_and_gradients(attention(REAL), {name: t.double() for name, t in tensors.items()}, "torch")
    measured["relative errors"] = {name: relative_error(actual[name], exact[name]) for name in exact}
    for name in exact:
        assert_close_enough(actual[name], narrow[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_112_obeys_the_error_rule_by_the_reference(dtype: torch.dtype) -> None:
    shape = REAL if rehearsed else REAL._replace(output=(112, 112), grid=(16, 16))
    tensors = on_card(shape, dtype)
    actual = output_and_gradients(attention(shape), tensors, "triton")
    narrow = output_and_gradients(attention(shape), tensors, "reference")
    exact = output_and_gradients(attention(shape), {name: t.double() for name, t in tensors.items()}, "reference")
    for name in exact:
        assert_close_enough(actual[name], narrow[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_pass_allocates_its_output_alone(dtype: torch.dtype, measured: dict[str, Any]) -> None:
    tensors = on_card(REAL, dtype)

    def run() -> Tensor:
        return window_attention(**tensors, window=REAL.window, backend="triton")

    run()  # the first call compiles
    peak, out = peak_of(run)
    measured.update(peak_bytes=peak, output_bytes=bytes_of(out))
    assert_within(bytes_of(out), peak, bytes_of(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_gradients_the_forward_pass_keeps_a_number_for_each_pixel_and_head_besides(dtype: torch.dtype) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in on_card(REAL, dtype).items()}

    def run() -> Tensor:
        return window_attention(**tensors, window=REAL.window, backend="triton")

    run()
    peak, out = peak_of(run)
    statistics = 4 * tensors["query"].shape[:4].numel()
    assert_within(bytes_of(out) + statistics, peak, bytes_of(out) + statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_allocates_gradients_two_statistics_and_the_partials(
    dtype: torch.dtype, measured: dict[str, Any]
) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in on_card(REAL, dtype).items()}
    leaves = list(tensors.values())
    out = window_attention(**tensors, window=REAL.window, backend="triton")
    grad = torch.randn_like(out)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    run()
    peak, gradients = peak_of(run)
    pixels, keys = (tensors[name].shape[1:3].numel() for name in ("query", "key"))
    known: dict[str, Any] = {"target": target(out.device), "half": dtype != torch.float32}
    known |= {"heads": REAL.heads, "head_dim": REAL.head_dim}
    both = backward_key_value_configs(pixels, keys, REAL.channels, **known)
    partials = (both or backward_grid_configs(pixels, keys, REAL.channels, **known))[0].partials
    # Of keys and values at once, or one after the other.
    numbers = (sum if both else max)(tensors[name].numel() for name in ("key", "value"))
    # The sum of the partials is made in float32, before it becomes the gradient.
    of_partials = 4 * (partials + 1) * numbers if partials > 1 else 0
    allowed = bytes_of(*gradients) + 2 * 4 * tensors["query"].shape[:4].numel() + of_partials
    measured.update(peak_bytes=peak, allowed_bytes=allowed, partials=partials)
    assert_within(bytes_of(*gradients), peak, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bit_equal_from_run_to_run(dtype: torch.dtype) -> None:
    tensors = on_card(REAL, dtype)
    first, second = (output_and_gradients(attention(REAL), tensors, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_neither_pass_waits_for_the_device() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in on_card(REAL).items()}
    grad = torch.randn(1, *REAL.output, REAL.channels, device="cuda")

    def run() -> tuple[Tensor, ...]:
        out = window_attention(**tensors, window=REAL.window, backend="triton")
        return torch.autograd.grad(out, list(tensors.values()), grad)

    run_without_waiting(run)


def test_the_upsampler_does_not_wait_for_the_device() -> None:
    upsampler, inputs = model(), model_inputs()
    with torch.inference_mode():
        run_without_waiting(lambda: upsampler(*inputs))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_a_training_step_does_not_wait_for_the_device(backend: str | None) -> None:
    upsampler, (image, features) = model(backend=backend), model_inputs()
    leaves = [features.requires_grad_(), *upsampler.parameters()]

    def step() -> None:
        out = upsampler(image, features)
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    run_without_waiting(step)


def test_the_passes_of_a_training_step_are_a_graph_that_is_replayed_on_another_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pass_graphs, "_TIMES", 1)
    objective = Objective(model().train(), Loss(self_consistency=0.1 * (not rehearsed))).cuda()

    objective.upsampler.cross_decode.cross_attn.attention.out_proj.requires_grad_(False)

    def passes(batch: Batch, images: float, augmented: float) -> tuple[Tensor, list[Tensor | None]]:
        objective.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = objective(batch, images, augmented)["loss"]
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in objective.parameters() if parameter.requires_grad]

    graphs = pass_graphs.PassGraphs(passes, torch.device("cuda"))
    for phase in range(1 if rehearsed else 2):  # a pass has a hundred launches
        batch = training_batch(phase)
        expected, gradients = passes(batch.to(torch.device("cuda")), 2, 2)
        expected_gradients = [gradient.double() for gradient in gradients if gradient is not None]
        with nullcontext() if phase == 0 else no_waiting():
            found, replayed = graphs(batch, 2, 2)
        assert relative_error(found, expected.double()) < 1e-2
        for own, gradient in zip(replayed, expected_gradients, strict=True):
            assert own is not None and relative_error(own, gradient) < 5e-2


def training_batch(phase: int) -> Batch:
    """Two images and their features, pinned where a card is, with two windows each."""
    side, crop = GRID * 2, GRID
    batch = Batch(
        *wave((2, 2, 3, SIDE // 2, SIDE // 2), phase, 0.8),
        wave((2, CHANNELS, GRID, GRID), phase + 4),
        wave((2, 2, CHANNELS, crop, crop), phase + 5),
        torch.tensor([[[0, 0], [1, phase]], [[2, 1], [phase, crop]]]),
        torch.empty(2, 0, side, side),
        side,
    )
    return batch if rehearsed else batch.pinned()


def test_bands_and_a_context_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SIDE if rehearsed else SIDE // 2
    bands = Bands(rows, rows - 2)
    monkeypatch.setattr(choice, "choose", lambda task, limit, **_: prediction.banded(task, bands, limit))
    upsampler, (image, features) = model(), model_inputs()

    def run() -> None:
        upsampler(image, features)
        upsampler(upsampler.encode_image(image), features)

    with torch.inference_mode():
        run_without_waiting(run)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call captured in a graph, after calls on a stream of its own as capture wants them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_both_passes_of_the_attention_are_captured_in_a_graph_and_replayed_on_other_numbers() -> None:
    tensors, others = on_card(REAL, torch.bfloat16), on_card(REAL, torch.bfloat16, seed=1)
    grad = torch.randn(1, *REAL.output, REAL.channels, device="cuda").bfloat16()
    settings = (*("ratio", 0.1), 32**-0.5, "triton")

    def run() -> tuple[Tensor, ...]:
        out, lse = torch.ops.anyup.window_attention(*tensors.values(), *settings, 0, True)
        return out, *torch.ops.anyup.window_attention_backward(grad, *tensors.values(), lse, *settings)

    graph, results = captured(run)
    for name, tensor in tensors.items():
        tensor.copy_(others[name])
    graph.replay()
    replayed = [result.clone() for result in results]
    for actual, expected in zip(replayed, run(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][rehearsed:])
def test_the_upsampler_is_captured_in_a_graph_and_replayed_on_another_image(dtype: torch.dtype) -> None:
    upsampler, inputs, others = model(dtype), model_inputs(dtype), model_inputs(dtype, phase=13)
    with torch.inference_mode():
        graph, out = captured(lambda: upsampler(*inputs))
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
        graph.replay()
        replayed = out.clone()
        expected = upsampler(*others)
    # A library may choose another algorithm outside a graph.
    assert relative_error(replayed, expected.double()) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("with_context", [False, True])
def test_a_captured_call_returns_what_the_call_returns(with_context: bool, measured: dict[str, Any]) -> None:
    dtype = torch.bfloat16
    upsampler = model(dtype)

    def given(phase: int) -> tuple[Any, Tensor]:
        image, features = model_inputs(dtype, phase)
        return (upsampler.encode_image(image, grids=[(GRID, GRID)]) if with_context else image), features

    with torch.inference_mode():
        upsample = upsampler.capture(*given(3))
        measured["nbytes"] = upsample.nbytes
        others = given(13)
        with no_waiting():
            found = upsample(*others)
        assert relative_error(found, upsampler(*others).double()) < 16 * torch.finfo(dtype).eps
        for parameter in upsampler.parameters():
            parameter.mul_(0.9)
        if not with_context:
            assert relative_error(upsample(*others), upsampler(*others).double()) < 16 * torch.finfo(dtype).eps


def test_a_repeated_call_takes_no_more_memory(measured: dict[str, Any]) -> None:
    """But for what is small, which lies in one allocation."""
    upsampler, inputs = model(torch.bfloat16), model_inputs(torch.bfloat16)
    with torch.inference_mode():
        upsampler(*inputs)
        full, _ = peak_of(lambda: upsampler(*inputs))
        upsampler(*inputs)
        repeated, _ = peak_of(lambda: upsampler(*inputs))
    measured.update(peak_bytes=full, repeated_bytes=repeated)
    assert_within(0, repeated, full + 2**25)


def test_a_call_is_repeated_with_the_same_bits() -> None:
    upsampler, inputs, others = model(torch.bfloat16), model_inputs(torch.bfloat16), model_inputs(torch.bfloat16, 13)
    with torch.inference_mode():
        expected = upsampler(*others)
        for _ in range(REPEATS):
            upsampler(*inputs)
        with no_waiting():
            found = upsampler(*others)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = upsampler(*others)
        torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, expected) and torch.equal(beside, expected)


def test_a_compiled_upsampler_runs_in_graphs() -> None:
    upsampler, inputs = model(torch.bfloat16), model_inputs(torch.bfloat16)
    compiled = upsampler if rehearsed else torch.compile(upsampler, mode="reduce-overhead")
    with torch.inference_mode():
        expected = upsampler(*inputs)
        for _ in range(REPEATS):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(*inputs).clone()
    assert relative_error(found, expected.double()) < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_upsampler_chooses_the_kernels_and_stays_near_float64(
    dtype: torch.dtype, launched: Any, measured: dict[str, Any]
) -> None:
    image, features = model_inputs()
    upsampler = model(dtype)
    with torch.inference_mode():
        chosen = upsampler.explain(image.to(dtype), features.to(dtype)).chosen
        assert set(chosen.values()) == {"triton"}, chosen
        peak, out = peak_of(lambda: upsampler(image.to(dtype), features.to(dtype)))
        names = Counter(name.split(",")[0].split()[0] for name in launched.elements())
        assert names["forward"] == names["feature_unification_forward"] == names["query_projection_forward"] == 1, names
        exact = model(torch.float64)(image.double(), features.double())
    error = relative_error(out, exact)
    measured.update(relative_error=error, peak_bytes=peak)
    assert error < {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]


def test_a_problem_that_the_kernels_do_not_take_is_warned_about_once() -> None:
    from anyup.ops.window_attention.operator import OPERATION

    tensors = on_card(AttentionShape((16, 16), (4, 4), head_dim=24))
    OPERATION._warned_of_slow_path = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            window_attention(**tensors, window=RatioWindow(0.1), max_queries=None)
    chosen = explain_backends(**tensors, window=RatioWindow(0.1)).chosen
    slow = [str(w.message) for w in caught if "slow backend" in str(w.message)]
    assert len(slow) == (chosen == "torch"), (chosen, slow)


def test_a_tuned_config_is_what_the_next_call_is_launched_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.bench.attention_passes import AttentionPasses
    from anyup.bench.clock import CudaClock
    from anyup.bench.workloads import Workload, square
    from anyup.kernels import config_tables
    from anyup.kernels.launch import Launch
    from anyup.tuning.tune import tune

    place = torch.device("cuda", torch.cuda.current_device())
    workload = Workload(REAL.output, REAL.grid, CHANNELS) if rehearsed else square(224, 16)
    name = torch.cuda.get_device_name(place)
    monkeypatch.setenv(config_tables.VARIABLE, str(tmp_path))
    config_tables.in_force.cache_clear()
    try:
        (found,) = tune(
            place, name, tmp_path / config_tables.file_name(name), CudaClock(place, budget=0.02),
            workloads=[workload], dtypes=["bfloat16"], kernels=["forward"], quick=True,
        )  # fmt: skip
        assert found.best is not None and found.gain >= 1
        assert not [outcome for outcome in found.outcomes if outcome.reason.startswith("wrong")]
        configs: list[Any] = []
        call = Launch.__call__

        def recorded(self: Launch) -> None:
            configs.append({**self.constants, **self.options})
            call(self)

        monkeypatch.setattr(Launch, "__call__", recorded)
        passes = AttentionPasses(workload, torch.bfloat16, place)
        window_attention(passes.query, passes.key, passes.value, window=passes.window, backend="triton")
        expected = passes.launch("forward", found.best.config)
        assert configs == [{**expected.constants, **expected.options}]
    finally:
        config_tables.in_force.cache_clear()


def test_a_stream_fills_the_host_s_memory_while_the_card_goes_on() -> None:
    """By way of pinned buffers, each handed on when its event has happened."""
    upsampler, (image, features) = model(), model_inputs()
    rows = SIDE // (2 if rehearsed else 4)
    with torch.inference_mode():
        expected = upsampler(image, features).cpu()
        tensor = torch.full_like(expected, float("nan"))
        array = np.full(tuple(expected.shape), np.nan, dtype=np.float32)
        for out in (tensor, array):
            for _ in upsampler.stream(image, features, tile=(rows, SIDE), out=out):
                pass
    for found in (tensor, torch.from_numpy(array)):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"][rehearsed:])
def test_the_benchmark_s_contenders_agree_and_have_times_and_memory(
    dtype: str, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyup.bench import cases, suite
    from anyup.bench.clock import CudaClock
    from anyup.bench.engine import Engine, Speeds
    from anyup.bench.implementations import Builder
    from anyup.bench.workloads import Workload, square

    small = square(224, 16)
    comparison = next(
        c
        for c in suite.comparisons("cuda")
        if c.kind == "calls" and (c.sizes.workload, c.sizes.dtype) == (small, dtype) and c.group in ("model", "dtype")
    )
    if rehearsed:
        sizes = replace(comparison.sizes, workload=Workload((8, 8), REAL.grid, CHANNELS))
        comparison = replace(comparison, sizes=sizes)
        # The kernels have been launched by the tests above.
        monkeypatch.setattr(cases, "model", lambda dtype="float32", *_, **__: model(cases.DTYPES[dtype], "torch"))
    clock = CudaClock(torch.device("cuda")).once
    speeds = Speeds(dict.fromkeys(cases.DTYPES, 1e13), 1e12)
    rows = {row["backend"]: row for row in Engine(speeds, clock, Builder(clock), repeats=1).run(comparison)}
    assert {suite.OURS, suite.GRAPH, "torch", suite.PUBLISHED} <= rows.keys()
    assert all(row["status"] == "ok" and "seconds" in row and "peak_bytes" in row for row in rows.values()), rows
    kept = ("peak_bytes", "difference")  # times are the benchmark's, on a card that does nothing else
    measured.update({name: {key: row.get(key) for key in kept} for name, row in rows.items()})
