"""Budgets of memory: every plan gives the plain call's result, and takes the memory that it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.accuracy import assert_close_enough
from support.allocations import Allocations, operators_open
from support.recipe import fill, wave
from torch import Tensor, nn

import anyup
from anyup import AnyUp, budget, with_head
from anyup.limited_memory import BudgetError, Plan, Task, choice, executor, prediction
from anyup.limited_memory.bands import BandedImage
from anyup.limited_memory.plans import Bands
from anyup.ops.feature_unification import eager as feature_unification
from anyup.ops.pixel_encoder import banded as banded_encoder
from anyup.ops.pixel_encoder import eager
from anyup.ops.pixel_encoder import tiles as pixel_encoder_tiles
from anyup.ops.window_attention import eager as window_attention

IMAGE, FEATURES = wave((2, 3, 23, 17), 3, 0.8), wave((2, 9, 6, 5), 7)


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


def follow(monkeypatch: pytest.MonkeyPatch, bands: Bands | None, one_by_one: bool = False) -> None:
    """Every call and stream from now on follows this plan."""

    def chosen(task: Task, limit: int | None, **_: Any) -> Plan:
        if bands is None:
            return prediction.whole(task, limit, one_by_one)
        return prediction.banded(task, bands, limit)

    monkeypatch.setattr(choice, "choose", chosen)


def assert_calls_exactly(arguments: dict[str, Any], size: tuple[int, int] | None, dtype: torch.dtype) -> None:
    image, features = IMAGE.to(dtype), FEATURES.to(dtype)
    with torch.no_grad():
        reference = upsampler(**arguments, backend="reference").to(dtype)
        expected = reference.upsample_whole(image, features, size or (23, 17))
        exact = reference.double().upsample_whole(image.double(), features.double(), size or (23, 17))
        assert_close_enough(upsampler(**arguments).to(dtype)(image, features, size), expected, exact)


KEPT = [
    Bands(5, 3),
    Bands(5, 3, together=True, kept=10, kept_for_output=5),
    Bands(5, 3, together=True, kept=23, kept_for_output=23),
    Bands(23, 30, together=True, kept=23),
    Bands(5, 3, together=False),
    Bands(5, 4, together=False, kept=10, kept_for_output=10),
    Bands(5, 3, together=False, kept=15, kept_for_output=5, encoded=10),
    Bands(5, 3, together=False, kept=23, kept_for_output=23, encoded=23),
    Bands(1, 1, together=False, kept=20, kept_for_output=0, encoded=3),
]


@pytest.mark.parametrize("bands", KEPT, ids=str)
@pytest.mark.parametrize(
    ("arguments", "size"),
    [*(({}, size) for size in (None, (9, 13), (40, 34))), ({"kernel_size": 3, "window": "cell"}, (9, 13))],
    ids=str,
)
def test_whatever_is_kept_the_result_is_the_plain_call_s(
    arguments: dict[str, Any], size: tuple[int, int] | None, bands: Bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, bands)
    assert_calls_exactly(arguments, size, torch.float64)


@pytest.mark.parametrize(
    "bands", [KEPT[1], Bands(24, 30, kept=24), Bands(5, 3, False, 24, 24, 24), Bands(1, 1, False, 20, 0, 3)], ids=str
)
@pytest.mark.parametrize("size", [None, (9, 13), (24, 18)], ids=str)
def test_an_even_kernel_s_bands_are_of_the_encoded_image(
    size: tuple[int, int] | None, bands: Bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has a row and a column more than the image of 23 x 17."""
    follow(monkeypatch, bands)
    assert_calls_exactly({"kernel_size": 4}, size, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bands", [KEPT[1], KEPT[6]], ids=str)
def test_what_is_kept_obeys_the_error_rule_in_every_dtype(
    bands: Bands, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, bands)
    assert_calls_exactly({}, None, dtype)


def test_images_one_by_one_give_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, None, one_by_one=True)
    assert_calls_exactly({}, (30, 20), torch.float64)


@pytest.mark.parametrize("bands", [KEPT[1], KEPT[6]], ids=str)
def test_a_stream_of_a_region_with_kept_maps_is_that_part(bands: Bands, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, features = upsampler().double(), IMAGE.double(), FEATURES.double()
    with torch.no_grad():
        expected = model(image, features)[:, :, 4:20, 3:14]
        follow(monkeypatch, bands)
        pieces = list(model.stream(image, features, region=(4, 3, 16, 11), tile=(7, 11)))
    torch.testing.assert_close(torch.cat([piece for _, _, piece in pieces], dim=2), expected, rtol=1e-10, atol=1e-10)


def test_a_context_for_another_grid_is_pooled_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, features = upsampler().double(), IMAGE.double(), FEATURES.double()
    with torch.no_grad():
        context, expected = model.encode_image(image), model(image, features)
        follow(monkeypatch, KEPT[5])
        torch.testing.assert_close(model(context, features), expected, rtol=1e-10, atol=1e-10)
        with monkeypatch.context() as patch:
            patch.setattr(BandedImage, "queries", None)  # they come from the context
            torch.testing.assert_close(model(context, features), expected, rtol=1e-10, atol=1e-10)


def test_a_head_works_within_a_budget_in_calls_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    model, head = with_head(upsampler().double(), nn.Conv2d(9, 4, 1).double()), KEPT[6]
    image, features = IMAGE.double(), FEATURES.double()
    with torch.no_grad():
        expected = model(image, features)
        follow(monkeypatch, head)
        torch.testing.assert_close(model(image, features, max_memory="1GB"), expected, rtol=1e-10, atol=1e-10)
        pieces = [piece for _, _, piece in model.stream(image, features, tile=9)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match="values: the head's outputs are carried"):
        model.stream(image, features, values=features)


# The plan is what is executed.


def work_done(bands: Bands, monkeypatch: pytest.MonkeyPatch, stream: bool = False) -> tuple[float, Plan]:
    """Products of D x D in the image's encoders of a call, counted where they are made, and the plan."""
    done, plans = [0.0], []
    original = eager.Band._step

    def counted(band: Any, norm: Any) -> Any:
        step = band._norms_done
        thin_projection = step == 0 and band._thin is not None
        done[0] += 0 if thin_projection else band._count
        return original(band, norm)

    finish = eager.Band.finish

    def finished(band: Any, *arguments: Any) -> Any:
        done[0] += band._count
        return finish(band, *arguments)

    keys = AnyUp.keys

    def uncounted(model: AnyUp, *arguments: Any) -> Tensor:
        """The keys' blocks on the small grid are a stage of their own."""
        before = done[0]
        made = keys(model, *arguments)
        done[0] = before
        return made

    def chosen(task: Task, limit: int | None, **_: Any) -> Plan:
        plans.append(prediction.banded(task, bands, limit))
        return plans[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(AnyUp, "keys", uncounted)
        patch.setattr(choice, "choose", chosen)
        patch.setattr(eager.Band, "_step", counted)
        patch.setattr(eager.Band, "finish", finished)
        upsampler()(IMAGE[:1], FEATURES[:1])
    return done[0], plans[0]


@pytest.mark.parametrize("bands", KEPT, ids=str)
def test_a_plan_counts_the_products_that_are_made(bands: Bands, monkeypatch: pytest.MonkeyPatch) -> None:
    done, plan = work_done(bands, monkeypatch)
    planned = sum(stage.products for stage in plan.stages if stage.name not in ("keys", "output"))
    pixels = 23 * 17
    if bands.output_rows >= 23:  # one piece, without rows that are made twice
        planned += pixels * ((5 if bands.together else 2) if bands.kept_for_output else 9)
        assert done == pytest.approx(planned, rel=1e-9)
    else:
        assert planned < done < planned + pixels * 9 * (1 + 2 / bands.output_rows)


def test_a_plan_s_bands_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Noted(eager.Band):
        def __init__(self, pixels: Tensor, *args: Any, **more: Any) -> None:
            seen.append(pixels.shape[0])
            super().__init__(pixels, *args, **more)

    monkeypatch.setattr(eager, "Band", Noted)
    follow(monkeypatch, Bands(5, 3, kept=10, kept_for_output=5))
    with torch.no_grad():
        upsampler()(IMAGE, FEATURES)
    assert max(seen) == 5 * 17


# Peaks, tensor by tensor, as the operators of a GPU allocate them. Nothing is computed on the meta device.


def allocated(make: Callable[[AnyUp, Tensor, Tensor], Any], monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> int:
    """Peak bytes of a call or stream of `sizes` (batch, image, channels, grid)."""
    with torch.device("meta"):
        model = AnyUp().eval()
        image = torch.empty(sizes.get("batch", 1), 3, *sizes["image"])
        features = torch.empty(sizes.get("batch", 1), sizes["channels"], *sizes["grid"])
    allocations = Allocations()
    allocations.ignore(image, features, *model.parameters())
    with torch.no_grad(), operators_open(monkeypatch), allocations:
        make(model, image, features)
    return allocations.peak


PEAKS = [
    (None, {"image": (512, 512), "grid": (32, 32), "channels": 384}),
    (None, {"image": (448, 640), "grid": (28, 40), "channels": 64, "batch": 2}),
    (Bands(128, 126), {"image": (512, 512), "grid": (32, 32), "channels": 384}),
    (Bands(128, 62, False, 512, 256, 512), {"image": (512, 512), "grid": (32, 32), "channels": 384}),
    (Bands(64, 62, True, 256, 128), {"image": (512, 512), "grid": (32, 32), "channels": 768}),
]


@pytest.mark.parametrize(
    ("module", "constant"),
    [(pixel_encoder_tiles, "_TILE_PIXELS"), (feature_unification, "_BUDGET"), (window_attention, "_BUDGET")],
    ids=str,
)
def test_a_plan_knows_what_a_backend_works_in(module: Any, constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(plan: Plan) -> list[int]:
        return [stage.peak_bytes for stage in plan.stages]

    def planned() -> Plan:
        window_attention.scratch_bytes.cache_clear()
        return anyup.plan((448, 448), (32, 32), 384, max_memory="2GB")

    before = peaks(planned())
    monkeypatch.setattr(module, constant, {"cpu": 16 * getattr(module, constant)["cpu"]})
    after = peaks(planned())
    window_attention.scratch_bytes.cache_clear()
    assert after > before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bands", "sizes", "stream"),
    # A stream without a limit keeps nothing.
    [(bands, sizes, stream) for bands, sizes in PEAKS for stream in (False, True) if not stream or bands is not None],
    ids=str,
)
def test_the_peak_is_predicted_within_15_percent(
    bands: Bands | None, sizes: dict[str, Any], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def chosen(task: Task, limit: int | None, **_: Any) -> Plan:
        plans.append(prediction.whole(task, None) if bands is None else prediction.banded(task, bands, None))
        return plans[-1]

    monkeypatch.setattr(choice, "choose", chosen)

    def make(model: AnyUp, image: Tensor, features: Tensor) -> None:
        if not stream:
            model(image, features)
            return
        for _, _, piece in model.stream(image, features):
            del piece

    measured = allocated(make, monkeypatch, **sizes)
    predicted = plans[0].peak_bytes - prediction._OVERHEAD_ELSEWHERE
    if bands is None:  # with room for kernels, which run two encoders at once: a map more for each image but one
        predicted -= (sizes.get("batch", 1) - 1) * math.prod(sizes["image"]) * 128 * 4
    assert abs(predicted - measured) < 0.15 * measured, f"{predicted / 1e6:.0f} MB for {measured / 1e6:.0f} MB"


# Devices of any size.


@pytest.mark.parametrize("limit", ["4GB", "6GB", "8GB", "16GB", "40GB"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_plan_keeps_to_its_limit_and_more_memory_never_costs_more(limit: str, stream: bool) -> None:
    size = budget.parse_memory(limit)
    assert size is not None
    settings: dict[str, Any] = {"values": 21, "device": "cuda", "stream": stream}
    plans = [anyup.plan((4096, 4096), (256, 256), 768, max_memory=n, **settings) for n in (size, 2 * size)]
    assert plans[0].peak_bytes <= size
    assert plans[1].cost <= plans[0].cost * 1.01


GOALS = [
    ((2048, 2048), (128, 128), 1024, "8GB", {"stream": True, "out_dtype": torch.float16}),
    ((4096, 4096), (256, 256), 768, "12GB", {"stream": True, "out_dtype": torch.float16}),
    ((4096, 4096), (256, 256), 768, "4GB", {"values": 21}),
]


@pytest.mark.parametrize(("image", "grid", "channels", "limit", "settings"), GOALS, ids=str)
def test_large_images_fit_small_cards(image: Any, grid: Any, channels: int, limit: str, settings: Any) -> None:
    plan = anyup.plan(image, grid, channels, device="cuda", max_memory=limit, **settings)
    assert plan.peak_bytes <= 0.97 * budget.parse_memory(limit)  # type: ignore[operator]
    assert plan.cost < 2


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    with pytest.raises(BudgetError, match="max_memory: .* in 100 MB; the smallest budget that can is") as caught:
        anyup.plan((1024, 1024), (64, 64), 384, max_memory="100MB")
    smallest = caught.value.smallest
    assert anyup.plan((1024, 1024), (64, 64), 384, max_memory=smallest).peak_bytes <= smallest
    with pytest.raises(ValueError, match="smallest"):
        anyup.plan((1024, 1024), (64, 64), 384, max_memory=smallest - 10**6)
    with torch.no_grad(), pytest.raises(BudgetError, match="smallest"):
        upsampler()(IMAGE, FEATURES, max_memory="1MB")


def test_a_gpu_s_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 8 * 10**9 if device.type == "cuda" else None)
    plan = anyup.plan((4096, 4096), (256, 256), 768, device="cuda", values=21)
    assert plan.limit == 7_200_000_000
    assert plan.bands is not None
    assert anyup.plan((4096, 4096), (256, 256), 768, values=21).limit is None


def test_a_plan_says_what_is_kept_and_what_it_costs(threads: None) -> None:
    torch.set_num_threads(1)  # each takes memory of its own
    text = str(anyup.plan((2048, 2048), (128, 128), 384, values=21, max_memory="1.5GB"))
    assert "of 1.50 GB" in text
    assert "one map for" in text
    assert "statistics of the queries" in text


def test_the_call_follows_the_plan_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    choose = choice.choose
    monkeypatch.setattr(choice, "choose", lambda *args, **more: plans.append(choose(*args, **more)) or plans[-1])
    model = upsampler()
    anyup.plan((23, 17), (6, 5), 9, batch=2, max_memory="400MB", upsampler=model)
    with torch.no_grad():
        model(IMAGE, FEATURES, max_memory="400MB")
    expected, used = plans
    assert used == expected


# A GPU that runs out of memory all the same.


class Failing:
    """Fails like a GPU's allocator at some of its calls."""

    def __init__(self, function: Callable[..., Any], *failures: int) -> None:
        self._function, self._failures, self.calls = function, failures, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls in self._failures:
            raise torch.OutOfMemoryError("planted")
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("failure", [1, 3, 7])
def test_an_allocation_that_fails_halves_the_budget_and_goes_on(failure: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, features = upsampler().double(), IMAGE.double(), FEATURES.double()
    with torch.no_grad():
        expected = model(image, features)
        plans = [Bands(5, 3, False, 23, 23), Bands(3, 2)]
        limits: list[int | None] = []

        def chosen(task: Task, limit: int | None, **_: Any) -> Plan:
            limits.append(limit)
            return prediction.banded(task, plans[len(limits) - 1], limit)

        monkeypatch.setattr(choice, "choose", chosen)
        attend = Failing(executor.window_attention, failure)
        monkeypatch.setattr(executor, "window_attention", attend)
        actual = model(image, features, max_memory="1GB")
    assert limits == [10**9, 5 * 10**8]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_work_goes_on_where_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    close = banded_encoder.BandedEncoder.finish_pass
    monkeypatch.setattr(
        banded_encoder.BandedEncoder,
        "finish_pass",
        lambda self, join: (passes.append(self.passes), close(self, join))[1],
    )
    follow(monkeypatch, KEPT[1])
    monkeypatch.setattr(executor, "window_attention", Failing(executor.window_attention, 2))
    with torch.no_grad():
        pieces = list(upsampler().stream(IMAGE[:1], FEATURES[:1]))
    assert len(passes) == 3 * 4, "no pass is repeated"
    assert [(rows.start, rows.stop) for rows, _, _ in pieces][:2] == [(0, 3), (3, 6)]


def test_a_whole_call_that_fails_goes_on_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upsampler().double()
    with torch.no_grad():
        expected = model(IMAGE.double(), FEATURES.double())
        monkeypatch.setattr(AnyUp, "upsample_whole", Failing(AnyUp.upsample_whole, 1))
        torch.testing.assert_close(model(IMAGE.double(), FEATURES.double()), expected, rtol=1e-10, atol=1e-10)


def test_a_second_failure_is_an_error_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, KEPT[0])
    monkeypatch.setattr(executor, "window_attention", Failing(executor.window_attention, 2, 4))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match=r"again, with half the budget: planted\n.*plan"):
        upsampler()(IMAGE, FEATURES)


# Amounts of memory, and mistakes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (123, 123),
        (np.int64(123), 123),
        (2e9, 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("1.5 gb", 1_500_000_000),
        ("800 MiB", 800 * 2**20),
        ("5000", 5000),
        (None, None),
    ],
)
def test_amounts_are_read(text: Any, expected: int | None) -> None:
    assert budget.parse_memory(text) == expected


@pytest.mark.parametrize(
    ("amount", "error", "message"),
    [
        ("2 gigs", ValueError, "max_memory: expected bytes or a text such as .*'2 gigs'"),
        ("-2GB", ValueError, "max_memory: .*'-2GB'"),
        ("٢GB", ValueError, "max_memory: expected bytes or a text such as .*'٢GB'"),
        ("2 \N{KELVIN SIGN}B", ValueError, "max_memory: expected bytes or a text such as"),
        ("9" * 19 + "GB", ValueError, "max_memory: expected bytes or a text such as"),
        ("inf", ValueError, "max_memory: expected bytes or a text such as .*'inf'"),
        ("1e3", ValueError, "max_memory: expected bytes or a text such as .*'1e3'"),
        ("0.0001 kB", ValueError, "max_memory: expected a positive amount of memory"),
        ("", ValueError, "max_memory: "),
        (0, ValueError, "max_memory: expected a positive amount of memory, got 0"),
        (True, TypeError, "max_memory: .*True"),
        (2.5, TypeError, "max_memory: expected bytes or a text such as .*2.5"),
        (float("inf"), TypeError, "max_memory: expected bytes or a text such as .*inf"),
    ],
)
def test_an_amount_that_is_none_is_named(amount: Any, error: Any, message: str) -> None:
    for call in (upsampler().stream, upsampler()):
        with torch.no_grad(), pytest.raises(error, match=message):
            call(IMAGE, FEATURES, max_memory=amount)


def test_a_gradient_within_a_budget_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"max_memory does not differentiate: .*torch.no_grad\(\)"):
        upsampler()(IMAGE, FEATURES, max_memory="1GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (0, 4)}, "image_size: .*0"),
        ({"channels": 0}, "channels: expected a positive integer, got 0"),
        ({"values": -1}, "values: .*-1"),
        ({"region": (0, 0, 4, 4)}, "region, tile and out_dtype belong to a stream"),
        ({"stream": True, "tile": 0}, "tile: .*0"),
    ],
)
def test_a_mistake_in_asking_for_a_plan_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anyup.plan(**{"image_size": (32, 32), "feature_size": (2, 2), "channels": 8, **arguments})


# Under torch.compile, traced only: what the graphs compute is tested elsewhere.


@pytest.mark.slow
def test_contexts_streams_and_budgets_work_when_compiled() -> None:
    model = upsampler()
    compiled, whole = (torch.compile(model, backend="eager", fullgraph=full) for full in (False, True))
    with torch.no_grad():
        expected = model(IMAGE, FEATURES)
        context = model.encode_image(IMAGE, grids=[(6, 5)])
        torch.testing.assert_close(whole(context, FEATURES), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(IMAGE, FEATURES, max_memory="1GB"), expected, rtol=1e-4, atol=1e-5)
        pieces = [piece for _, _, piece in compiled.stream(IMAGE, FEATURES, tile=8)]
        torch.testing.assert_close(torch.cat(pieces, dim=2), expected, rtol=1e-4, atol=1e-5)
