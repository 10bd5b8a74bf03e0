"""`anyup bench`: its counts, its engine on tiny workloads with a clock of our own, its file, its command."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from anyup.bench import cases, command, floors, machine, memory, parity, published_code, suite
from anyup.bench.cases import OPERATIONS, Sizes
from anyup.bench.clock import CardLost
from anyup.bench.engine import Engine, Entry, Speeds
from anyup.bench.floors import BOTH
from anyup.bench.graphs import by_stage
from anyup.bench.implementations import Builder
from anyup.bench.published_code import PublishedCode
from anyup.bench.results import MachineError, ResultsFile
from anyup.bench.stages import STAGES, Stages
from anyup.bench.suite import Comparison, Implementation
from anyup.bench.timing import Time, Timing, host_clock
from anyup.bench.workloads import Workload, square
from anyup.capture import Graph
from anyup.cli import command as cli

TINY = Workload((24, 20), (6, 5), channels=12)
SPEEDS = Speeds(dict.fromkeys(cases.DTYPES, 1e11), 1e10)


def clock(function: Callable[[], object]) -> Time:
    """A call takes two milliseconds."""
    function()
    return Time(2e-3)


def no_memory(implementation: Implementation, sizes: Sizes) -> memory.Memory:
    return memory.Memory(1000)


def engine(**changes: object) -> Engine:
    made = Engine(SPEEDS, clock, Builder(clock), measure_memory=no_memory)
    return replace(made, **changes)  # type: ignore[arg-type]


def model(*backends: str, sizes: Sizes | None = None) -> Comparison:
    names = {"anyup": "anyup", "published": "published"}
    implementations = tuple(Implementation("model", backend, names[backend]) for backend in backends)
    return Comparison("model", sizes or Sizes(TINY), implementations)


def operation(name: str, *backends: str, sizes: Sizes | None = None) -> Comparison:
    return Comparison(
        "operation", sizes or Sizes(TINY), tuple(Implementation(name, b, f"{name}/{b}") for b in backends)
    )


# What is counted


def test_the_floor_counts_each_product_of_the_definition() -> None:
    workload = square(448, 32)
    a_pixel = floors.products("model", workload) / workload.pixels
    # 2 encoders from the image's, 3x3 and projection: 377,216; 49 keys of 128 + 384; the grid's share.
    square_ = 128 * 128
    grid = (1 + 8 + 18 + 1 - 0) * square_ + 384 * 128 * 25
    assert a_pixel == pytest.approx(3 * 128 + 23 * square_ + 49 * (128 + 384) + grid / 196, rel=1e-12)
    assert 405_000 < a_pixel < 419_000


def test_the_floor_is_that_of_the_memory_where_it_takes_longer() -> None:
    arguments = ("query_encoder", TINY)
    slow_copies = floors.floor_seconds(*arguments, rate=1e30, bandwidth=1e9)
    assert slow_copies == 4 * 2 * 128 * TINY.pixels / 1e9
    slow_products = floors.floor_seconds(*arguments, rate=1e9, bandwidth=1e30)
    assert slow_products == 2 * 5 * 128 * 128 * TINY.pixels / 1e9
    assert floors.floor_seconds(*arguments, rate=1e9, bandwidth=1e30, direction=BOTH) == 3 * slow_products
    back = floors.floor_seconds(*arguments, rate=1e30, bandwidth=1e9, direction=BOTH)
    assert back == pytest.approx(slow_copies * 5 / 2)  # three times the inputs, twice the output
    with pytest.raises(ValueError, match="operation: expected one of .*, got 'softmax'"):
        floors.products("softmax", TINY)


def test_a_head_that_comes_first_leaves_less_to_do() -> None:
    workload = square(1024, 64)
    saved = floors.products("model", workload) - floors.products("model_of_classes", workload)
    assert saved == pytest.approx(workload.pixels * workload.mean_window(floors.WINDOW) * (384 - floors.CLASSES))
    found = {
        c.operation: c.work for each in suite.comparisons("cpu") for c in each.implementations if each.group == "head"
    }
    assert found["head_before"] == "model_of_classes" and found["head_after"] == "model"


# What is run


def test_a_comparison_has_a_row_for_each_contender() -> None:
    ours, theirs = engine().run(model("anyup", "published"))
    assert [row["status"] for row in (ours, theirs)] == ["ok", "ok"]
    assert ours["seconds"] == theirs["seconds"] == 2e-3 and len(ours["times"]) == 5
    assert ours["speed_up"] == 1.0 and "speed_up" not in theirs
    assert 0 <= ours["difference"] < parity.TOLERANCE
    assert ours["times_floor"] == pytest.approx(2e-3 / ours["floor_seconds"])
    assert theirs["chunk"] is None and set(theirs["chunk_times"]) == {"all"}  # fewer pixels than any chunk
    assert ours["output_bytes"] == TINY.output_bytes and ours["peak_bytes"] == 1000


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("direction", floors.PASSES)
def test_each_operation_is_held_against_its_reference(name: str, direction: str) -> None:
    rows = engine().run(operation(name, "torch", "reference", sizes=Sizes(TINY, direction=direction)))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert 0 <= rows[0]["difference"] < parity.GRADIENT_TOLERANCE


def test_the_backward_pass_of_the_model_is_held_against_the_baseline_s() -> None:
    ours, theirs = engine().run(model("anyup", "published", sizes=Sizes(TINY, direction=BOTH)))
    assert ours["pass"] == BOTH and ours["status"] == theirs["status"] == "ok"
    assert ours["difference"] < parity.GRADIENT_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_held_against_float64(dtype: str) -> None:
    many = replace(TINY, channels=96)
    row, baseline = engine().run(model("anyup", "published", sizes=Sizes(many, dtype)))
    assert 1e-5 < row["difference"] < parity.HALF_TOLERANCE
    # What the published forward loses, which is no fault of ours and no measure for it.
    assert 10 * row["difference"] < baseline["difference"] < 1 and baseline["status"] == "ok"
    (wrong,) = engine(builder=Wrong(clock)).run(model("anyup", sizes=Sizes(TINY, dtype)))
    assert wrong["status"] == "wrong" and "from float64, expected at most 3e-02" in wrong["reason"]
    assert row["output_bytes"] == many.output_bytes // 2


class Wrong(Builder):
    """Ours is a tenth too large."""

    def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
        call = super().build(implementation, sizes)
        return (lambda: call() * 1.1) if implementation.backend in ("anyup", "torch") else call


@pytest.mark.parametrize(
    "comparison",
    [model("anyup", "published"), operation("query_projection", "torch", "reference")],
    ids=lambda comparison: comparison.name,
)
def test_a_result_that_differs_marks_its_row_and_the_other_is_timed(comparison: Comparison) -> None:
    timed: list[object] = []

    def counting(function: Callable[[], object]) -> Time:
        timed.append(function)
        return clock(function)

    builder = Wrong(clock)
    ours, theirs = engine(clock=counting, builder=builder).run(comparison)
    assert ours["status"] == "wrong" and comparison.sizes.workload.name in ours["reason"]
    assert "seconds" not in ours and "peak_bytes" not in ours
    assert theirs["status"] == "ok" and len(timed) == 2 + 5  # the first calls, the repeats of one


def test_what_rounding_takes_further_apart_is_held_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where many channels are averaged; a result that is wrong fails all the same."""
    monkeypatch.setattr(parity, "TOLERANCE", 1e-9)
    rows = engine().run(model("anyup", "published"))
    assert 1e-9 < rows[0]["difference"] < 2e-4
    wrong = engine(builder=Wrong(clock)).run(model("anyup", "published"))[0]
    assert wrong["status"] == "wrong" and "from float64, the baseline is" in wrong["reason"]


@pytest.mark.parametrize("name", ["window_attention", "window_attention_of_classes"])
def test_the_attention_alone_is_held_against_some_rows_of_the_definition(name: str) -> None:
    comparison = operation(name, "torch")
    (row,) = engine().run(comparison)
    assert 0 <= row["difference"] < parity.TOLERANCE
    (wrong,) = engine(builder=Wrong(clock)).run(comparison)
    assert wrong["status"] == "wrong" and name in wrong["reason"]


def test_a_wrong_gradient_fails() -> None:
    leaves = [torch.ones(3, requires_grad=True) for _ in range(2)]
    leaves[0].grad, leaves[1].grad = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    with pytest.raises(parity.ParityError, match="gradient 0: .* of its norm apart"):
        parity.check_gradients(leaves[:1], leaves[1:], "x")
    leaves[1].grad = None
    with pytest.raises(parity.ParityError, match="one side has none"):
        parity.check_gradients(leaves[:1], leaves[1:], "x")


def test_what_takes_too_long_is_a_result() -> None:
    ours, theirs = engine(budget=1e-12).run(model("anyup", "published"))
    assert [row["status"] for row in (ours, theirs)] == ["over budget"] * 2
    assert theirs["expected_seconds"] > 1e-12 and "the budget of a call" in theirs["reason"]
    assert theirs.get("seconds") is None


def test_what_needs_more_memory_than_there_is_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyup.bench.engine.free_memory", lambda device: 10)
    ours, theirs = engine().run(model("anyup", "published"))
    assert ours["status"] == "ok" and "speed_up" not in ours
    assert theirs["status"] == "out of memory" and theirs["reason"].endswith("0.0 GB are free")
    assert ours["difference"] < parity.TOLERANCE  # at a sample of pixels


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_a_call_that_memory_does_not_suffice_for_is_a_result(error: Exception) -> None:
    class Fails(Builder):
        def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
            if implementation.backend == "published":
                raise error
            return super().build(implementation, sizes)

    ours, theirs = engine(builder=Fails(clock)).run(model("anyup", "published"))
    assert ours["status"] == "ok" and theirs["status"] == "out of memory"


def test_what_does_not_fit_when_it_is_repeated_is_a_result() -> None:
    calls: list[None] = []

    def failing(function: Callable[[], object]) -> Time:
        calls.append(None)
        if len(calls) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return clock(function)

    rows = engine(clock=failing).run(operation("query_projection", "torch", "reference"))
    assert [row["status"] for row in rows] == ["out of memory"] * 2


class Fails(Builder):
    """Ours raises an error."""

    def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
        if implementation.backend == "anyup":
            raise RuntimeError("launch failed\nin detail")
        return super().build(implementation, sizes)


def test_an_error_that_is_none_of_memory_marks_its_row_and_the_others_go_on() -> None:
    ours, theirs = engine(builder=Fails(clock)).run(model("anyup", "published"))
    assert (ours["status"], ours["reason"]) == ("failed", "RuntimeError: launch failed")
    assert theirs["status"] == "ok"


def test_an_error_that_takes_the_card_along_ends_the_run_and_another_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    path = tmp_path / "results.json"
    comparisons = [model("anyup", "published"), operation("query_projection", "torch")]
    with pytest.raises(CardLost, match="does not answer after a call that failed"):
        command.measure(engine(builder=Fails(clock)), comparisons, ResultsFile(path, describe()))
    rows = json.loads(path.read_text())["rows"]
    assert [(row["backend"], row["status"]) for row in rows] == [("anyup", "failed"), ("published", "failed")]
    assert "does not answer" in rows[0]["reason"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # as in a new process
    command.measure(engine(builder=Fails(clock)), comparisons, ResultsFile(path, describe()))
    assert [row["status"] for row in json.loads(path.read_text())["rows"]] == ["failed", "failed", "ok"]


def test_an_error_outside_the_calls_marks_all_rows_of_its_comparison_and_the_next_one_is_run(tmp_path: Path) -> None:
    class Broken(Engine):
        def prepare(self, comparison: Comparison) -> list[Entry]:
            if comparison.implementations[0].operation == "model":
                raise IndexError("no such window\nin detail")
            return super().prepare(comparison)

    broken = Broken(SPEEDS, clock, Builder(clock), measure_memory=no_memory)
    file = ResultsFile(tmp_path / "results.json", describe())
    command.measure(broken, [model("anyup", "published"), operation("query_projection", "torch")], file)
    assert [(row["status"], row["reason"]) for row in file.rows] == [
        ("failed", "IndexError: no such window"), ("failed", "IndexError: no such window"), ("ok", None)
    ]  # fmt: skip


def test_an_error_while_memory_is_measured_marks_the_row_and_leaves_its_time() -> None:
    def fails(implementation: Implementation, sizes: Sizes) -> memory.Memory:
        raise RuntimeError("ended with -11")

    (row,) = engine(measure_memory=fails).run(model("anyup"))
    assert (row["status"], row["reason"], row["seconds"]) == ("failed", "RuntimeError: ended with -11", 2e-3)


def test_a_backend_that_cannot_is_a_result_with_its_reasons() -> None:
    row, other = engine().run(operation("window_attention", "torch", "flex"))
    assert row["status"] == "ok" and other["status"] == "unsupported" and other["reason"]


def test_what_takes_minutes_is_called_once() -> None:
    calls: list[str] = []

    def slow(function: Callable[[], object]) -> Time:
        calls.append("")
        function()
        return Time(61.0)

    (row,) = engine(clock=slow, budget=1e9).run(model("anyup"))
    assert row["times"] == [61.0] and len(calls) == 1


def test_a_card_s_row_tells_the_host_s_time_too_and_whether_the_card_waited_for_it() -> None:
    quick, slow = Time(1e-3, host=4e-3), Time(3e-3, host=6e-3, ahead=False)
    assert Timing((quick,)).as_row()["ahead"] is True and "ahead" not in Timing((Time(1.0),)).as_row()
    told = Timing((quick, quick, slow)).as_row()
    assert (told["seconds"], told["host_seconds"], told["ahead"]) == (1e-3, 4e-3, False)
    assert slow.wall == 6e-3


def test_kernels_of_a_replay_belong_to_the_stages_they_stand_in() -> None:
    mark = ("void at::cuda::spin_kernel(long)", 1e-6)
    seen = [("copy", 1.0), mark, ("a", 2.0), ("b", 3.0), mark, ("norm", 4.0), mark, ("c", 5.0), mark]
    found = by_stage(seen, ["first", "second"])
    assert [tuple(kernel) for kernel in found] == [
        ("", "copy", 1.0), ("first", "a", 2.0), ("first", "b", 3.0), ("", "norm", 4.0), ("second", "c", 5.0)
    ]  # fmt: skip
    for wrong in (seen[:-1], [*seen, mark], []):
        with pytest.raises(RuntimeError, match=r"the profiler saw \d of 4 marks"):
            by_stage(wrong, ["first", "second"])


def test_a_call_whose_kernels_are_compiled_for_minutes_is_repeated_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[bool] = []

    class Compiles(Builder):
        def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
            def call() -> torch.Tensor:
                compiled.append(True)
                return torch.zeros(1, 12, 24, 20)

            return call

    def timed(function: Callable[[], object]) -> Time:
        took = Time(1e-3, host=2e-3) if compiled else Time(60.0, host=60.0, ahead=False)
        function()
        return took

    monkeypatch.setattr("anyup.bench.engine.free_memory", lambda device: None)
    head = Implementation("head_before", "anyup", "head_before", has_memory=False, work="model_of_classes")
    comparison = Comparison("head", Sizes(TINY, device="cuda"), (head,))
    (row,) = engine(clock=timed, builder=Compiles(timed)).run(comparison)
    assert row["times"] == [1e-3] * 5 and row["ahead"]


def test_stages_give_the_call_s_result_and_have_a_time_each() -> None:
    upsampler = cases.model()
    stages = Stages(upsampler, *TINY.inputs())
    parity.check(stages.output(), upsampler(*TINY.inputs()), "stages")
    (row,) = engine().run(Comparison("stages", Sizes(TINY), (Implementation("model", "anyup", "anyup"),), "stages"))
    assert tuple(row["stages"]) == STAGES
    measured = Stages(upsampler, *TINY.inputs()).seconds(3, host_clock)
    assert all(seconds >= 0 for seconds in measured.values()) and sum(measured.values()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_changes_the_weights_and_has_a_row(dtype: str) -> None:
    sizes = Sizes(replace(TINY, batch=2), dtype, BOTH)
    call = cases.build("training_step", sizes)
    first, second = (call().float() for _ in range(2))
    assert not torch.equal(first, second) and not first.requires_grad
    implementation = Implementation("training_step", "anyup", "training_step", work="model")
    (row,) = engine().run(Comparison("backward", sizes, (implementation,)))
    assert (row["status"], row["pass"], row["dtype"]) == ("ok", BOTH, dtype) and "difference" in row


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    found = memory.measure_in_child("anyup", Sizes(square(224, 16)))
    output = square(224, 16).output_bytes
    assert found.peak_bytes is not None and output < found.peak_bytes < 20 * output


# The suite


def test_the_quick_suite_has_graphs_and_half_precision_on_a_card_alone() -> None:
    for device, dtypes in (("cpu", {"float32"}), ("cuda", {"float32", "bfloat16"})):
        found = suite.comparisons(device, quick=True)
        calls = [comparison for comparison in found if comparison.kind == "calls"]
        assert {comparison.sizes.dtype for comparison in found} == dtypes
        for comparison in calls:
            backends = {implementation.backend for implementation in comparison.implementations}
            assert (suite.GRAPH in backends) == (device == "cuda") and {suite.OURS, suite.PUBLISHED} <= backends


def test_a_card_s_product_is_large_and_of_random_numbers() -> None:
    made: list[torch.Tensor] = []

    def noting(function: Callable[[], object]) -> Time:
        made.append(function())  # type: ignore[arg-type]
        return Time(2.0)

    rate = machine.matmul_rate(64, repeats=1, dtype=torch.bfloat16, clock=noting)
    assert rate == 2 * 64**3 / 2.0
    assert made[0].dtype == torch.bfloat16 and made[0].unique().numel() > 100


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_suite_has_each_row_once(device: str) -> None:
    found = suite.comparisons(device, published=True, natten=True)
    names = [comparison.identity(c) for comparison in found for c in comparison.implementations]
    assert len(set(names)) == len(names)
    backends = {c.backend for comparison in found for c in comparison.implementations}
    assert {"anyup", "published", "published code", "reference"} <= backends
    assert (suite.GRAPH in backends) == (device != "cpu")
    assert {comparison.group for comparison in found} >= {"model", "operation", "backward", "stages", "dtype"}


# The file


def describe(**changes: object) -> dict[str, object]:
    return {**machine.describe(), **changes}


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = [operation(name, "torch", "reference") for name in ("query_projection", "query_encoder")]
    path = tmp_path / "results.json"

    class Interrupted(Builder):
        def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
            if implementation.operation == "query_encoder":
                raise KeyboardInterrupt
            return super().build(implementation, sizes)

    with pytest.raises(KeyboardInterrupt):
        command.measure(engine(builder=Interrupted(clock)), comparisons, ResultsFile(path, describe()))
    first = json.loads(path.read_text())["rows"]
    assert [row["operation"] for row in first] == ["query_projection"] * 2
    asked: list[str] = []

    class Counting(Builder):
        def build(self, implementation: Implementation, sizes: Sizes) -> cases.Call:
            asked.append(implementation.operation)
            return super().build(implementation, sizes)

    command.measure(engine(builder=Counting(clock)), comparisons, ResultsFile(path, describe()))
    assert set(asked) == {"query_encoder"}
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == first and len(rows) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_another_machine_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    ResultsFile(path, describe(device="Abacus")).put(engine().run(operation("query_projection", "torch")))
    with pytest.raises(MachineError, match="device: Abacus there, .* here"):
        ResultsFile(path, describe())
    assert ResultsFile(path, describe(), restart=True).rows == []
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"results.json: expected results of `anyup bench`"):
        ResultsFile(path, describe())


# A CUDA graph, on streams and graphs that pretend


class PretendedGraph:
    """Counts its replays; a call is captured between `captures` and the block's end."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[PretendedGraph]:
    made: list[PretendedGraph] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            assert isinstance(other, Stream)

    def capture(graph: PretendedGraph, *, stream: Stream, **_: object) -> contextlib.nullcontext[None]:
        made.append(graph)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500 + 1000 * len(made))
    return made


def test_a_graph_is_captured_warm_and_replayed_without_a_call(
    graphs: list[PretendedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []  # how many graphs there were at each call
    upsampler = cases.model("float32", "cpu")

    def noted(image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        seen.append(len(graphs))
        out: torch.Tensor = upsampler(image, features)
        return out

    monkeypatch.setattr(cases, "model", lambda dtype, device: noted)
    replay = Builder(clock).build(Implementation("model", suite.GRAPH, "anyup"), Sizes(TINY))
    image, features = Sizes(TINY).inputs()
    for _ in range(2):
        assert torch.equal(replay(), upsampler(image, features))
    assert seen == [0, 0, 0, 1] and [graph.replays for graph in graphs] == [2]
    assert isinstance(replay, Graph) and replay.held_bytes == 1000


def test_a_call_that_cannot_be_captured_is_unsupported(
    graphs: list[PretendedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return features

    monkeypatch.setattr(cases, "model", lambda dtype, device: refusing)
    with pytest.raises(NotImplementedError, match="captured: operation not permitted when stream is capturing$"):
        Builder(clock).build(Implementation("model", suite.GRAPH, "anyup"), Sizes(TINY))


# The published code


FAKE = """
import anyup
from torch import nn

def setup_cross_attention_block(use_natten, use_params_from=None, **arguments):
    return nn.Identity() if use_natten else nn.Flatten()

class AnyUp(nn.Module):
    def __init__(self, qk_dim=128, **arguments):
        super().__init__()
        self.arguments, self.home = arguments, anyup.__file__
        self.cross_decode = setup_cross_attention_block(False)

    def load_state_dict(self, state):
        self.names = set(state)

    def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
        self.chunk = q_chunk_size
        return nn.functional.interpolate(features, image.shape[2:])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "anyup").mkdir(parents=True)
    (folder / "anyup" / "__init__.py").write_text("")
    (folder / "anyup" / "model.py").write_text(FAKE)
    return folder


def test_the_published_code_runs_beside_ours_with_its_weights(checkout: Path) -> None:
    ours = cases.model()
    theirs = PublishedCode(checkout).with_weights_of(ours)
    assert theirs.names == set(ours.state_dict()) and theirs.arguments["num_heads"] == 4
    assert Path(theirs.home).parent == checkout / "anyup"
    assert sys.modules["anyup.model"].AnyUp is type(ours) and str(checkout) not in sys.path
    implementation = Implementation("model", suite.CODE, published_code.DENSE)
    call = Builder(clock, PublishedCode(checkout)).build(implementation, Sizes(TINY, chunk=7))
    assert call().shape == (1, 12, 24, 20)


def test_its_variant_takes_the_weights_from_the_dense_block(checkout: Path) -> None:
    made = PublishedCode(checkout).with_weights_of(cases.model(), natten=True)
    assert type(made.cross_decode) is nn.Identity and "use_natten" not in made.arguments
    code = (checkout / "anyup" / "model.py").read_text()
    for change, told in [
        (("nn.Identity() if use_natten else", ""), "falls back to its masked attention"),
        (("setup_cross_attention_block", "make_block"), "no variant by NATTEN"),
    ]:
        (checkout / "anyup" / "model.py").write_text(code.replace(*change))
        with pytest.raises(NotImplementedError, match=told):
            PublishedCode(checkout).build(published_code.NEIGHBOURHOOD, Sizes(TINY))


def test_its_memory_is_measured_in_a_process_of_its_own(checkout: Path) -> None:
    implementation = Implementation("model", suite.CODE, published_code.DENSE)
    found = Builder(clock, PublishedCode(checkout)).measure_memory(implementation, Sizes(square(224, 16)))
    output = square(224, 16).output_bytes
    assert found.peak_bytes is not None and output <= found.peak_bytes < 1.5 * output  # ours takes more


def test_what_its_code_cannot_do_is_a_result(checkout: Path) -> None:
    (checkout / "anyup" / "model.py").write_text(FAKE.replace("self.chunk = q_chunk_size", "raise ValueError('odd')"))
    implementations = (
        Implementation("model", "anyup", "anyup"),
        Implementation("model", suite.CODE, published_code.DENSE),
    )
    builder = Builder(clock, PublishedCode(checkout))
    ours, theirs = engine(builder=builder).run(Comparison("model", Sizes(TINY), implementations))
    assert ours["status"] == "ok"
    assert (theirs["status"], theirs["reason"]) == ("unsupported", "its code fails here: ValueError: odd")


def test_its_result_must_be_ours(checkout: Path) -> None:
    builder = Builder(clock, PublishedCode(checkout))
    implementations = (
        Implementation("model", "anyup", "anyup"),
        Implementation("model", suite.CODE, published_code.DENSE),
    )
    ours, _ = engine(builder=builder).run(Comparison("model", Sizes(TINY), implementations))
    assert ours["status"] == "wrong"


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--budget", "0"], "--budget: expected a number more than 0, got '0'"),
        (["--repeats", "0"], "--repeats: expected a whole number of at least 1, got '0'"),
        (["--published", "nowhere"], "--published: .* checkout of wimmerth/anyup"),
        (["--only", "everything"], "invalid choice"),
    ],
)
def test_a_wrong_option_is_told_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert cli.main(["bench", "-o", str(folder), "--device", "cpu", *arguments]) == 2
    assert not folder.exists()
    assert re.search(words, capsys.readouterr().err)


def test_results_that_differ_are_stored_and_the_command_says_so_at_the_end(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends = ("torch", "reference")
    both = tuple(Implementation("query_projection", b, f"query_projection/{b}", has_memory=False) for b in backends)
    monkeypatch.setattr(command, "comparisons", lambda *_, **__: [Comparison("operation", Sizes(TINY), both)])
    monkeypatch.setattr(command, "Builder", Wrong)
    for _ in range(2):  # the same command again says it again
        assert cli.main(["bench", "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
        out, err = capsys.readouterr()
        assert "anyup: error: 1 of 2 rows are wrong or failed: operation/query_projection/24x20 from 6x5" in err
    assert "report.html" in out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "1 wrong" in (tmp_path / "out" / "report.html").read_text()


def test_what_was_refused_is_told_and_stored(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("kernel a: no", "kernel b: no"):
        monkeypatch.setattr(command, "remembered", lambda text=text: (text,))
        assert cli.main(["bench", "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
        assert f"refused: {text}" in capsys.readouterr().err
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["machine"]["refused"] == ["kernel a: no", "kernel b: no"]
    assert "kernel a: no; kernel b: no" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of one tiny comparison, whose workload no other process could find by its name."""
    implementation = Implementation("query_projection", "torch", "query_projection/torch", has_memory=False)
    found = Comparison("operation", Sizes(TINY), (implementation,))
    monkeypatch.setattr(command, "comparisons", lambda device, **options: [found])
    monkeypatch.setattr(Speeds, "measure", staticmethod(lambda *arguments: SPEEDS))
    monkeypatch.setattr(machine, "matmul_rate", lambda *arguments, **options: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda *arguments, **options: 1e10)


def test_the_command_writes_results_and_a_report(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "-o", str(tmp_path / "out"), "--device", "cpu", "--repeats", "2"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "query_projection" in out and "[1/1] operation: query_projection, 24x20 from 6x5, C 12" in err
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["machine"]["matmul_rate_after"] == 1e11 and len(stored["rows"]) == 1
    assert "24x20 from 6x5" in (tmp_path / "out" / "report.html").read_text()
    assert cli.main(arguments) == 0
    assert "1 of 1 comparisons are stored" in capsys.readouterr().err
