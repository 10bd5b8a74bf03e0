"""`anyup tune`: the search, the table it leaves, parity of what it times, and where it says that it cannot run."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipe import INTERPRETED
from support.small_passes import SMALL, assert_check_finds_a_wider_window, small_passes

from anyup.bench import clock as clocks
from anyup.bench.attention_passes import AttentionPasses
from anyup.bench.parity import ParityError
from anyup.bench.workloads import Workload, square
from anyup.cli import command as cli
from anyup.kernels import config_tables
from anyup.kernels.config_tables import KINDS, Case
from anyup.kernels.launch import Launch
from anyup.kernels.window_attention_config import BackwardGridConfig, BackwardQueryConfig, ForwardConfig
from anyup.ops import kernel_device, window_attention
from anyup.ops.precision import float32_matmul_precision
from anyup.tuning import tune as tuning
from anyup.tuning.candidates import ASPECTS, variations
from anyup.window import CellWindow, RatioWindow, Window

CPU = torch.device("cpu")
RULE = ForwardConfig(8, 8, 32, 2, 64, 1, num_warps=4, num_stages=2)
TAILED = ForwardConfig(8, 8, 32, 1, 64, 1, num_warps=4, num_stages=2, tail_keys=16, group_blocks=8)
SMALLER = ForwardConfig(8, 8, 16, 0, 32, 1, num_warps=4, num_stages=1, load_once=False, piece=16)
QUERY = BackwardQueryConfig(8, 8, 32, 0, 64, num_warps=8, num_stages=2, heads=4, load_once=False)
GRID = BackwardGridConfig(4, 4, 64, 64, 6, 3, num_warps=4, num_stages=2, heads=4)

Seconds = Callable[[Any], float]


def dear(config: Any) -> float:
    """Seconds on a made-up card: it likes 2 warps, 3 stages and blocks of 64."""
    block = getattr(config, "block_keys", None) or config.block_pixels
    return 1e-6 * (100 + 9 * abs(config.num_warps - 2) + 5 * abs(config.num_stages - 3) + abs(block - 64) / 8)


class FakePasses:
    """Kernels that take the time that a function says, and fail or are wrong where others say so."""

    def __init__(
        self,
        workload: Workload = square(448, 32),  # noqa: B008
        dtype: str = "bfloat16",
        *,
        fails: Callable[[Any], BaseException | None] = lambda config: None,
        heads: int = 4,
        head_dim: int = 32,
        window: Window = RatioWindow(0.1),  # noqa: B008
    ) -> None:
        self.workload = workload
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.fails = fails
        self.checked: list[Any] = []
        self.dtype = dtype

    def most_keys(self, rows: int, columns: int) -> int:
        return (rows // 8 + 7) * (columns // 8 + 7)

    def case(self, kernel: str) -> Case:
        precision = "" if self.dtype != "float32" else kernel_device.dot_precision()
        return Case(
            kernel, self.dtype, precision, self.heads, self.head_dim, config_tables.rounded_keys(self.most_keys)
        )

    def rule(self, kernel: str) -> Sequence[Any]:
        configs = {"forward": (RULE, SMALLER), "backward_query": (QUERY,)}
        return configs.get(kernel, (GRID,))

    def fitted(self, kernel: str, config: Any) -> Any:
        return config_tables.fitted(config, self.rule(kernel), most_keys=self.most_keys, channels=384)

    def launch(self, kernel: str, config: Any) -> Any:
        return config

    def check(self, kernel: str, config: Any) -> None:
        self.checked.append(config)
        error = self.fails(config)
        if error is not None:
            raise error


class Clock:
    """Times of configs by a function; remembers what it timed."""

    def __init__(self, seconds: Seconds = dear) -> None:
        self.seconds = seconds
        self.timed: list[Any] = []

    def __call__(self, launch: Any) -> float:
        self.timed.append(launch)
        return self.seconds(launch)


def tune(path: Path, clock: Any, passes: Callable[[Workload], Any] | None = None, **more: Any) -> list[tuning.Search]:
    """`tuning.tune` for one kernel of made-up passes."""
    chosen: dict[str, Any] = {"workloads": [square(448, 32)], "dtypes": ["bfloat16"], "kernels": ["forward"], **more}
    make = passes or FakePasses
    return list(tuning.tune(CPU, "abacus", path, clock, make=lambda w, dtype, device: make(w), **chosen))


# Configs worth timing


@pytest.mark.parametrize("config", [RULE, TAILED, SMALLER, QUERY, GRID])
def test_variations_differ_from_a_config_in_one_respect_and_hold_every_key(config: Any) -> None:
    passes = Fewer() if config is TAILED else FakePasses()
    found = {aspect: list(variations(config, aspect, heads=4, most_keys=passes.most_keys)) for aspect in ASPECTS}
    everything = [other for others in found.values() for other in others]
    assert config not in everything and len(everything) > 10
    for other in everything:
        blocks = getattr(other, "resident_blocks", 0)
        kept = blocks and blocks * other.block_keys + getattr(other, "tail_keys", 0)
        assert not blocks or kept >= passes.most_keys(other.rows, other.columns)
        assert 4 % (getattr(other, "heads", 0) or 4) == 0
    assert {other.num_warps for other in found["num_warps"]} == {2, 4, 8} - {config.num_warps}
    assert all(replace(other, num_warps=config.num_warps) == config for other in found["num_warps"])
    assert bool(found["residence"]) == hasattr(config, "resident_blocks")
    assert bool(found["heads"]) == hasattr(config, "heads")
    resident = isinstance(config, ForwardConfig) and config.resident_blocks > 0
    assert bool(found["group_blocks"]) == resident
    assert all(replace(other, group_blocks=config.group_blocks) == config for other in found["group_blocks"])
    assert {other.block_keys for other in found["block"]} >= {16, 64} if resident else True


def test_a_last_smaller_block_is_tried_where_it_holds_what_is_left() -> None:
    def tails(config: Any, keys: int) -> set[tuple[int, int]]:
        found = variations(config, "tail_keys", heads=4, most_keys=lambda rows, columns: keys)
        return {(other.resident_blocks, other.tail_keys) for other in found}

    assert tails(RULE, 48) == {(1, 16)}
    assert tails(replace(RULE, block_keys=64, resident_blocks=1, row_partials=2), 80) == {(2, 0), (1, 16), (1, 32)}
    assert tails(replace(RULE, resident_blocks=2), 64) == set()
    assert tails(TAILED, 48) == {(2, 0)}
    assert tails(replace(RULE, resident_blocks=0), 48) == set()


def test_configs_whose_code_would_explode_are_not_tried() -> None:
    many = list(variations(replace(RULE, resident_blocks=0), "residence", heads=8, most_keys=lambda r, c: 637))
    assert many == []


# The search


def test_the_search_finds_the_fastest_config() -> None:
    found = tuning.search(FakePasses(), "forward", Clock())
    assert found.best is not None
    best = found.best.config
    assert (best.num_warps, best.num_stages, best.block_keys) == (2, 3, 64)  # type: ignore[union-attr]
    assert found.gain == pytest.approx(dear(RULE) / dear(best))
    assert found.rule == pytest.approx(dear(RULE))


def test_every_config_is_checked_before_it_is_timed() -> None:
    passes, clock = FakePasses(), Clock()
    tuning.search(passes, "forward", clock)
    assert passes.checked == clock.timed and clock.timed[0] == RULE


def test_a_wrong_config_is_never_the_best_however_fast_it_is() -> None:
    passes = FakePasses(fails=lambda config: ParityError("half of it") if config.num_warps == 2 else None)
    clock = Clock()
    found = tuning.search(passes, "forward", clock)
    assert found.best is not None and found.best.config.num_warps == 4
    assert all(config.num_warps != 2 for config in clock.timed)
    reasons = {o.reason for o in found.outcomes if o.config.num_warps == 2}
    assert reasons == {"wrong: half of it"}


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), ValueError(""), MemoryError("none left")])
def test_a_config_that_does_not_compile_is_a_result(error: Exception) -> None:
    passes = FakePasses(fails=lambda config: error if config.num_stages == 3 else None)
    found = tuning.search(passes, "forward", Clock())
    assert found.best is not None and found.best.config.num_stages in (2, 4)
    (reason,) = {o.reason for o in found.outcomes if o.seconds is None}
    assert reason == f"{type(error).__name__}: {error}"


def test_a_gain_within_the_clock_s_spread_leaves_the_rule() -> None:
    found = tuning.search(FakePasses(), "forward", Clock(lambda config: 1e-6 * (100 + (config.num_warps == 4))))
    assert found.best is not None and (found.best.config, found.gain) == (RULE, 1.0)


def test_a_gain_that_is_not_seen_twice_leaves_the_rule() -> None:
    seen: set[Any] = set()

    def lucky_once(config: Any) -> float:
        first = config not in seen
        seen.add(config)
        return 50e-6 if first and config.num_warps == 8 else 100e-6

    found = tuning.search(FakePasses(), "forward", Clock(lucky_once))
    assert found.best is not None and found.best.config == RULE


def test_a_rule_that_was_slow_only_once_stays() -> None:
    seen: set[Any] = set()

    def unlucky_once(config: Any) -> float:
        first = config not in seen
        seen.add(config)
        return (200e-6 if first else 100e-6) if config == RULE else 150e-6

    found = tuning.search(FakePasses(), "forward", Clock(unlucky_once))
    assert found.best is not None and found.best.config == RULE and found.rule == pytest.approx(100e-6)


def test_where_the_rule_s_best_config_does_not_run_its_next_one_is_the_measure() -> None:
    passes = FakePasses(fails=lambda config: RuntimeError("no") if config == RULE else None)
    found = tuning.search(passes, "forward", Clock())
    assert found.rule == pytest.approx(dear(SMALLER)) and found.gain > 1


def test_a_card_that_takes_no_config_of_the_rule_may_take_another() -> None:
    passes = FakePasses(fails=lambda config: None if config.num_warps == 2 else RuntimeError("no"))
    found = tuning.search(passes, "forward", Clock())
    assert found.rule is None and found.best is not None and found.best.config.num_warps == 2
    assert "the rule's do not run" in str(found)


def test_a_quick_search_tries_fewer_configs() -> None:
    quick, whole = (tuning.search(FakePasses(), "forward", Clock(), quick=quick) for quick in (True, False))
    assert len(quick.outcomes) < len(whole.outcomes) and quick.gain > 1


def test_a_dead_card_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    passes = FakePasses(fails=lambda config: RuntimeError("launch failed") if config.num_warps == 2 else None)
    with pytest.raises(RuntimeError, match=r"does not answer after a call that failed \(launch failed\): an illegal"):
        tuning.search(passes, "forward", Clock())


def test_a_search_tells_what_became_of_each_config() -> None:
    passes = FakePasses(fails=lambda config: RuntimeError("no") if config.num_warps == 8 else None)
    found = tuning.search(passes, "forward", Clock())
    rows = json.loads(json.dumps(list(found.rows())))
    assert len(rows) == len(found.outcomes)
    assert rows[0]["config"]["block_keys"] == 32 and rows[0]["us"] == pytest.approx(dear(RULE) * 1e6, abs=0.01)
    assert [row["best"] for row in rows].count(True) == 1
    assert [row["config"] for row in rows if row["rule"]] == [rows[0]["config"]]
    assert {row["reason"] for row in rows if row["us"] is None} == {"RuntimeError: no"}
    words = str(found)
    assert words.startswith("forward, bfloat16, 4 heads of 32, up to 64 keys (448 from 32): rule 127.0 us, best ")


# The table


def load(path: Path) -> config_tables.Table:
    return config_tables.load(path.read_text(), "abacus")


def test_the_table_holds_the_best_config_and_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "abacus.json"
    (found,) = tune(path, Clock())
    assert found.best is not None
    table = load(path)
    assert table.entries[found.case].config == found.best.config
    assert table.entries[found.case].gain == pytest.approx(found.gain, abs=1e-4)
    assert set(table.made_with) == {"anyup", "torch", "triton", "on"}


def test_where_nothing_runs_there_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "abacus.json"
    (found,) = tune(path, Clock(), lambda w: FakePasses(w, fails=lambda config: RuntimeError("no")))
    assert found.best is None and "no config runs" in str(found)
    assert load(path).entries == {}


def test_one_case_is_tuned_once(tmp_path: Path) -> None:
    found = tune(tmp_path / "abacus.json", Clock(), workloads=[square(448, 32), square(448, 28)])
    assert [f.workload for f in found] == ["448 from 32"]


def test_other_entries_of_the_table_stay(tmp_path: Path) -> None:
    path = tmp_path / "abacus.json"
    tune(path, Clock())
    before = load(path).entries
    (other,) = tune(path, Clock(), lambda w: Bigger(w))
    assert before.items() < load(path).entries.items() and other.case not in before


@pytest.mark.parametrize(("together", "gives_way"), [(1.9, False), (1.97, False), (2.1, True)])
def test_two_kernels_run_where_they_are_faster_than_one_for_both(
    together: float, gives_way: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Told(FakePasses):
        def launch(self, kernel: str, config: Any) -> Any:
            return kernel, config

    def seconds(launch: Any) -> float:
        kernel, config = launch
        return dear(config) * (together if kernel == config_tables.AT_ONCE else 1.0)

    path = tmp_path / "abacus.json"
    found = {f.case.kernel: f for f in tune(path, Clock(seconds), Told, kernels=list(KINDS))}
    both = found[config_tables.AT_ONCE]
    entry = load(path).entries[both.case]
    assert both.best is not None and both.gives_way == gives_way == (entry.config is None)
    if gives_way:
        assert both.rule is not None and both.apart is not None
        assert entry.gain == pytest.approx(both.rule / both.apart, abs=1e-3)
    assert ", one kernel for each gradient " in str(both)
    rows = list(both.rows())
    assert all(("apart" in row) == gives_way for row in rows)
    assert sum(row["best"] for row in rows) == (not gives_way)


class Fewer(FakePasses):
    def most_keys(self, rows: int, columns: int) -> int:
        return (rows // 8 + 5) * (columns // 8 + 7)


class Bigger(FakePasses):
    def most_keys(self, rows: int, columns: int) -> int:
        return 4 * super().most_keys(rows, columns)


@pytest.mark.parametrize("content", ["{", '{"format": 9}'])
def test_a_table_that_is_none_is_made_anew(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "abacus.json"
    path.write_text(content)
    tune(path, Clock())
    assert len(load(path).entries) == 1
    assert f"{path} is made anew: " in capsys.readouterr().err


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interruption_leaves_the_table_complete_so_far_or_absent(finished: int, tmp_path: Path) -> None:
    def make(workload: Workload) -> FakePasses:
        first = workload.size[0] == 448
        return (FakePasses if first else Bigger)(
            workload, fails=lambda config: None if first and finished else KeyboardInterrupt()
        )

    path = tmp_path / "abacus.json"
    with pytest.raises(KeyboardInterrupt):
        tune(path, Clock(), make, workloads=[square(448, 32), square(1024, 64)])
    assert [p.name for p in tmp_path.iterdir()] == ["abacus.json"] * finished
    if finished:
        assert len(load(path).entries) == 1


def test_a_workload_that_does_not_fit_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(workload: Workload) -> FakePasses:
        if workload.size[0] > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB.\nMore words")
        return FakePasses(workload)

    found = tune(tmp_path / "abacus.json", Clock(), make, workloads=[square(2048, 128), square(448, 32)])
    assert [f.workload for f in found] == ["448 from 32"]
    assert "2048 from 128, bfloat16: left out, out of memory (CUDA out of memory. Tried" in capsys.readouterr().err


# The kernels, in Triton's interpreter


def passes_of(dtype: torch.dtype, workload: Workload = SMALL, **more: Any) -> AttentionPasses:
    return small_passes(dtype, CPU, workload=workload, **more)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rule_s_configs_pass_the_check_and_what_is_wrong_does_not(
    dtype: torch.dtype, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = passes_of(dtype)
    assert len(passes._crops) == 1  # two would overlap
    assert_check_finds_a_wider_window(passes)
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    for kernel in (kernel for kernel in KINDS if passes.rule(kernel)):  # nothing is written
        with pytest.raises(ParityError, match="error nan exceeds"):
            passes.check(kernel, passes.rule(kernel)[0])


def test_pixels_are_looked_at_in_the_middle_and_in_the_last_corner() -> None:
    passes = passes_of(torch.float32, Workload((40, 80), (6, 7), channels=2))
    middle, corner = (crop.area for crop in passes._crops)
    assert middle == (slice(15, 24), slice(33, 46)) and corner == (slice(31, 40), slice(67, 80))


@INTERPRETED
def test_a_tuned_config_is_what_the_next_call_is_launched_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, but for the clock: search, file, look-up, launch."""
    monkeypatch.setenv(config_tables.VARIABLE, str(tmp_path))
    config_tables.in_force.cache_clear()
    seen: list[dict[str, Any]] = []
    call = Launch.__call__

    def recorded(self: Launch) -> None:
        seen.append({**self.constants, **self.options})
        call(self)

    monkeypatch.setattr(Launch, "__call__", recorded)

    def clock(launch: Launch) -> float:
        return 1e-6 * (100 + 9 * abs(launch.options["num_warps"] - 2) + 9 * abs(launch.options["num_stages"] - 3))

    monkeypatch.setattr(tuning, "QUICK_ASPECTS", ("num_warps", "num_stages"))  # which the interpreter does not mind
    device = {"workloads": [SMALL], "dtypes": ["float16"], "kernels": ["forward"], "quick": True}
    make = lambda w, dtype, place: passes_of(dtype, w)  # noqa: E731
    try:
        (found,) = tuning.tune(CPU, "cpu", tmp_path / "cpu.json", clock, make=make, **device)  # type: ignore[arg-type]
        assert found.best is not None and found.gain > 1
        passes = passes_of(torch.float16)
        seen.clear()
        window_attention(passes.query, passes.key, passes.value, window=RatioWindow(0.1), backend="triton")
        (launched,) = seen
        assert (launched["num_warps"], launched["num_stages"]) == (2, 3)
    finally:
        config_tables.in_force.cache_clear()


# The command


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up card whose kernels are made up too; the folder of its table."""
    monkeypatch.setenv(config_tables.VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(tuning, "card", lambda name: CPU)
    monkeypatch.setattr(
        tuning, "AttentionPasses", lambda w, dtype, device, **asked: FakePasses(w, str(dtype)[6:], **asked)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9000")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(clocks, "CudaClock", lambda device, budget: Clock())
    monkeypatch.setattr(kernel_device, "_device_reasons", lambda device, interpreted: ())
    return tmp_path / "tables"


def test_the_command_writes_a_table_and_a_report(
    card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert cli.main(["tune", "--quick", "--report", str(report)]) == 0
    table, out = card / "abacus-9000.json", capsys.readouterr()
    entries = config_tables.load(table.read_text(), "Abacus 9000").entries
    assert {case.kernel for case in entries} == set(KINDS)
    *lines, first, second = out.out.splitlines()
    assert (first, second) == (str(table), str(report))
    assert len(lines) == len(entries) and all("x; " in line for line in lines)
    assert "tuning on Abacus 9000; ctrl-C ends it" in out.err
    assert {row["kernel"] for row in json.loads(report.read_text())["rows"]} == set(KINDS)


def test_an_interrupted_command_keeps_the_report_too(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(workload: Workload, dtype: torch.dtype, device: torch.device, **asked: Any) -> FakePasses:
        if workload.size[0] > 448:
            raise KeyboardInterrupt
        return FakePasses(workload, str(dtype)[6:])

    monkeypatch.setattr(tuning, "AttentionPasses", make)
    report = tmp_path / "report.json"
    assert cli.main(["tune", "--report", str(report)]) == 130
    assert len(config_tables.load((card / "abacus-9000.json").read_text(), "Abacus 9000").entries) == 3 * len(KINDS)
    assert {row["workload"] for row in json.loads(report.read_text())["rows"]} == {"448 from 32"}
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("built", "available", "device", "message"),
    [
        (None, False, None, r"no GPU to tune the kernels on: this build of torch \(.*\) has no CUDA and no ROCm"),
        ("13.0", False, None, "no GPU to tune the kernels on: torch sees no device"),
        ("13.0", True, "cpu", "device: kernels are tuned on a GPU, as cuda:0, got 'cpu'"),
        ("13.0", True, "gpu", "device: expected a card as cuda:0, got 'gpu'"),
        ("13.0", True, "cuda:1", "device: there are 1 cards, got 'cuda:1'"),
    ],
)
def test_the_command_says_why_it_cannot_run(
    built: str | None,
    available: bool,
    device: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    assert cli.main(["tune", *(["--device", device] if device else [])]) == 1
    out = capsys.readouterr()
    assert out.out == "" and re.fullmatch(f"anyup: error: {message}\n", out.err)


@INTERPRETED
def test_the_interpreter_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="the kernels do not run on cuda:0: Triton's interpreter runs on cpu"):
        tuning.card()


def test_without_triton_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    assert cli.main(["tune"]) == 1
    assert "triton is not installed (on Linux: pip install triton)" in capsys.readouterr().err


def test_a_workload_or_a_dtype_that_is_none_is_a_mistake_of_usage(
    card: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "--workload", "448 from 31"]) == 2
    assert "workload: expected one of 224 from 16, 448 from 32" in capsys.readouterr().err
    assert cli.main(["tune", "--dtype", "int8"]) == 2
    assert not card.exists()


def test_the_command_tunes_for_other_heads_another_window_and_another_precision(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakePasses] = []

    def make(workload: Workload, dtype: torch.dtype, device: torch.device, **asked: Any) -> FakePasses:
        made.append(FakePasses(workload, str(dtype)[6:], **asked))
        return made[-1]

    monkeypatch.setattr(tuning, "AttentionPasses", make)
    monkeypatch.setattr(tuning.fused, "unsupported", lambda problem: [])
    monkeypatch.setattr(kernel_device, "interprets", lambda: False)
    before = float32_matmul_precision("cuda")
    other = ["--heads", "8", "64", "--window", "cell", "--ratio", "0.2", "--precision", "high"]
    assert cli.main(["tune", "--quick", "--dtype", "float32", *other]) == 0
    assert float32_matmul_precision("cuda") == before
    assert {passes.window for passes in made} == {CellWindow(0.2)}
    entries = config_tables.load((card / "abacus-9000.json").read_text(), "Abacus 9000").entries
    assert {(case.heads, case.head_dim, case.precision) for case in entries} == {(8, 64, "tf32")}
    assert cli.main(["tune", "--quick", "--dtype", "float32", "--window", "none"]) == 0
    assert made[-1].window is None
    entries = config_tables.load((card / "abacus-9000.json").read_text(), "Abacus 9000").entries
    assert {(case.heads, case.precision) for case in entries} == {(8, "tf32"), (4, "tf32x3")}


@INTERPRETED
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--heads", "9", "32"], 1, "heads: 9 heads, at most 8"),
        (["--heads", "0", "32"], 2, "--heads: expected a whole number of at least 1, got '0'"),
        (["--heads", "4", "24"], 1, "heads: heads are 24 wide, the kernels take 16, 32, 64, 128"),
        (["--ratio", "nan"], 2, "--ratio: expected a number more than 0, got 'nan'"),
        (["--window", "round"], 2, "invalid choice: 'round'"),
        (["--precision", "medium"], 2, "invalid choice: 'medium'"),
    ],
)
def test_heads_a_window_or_a_precision_that_are_none_are_named(
    arguments: list[str], status: int, message: str, card: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *arguments]) == status
    assert message in capsys.readouterr().err
    assert not list(card.glob("*"))


def test_with_tables_off_there_is_nothing_to_write(
    card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(config_tables.VARIABLE, "off")
    assert cli.main(["tune"]) == 1
    assert "ANYUP_CONFIGS is 'off': unset it, or name a folder for the table" in capsys.readouterr().err


def test_info_tells_which_table_is_in_force(
    card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from anyup.cli import info

    assert cli.main(["tune", "--quick"]) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(kernel_device, "device_name", lambda device: ("Abacus 9000", "Abacus 8000")[device.index])
    lines = list(info._config_lines())
    assert lines[0] == f"folder of the user's tables: {card}"
    assert lines[1] == "cuda:0 Abacus 9000: tables, then the rule"
    assert lines[3].startswith(f"  user's: {2 * len(KINDS)} entries, anyup ")
    assert lines[4] == "cuda:1 Abacus 8000: the rule's"
    (card / "abacus-8000.json").write_text((card / "abacus-9000.json").read_text())
    config_tables.in_force.cache_clear()
    assert "user's: ignored, made for Abacus 9000 (" in list(info._config_lines())[6]
