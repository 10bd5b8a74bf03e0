"""What the compiler makes of the kernels, without a GPU; compiled in a process that does not interpret kernels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from support.patience import PATIENCE
from support.processes import run_program

from anyup.bench.workloads import Workload, square
from anyup.kernels.window_attention_config import ForwardConfig
from anyup.window import axis_bounds
from benchmarks.modelled_gpu import codegen, compiled, roofline
from benchmarks.modelled_gpu.compiled import ARCHITECTURES, DTYPES, KERNELS, WINDOW, Case
from benchmarks.modelled_gpu.machine_code import Branch, Code, amd_blocks, nvidia_blocks
from benchmarks.modelled_gpu.occupancy import LIMITS
from benchmarks.modelled_gpu.operation_kernels import WITHOUT_PRODUCTS

pytestmark = pytest.mark.slow

SIZES = {(448, 32): 1.55, (1024, 64): 1.35, (2048, 128): 1.10}
"""Output and grid to the most key slots computed, in windows."""

KEYS_LOADED = 1.3
MODELLED = {
    ("80", "448 from 32"): 1.05,
    ("80", "1024 from 64"): 1.95,
    ("90", "448 from 32"): 1.05,
    ("90", "1024 from 64"): 2.1,
}
"""Modelled time of the forward kernel in floors, in bfloat16: what it has reached, by target and workload."""

BACKWARD_MODELLED = {
    ("backward_query", "80", "448 from 32"): 1.05,
    ("backward_query", "80", "1024 from 64"): 2.15,
    ("backward_query", "86", "448 from 32"): 1.05,
    ("backward_query", "90", "448 from 32"): 1.05,
    ("backward_query", "90", "1024 from 64"): 2.05,
    ("backward_key", "80", "448 from 32"): 3.3,
    ("backward_key", "90", "448 from 32"): 3.4,
    ("backward_value", "80", "448 from 32"): 2.3,
    ("backward_value", "90", "448 from 32"): 2.9,
    ("backward_key_value", "80", "448 from 32"): 4.95,
    ("backward_key_value", "90", "448 from 32"): 3.4,
}
"""The same of the backward kernels, by kernel, target and workload."""

BACKWARD_FLOAT32 = 4.25
"""The same in float32, on an A100 at 448 from 32."""

FORWARD_FLOAT32 = {
    ("80", "448 from 32"): 1.35,
    ("80", "1024 from 64"): 5.8,
    ("90", "448 from 32"): 1.05,
    ("90", "1024 from 64"): 6.0,
}
"""The same of the forward kernel, whose floor is one product of tf32 where a product of float32 takes three."""


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    """One process without TRITON_INTERPRET for all tests: to start it takes longer than most kernels do."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            process.submit(os.getpid).result(PATIENCE)
        yield process


def printed(compiler: Executor, program: str) -> str:
    """What a program prints in the compiler's process."""
    return compiler.submit(run_program, program).result(2 * PATIENCE)


def measured(compiler: Executor, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of `python -m benchmarks.modelled_gpu`."""
    file = folder / "codegen.json"
    command = ["--channels", "384", "--workers", "1", "--json", str(file), *arguments]
    compiler.submit(codegen.main, command).result(2 * PATIENCE)
    return json.loads(file.read_text())


def test_rows_of_other_cases_are_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    case = dict.fromkeys(("kernel", "dtype", "channels", "workload", "heads", "head_dim"))
    first, second, third = ({**case, "target": target, "registers": 1} for target in ("80", "90", "100"))
    file = tmp_path / "folder" / "codegen.json"
    codegen.store(file, [first, second])
    codegen.store(file, [{**first, "registers": 2}, third], merge=True)
    assert json.loads(file.read_text()) == [{**first, "registers": 2}, second, third]
    codegen.store(file, [third])
    assert json.loads(file.read_text()) == [third]
    assert [path.name for path in file.parent.iterdir()] == ["codegen.json"]


def test_processes_that_compile_hand_back_their_results_in_order() -> None:
    assert compiled._map(abs, [-3, 2, -1], workers=2) == [3, 2, 1]


@pytest.fixture(scope="module")
def rows(compiler: Executor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("codegen")
    forward = ("--kernel", KERNELS[0])
    return [
        *measured(compiler, folder, *forward, "--arch", "80", "90", "--dtype", "bfloat16", "float32"),
        *measured(compiler, folder, *forward, "--arch", "gfx942", "--dtype", "bfloat16"),
        *measured(compiler, folder, *forward, "--arch", "80", "--dtype", "bfloat16", "--heads", "8", "16"),
    ]


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel."""
    found = []
    if row["spill_bytes"] or row["spill_instructions"]:
        found.append(f"spills {row['spill_bytes']} bytes, {row['spill_instructions']} instructions")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, the limit is {row['shared_limit']}")
    if row["tensor_memory_columns"] > 512:
        found.append(f"{row['tensor_memory_columns']} columns of tensor memory, there are 512")
    if row["tensor_core_instructions"] == 0:
        found.append("no tensor cores")
    if row["target"] != "gfx942" and row["widest_store_bits"] < 128:
        found.append(f"stores {row['widest_store_bits']} bits at a time")
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_stored_kernel_can_be_launched(arch: str) -> None:
    """With its first config: beyond a limit a launcher goes on to the next one, and nothing else would show it."""
    stored = [row for row in json.loads(codegen.RESULT.read_text()) if row["target"] == arch]
    assert len({row["kernel"] for row in stored}) >= 20
    large = [what for row in stored for what in faults(row) if not what.startswith(("spills", "stores"))]
    assert not large
    idle = {row["kernel"] for row in stored if row["tensor_core_instructions"] is None}
    assert idle <= {*WITHOUT_PRODUCTS, "pixel_encoder_measure_1", "window_attention_points"}


def test_no_kernel_spills_or_asks_for_too_much_or_leaves_the_tensor_cores_idle(rows: Sequence[dict[str, Any]]) -> None:
    found = {f"{r['target']} {r['dtype']} {r['workload']} heads {r['heads']}": faults(r) for r in rows}
    assert len(rows) == 18
    assert not {name: what for name, what in found.items() if what}
    wide = {(r["target"], r["workload"]): r["modelled_us"] / r["floor_us"] for r in rows if r["dtype"] == "float32"}
    assert wide.keys() > FORWARD_FLOAT32.keys()
    assert not {case: wide[case] for case, most in FORWARD_FLOAT32.items() if wide[case] > most}


def test_backward_kernels_are_as_sound(compiler: Executor, tmp_path: Path) -> None:
    chosen = ["--smallest", "--kernel", *KERNELS[1:]]
    rows = [
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "90", "gfx942", "--dtype", "bfloat16"),
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "--dtype", "float32"),
    ]
    assert [row["kernel"] for row in rows] == 3 * list(KERNELS[1:]) + list(KERNELS[1:4])  # the last is for halves
    larger = measured(compiler, tmp_path, "--kernel", KERNELS[1], "--arch", "80", "90", "--dtype", "bfloat16")
    rows += [row for row in larger if row["workload"] == "1024 from 64"]
    rows += measured(compiler, tmp_path, "--smallest", "--kernel", KERNELS[1], "--arch", "86", "--dtype", "bfloat16")
    found = {f"{r['kernel']} {r['target']} {r['dtype']}": faults(r) for r in rows}
    assert not {name: what for name, what in found.items() if what}
    for row in rows:
        if row["floor_us"]:
            assert row["floor_us"] < row["modelled_us"], row
    reached = {
        (r["kernel"].removeprefix("window_attention_"), r["target"], r["workload"]): r["modelled_us"] / r["floor_us"]
        for r in rows
        if r["floor_us"] and r["dtype"] == "bfloat16"
    }
    wide = [r["modelled_us"] / r["floor_us"] for r in rows if r["dtype"] == "float32"]
    assert len(wide) == 3 and max(wide) <= BACKWARD_FLOAT32, wide
    assert reached.keys() == BACKWARD_MODELLED.keys()
    assert not {case: ratio for case, ratio in reached.items() if ratio > BACKWARD_MODELLED[case]}


def test_kernels_of_the_other_operations_are_as_sound(compiler: Executor, tmp_path: Path) -> None:
    backward = ("pixels", "map", "weights")
    kernels = (
        "feature_unification_forward",
        "key_grid_convolution",
        "query_projection_forward",
        *(f"query_projection_backward_{name}" for name in backward),
    )
    chosen = ["--smallest", "--kernel", *kernels]
    rows = [
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "90", "gfx942", "--dtype", "bfloat16"),
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "--dtype", "float32"),
    ]
    # The unification also with channels that the filters do not divide.
    assert [(row["kernel"], row["channels"]) for row in rows] == 4 * [
        (kernels[0], 384), (kernels[0], 192), *((kernel, 384) for kernel in kernels[1:])
    ]  # fmt: skip
    # A class's results of a program are 8 bytes a thread; for 16 a program would need so many positions that a small
    # grid has too few programs.
    wide = [
        {**row, "widest_store_bits": 2 * row["widest_store_bits"]} if row["channels"] == 192 else row for row in rows
    ]
    found = {f"{r['kernel']} {r['target']} {r['dtype']} {r['channels']}": faults(r) for r in wide}
    assert not {name: what for name, what in found.items() if what}
    for row in rows:
        if row["floor_us"]:
            # A loop of the first of these is peeled by the compiler, so that its turns cannot be read from the code.
            assert row["instructions_per_pixel"] or row["kernel"] == "query_projection_backward_pixels"
            assert row["floor_us"] < row["modelled_us"], row


# Bytes of a thread on sm_80.
FLOAT32_SPILLS = {
    "pixel_encoder_image_2": 48,
    "pixel_encoder_map_2": 40,
    "pixel_encoder_measure_2": 40,
    "pixel_encoder_apply": 96,
    "pixel_encoder_rotate": 432,
    "pixel_encoder_store_map": 168,
    "pixel_encoder_pair_3": 168,
    "pixel_encoder_pair_5": 216,
}


def test_kernels_of_the_pixel_encoder_are_as_sound(compiler: Executor, tmp_path: Path) -> None:
    """Some leave statistics alone, a vector for many pixels, whose store may be narrow.

    In half precision none spills; in float32 what is stated, of which a turn of thousands of instructions reads little.
    """
    of_statistics = [f"pixel_encoder_{name}" for name in ("image_2", "map_2", "measure_2")]
    of_maps = [f"pixel_encoder_{name}" for name in ("apply", "rotate", "store_map", "pair_3", "pair_5")]
    chosen = ["--smallest", "--kernel", *of_statistics, *of_maps]
    rows = [
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "90", "--dtype", "bfloat16"),
        *measured(compiler, tmp_path, *chosen, "--arch", "80", "--dtype", "float32"),
        *measured(
            compiler,
            tmp_path,
            "--smallest",
            "--kernel",
            "pixel_encoder_pair_3",
            "--arch",
            "gfx942",
            "--dtype",
            "bfloat16",
        ),
    ]
    assert [row["kernel"] for row in rows[:16]] == 2 * [*of_statistics, *of_maps]
    for row in rows:
        wide = row if row["kernel"] in of_maps else {**row, "widest_store_bits": 128}
        if row["dtype"] == "float32":
            stated = FLOAT32_SPILLS.get(row["kernel"], 0)
            assert row["spill_bytes"] <= stated, f"{row['kernel']} spills {row['spill_bytes']} bytes"
            wide |= {"spill_bytes": 0, "spill_instructions": 0} if stated else {}
        assert not faults(wide), f"{row['kernel']} {row['target']} {row['dtype']}"


@pytest.mark.parametrize(
    "change",
    [
        {"spill_bytes": 8},
        {"spill_instructions": 1},
        {"shared_limit": 1000},
        {"tensor_memory_columns": 513},
        {"tensor_core_instructions": 0},
        {"widest_store_bits": 64},
    ],
)
def test_a_planted_fault_is_found(rows: Sequence[dict[str, Any]], change: dict[str, int]) -> None:
    assert not faults(rows[0])
    assert faults({**rows[0], **change})


def test_a_config_that_is_too_large_is_seen_to_spill(compiler: Executor) -> None:
    config = ForwardConfig(8, 16, 32, 0, 128, 4, num_warps=4, num_stages=2, row_partials=4, load_once=True)
    text = printed(
        compiler,
        "from benchmarks.modelled_gpu.compiled import *\n"
        "from anyup.kernels.window_attention_config import ForwardConfig\n"
        f"code = compile_case(Case(workloads(384)[2], '80', 'bfloat16', config={config!r}))\n"
        "print(code.spill_bytes, code.spill_instructions)",
    )
    assert all(int(number) > 0 for number in text.split())


# Number and width of heads at the ends of what the kernels take: many wide ones have the most registers, whatever the
# target; the others, and float32 where nothing is known to spill, take turns with targets.
EXTREMES = [
    *((arch, "bfloat16", (8, 128)) for arch in ("80", "90", "100", "120")),
    ("80", "bfloat16", (8, 64)),
    ("100", "bfloat16", (8, 32)),
    ("90", "bfloat16", (8, 16)),
    ("120", "bfloat16", (1, 16)),
    ("90", "float32", (1, 128)),
    ("120", "float32", (1, 16)),
]


def test_the_widest_and_the_narrowest_heads_spill_nothing_where_keys_are_streamed(compiler: Executor) -> None:
    text = printed(
        compiler,
        "from benchmarks.modelled_gpu.compiled import *\n"
        f"for arch, dtype, heads in {EXTREMES!r}:\n"
        "    case = Case(square(2048, 128), arch, dtype, *heads)\n"
        "    code = compile_case(case)\n"
        "    assert not case.configs[0].resident_blocks\n"
        "    print(arch, dtype, heads, code.spill_bytes, code.spill_instructions, sep='; ')",
    )
    assert len(text.splitlines()) == len(EXTREMES)
    assert not [line for line in text.splitlines() if not line.endswith("; 0; 0")]


def test_products_are_all_on_the_tensor_cores(compiler: Executor) -> None:
    text = printed(
        compiler,
        "from benchmarks.modelled_gpu.compiled import *\n"
        "for arch in ('80', 'gfx942'):\n"
        "    case = Case(workloads(384)[0], arch, 'bfloat16')\n"
        "    text = compilation_of(case.launch(), target_of(arch)).run().asm['ttgir']\n"
        "    for line in text.splitlines():\n"
        "        if 'tt.dot ' in line: print(line.split('->')[-1].split('loc(')[0])\n"
        "    layouts = [l for l in text.splitlines() if l.startswith('#mma')]\n"
        "    print(*layouts, sep='\\n')\n",
    )
    products = [line for line in text.splitlines() if "tensor<" in line]
    assert products
    assert all("#mma" in line for line in products)


def test_window_bounds_divide_as_ieee_does(compiler: Executor) -> None:
    text = printed(
        compiler,
        "import triton, triton.language as tl\n"
        "from triton.compiler import ASTSource\n"
        "from benchmarks.modelled_gpu.ahead_of_time import target_of\n"
        "from tests.support.bounds_kernel import bounds\n"
        "signature = {'out': '*i32', 'queries': 'i32', 'keys': 'i32', 'ratio': 'fp32'}\n"
        "print(triton.compile(ASTSource(bounds, signature), target=target_of(90)).asm['ptx'])",
    )
    assert "div.rn.f32" in text
    assert not re.search(r"div\.full|div\.approx|rcp\.", text)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "limit"), SIZES.items())
def test_hardly_more_keys_are_worked_on_than_the_windows_hold(
    arch: str, dtype: str, sizes: tuple[int, int], limit: float
) -> None:
    work = Case(square(*sizes), arch, dtype).work()
    assert work.window <= work.logit_slots <= limit * work.window
    assert work.window <= work.value_slots <= limit * work.window
    assert work.tile_keys <= KEYS_LOADED * work.window


def test_15_by_15_keys_stay_in_registers_where_these_are_enough() -> None:
    configs = {arch: Case(square(896, 64), arch, "bfloat16").configs[0] for arch in ARCHITECTURES}
    kept = {arch: (config.resident_blocks, config.tail_keys) for arch, config in configs.items()}
    assert kept == {arch: (7, 16) if arch in ("80", "86", "89", "90") else (0, 0) for arch in ARCHITECTURES}
    wide = Case(square(896, 64), "80", "bfloat16", heads=8).configs[0]
    assert (wide.resident_blocks, wide.tail_keys) == (0, 0)


def test_blocks_of_64_keys_would_be_too_many() -> None:
    config = ForwardConfig(8, 16, 64, 2, 64, 1, num_warps=8, num_stages=2, row_partials=4, load_once=True)
    work = Case(square(448, 32), "90", "bfloat16", config=config).work()
    assert work.logit_slots > SIZES[448, 32] * work.window


def test_work_agrees_with_a_count_pixel_by_pixel() -> None:
    workload = Workload((20, 13), (6, 5))
    config = ForwardConfig(8, 4, 16, 0, 16, 2, num_warps=4, num_stages=1, row_partials=4, load_once=True)
    work = Case(workload, "80", "bfloat16", config=config).work()
    bounds = [axis_bounds(WINDOW, q, k) for q, k in zip(workload.size, workload.grid, strict=True)]
    seen = slots = loaded = 0
    for top in range(0, 20, 8):
        for left in range(0, 13, 4):
            rows, columns = range(top, min(top + 8, 20)), range(left, min(left + 4, 13))
            keys = 1
            for (start, stop), axis in zip(bounds, (rows, columns), strict=True):
                keys *= max(stop[i] for i in axis) - min(start[i] for i in axis)
            slots += 32 * (-(-keys // 16) * 16)
            loaded += 32 * keys
            seen += sum(
                (bounds[0][1][i] - bounds[0][0][i]) * (bounds[1][1][j] - bounds[1][0][j]) for i in rows for j in columns
            )
    assert work.window == pytest.approx(seen / 260)
    assert work.logit_slots == pytest.approx(slots / 260)
    assert work.tile_keys == pytest.approx(loaded / 260)
    assert work.value_operations == pytest.approx(2 * slots / 260 * 384)
    # 12 runs of two slices of 16 channels, each after logits made anew.
    assert work.logit_operations == pytest.approx(2 * 13 * slots / 260 * 128)


def test_branches_are_counted_by_the_tiles_that_take_them() -> None:
    config = ForwardConfig(8, 8, 32, 6, 64, 1, num_warps=4, num_stages=2, tail_keys=16)
    work = Case(square(1024, 64), "80", "bfloat16", config=config).work()
    axis = list(zip(*axis_bounds(WINDOW, 1024, 64), strict=True))
    ends = [(axis[first], axis[first + 7]) for first in range(0, 1024, 8)]
    cores = [max(0, low[1] - high[0]) for low, high in ends]
    tiles = [a * b for a in cores for b in cores]
    shares = [sum(core < end for core in tiles) / len(tiles) for end in (32, 64, 96, 128, 160, 192, 208)]
    masks = [Branch(pytest.approx(share)) for share in shares]
    assert work.turns == [*masks, (4, masks), (6, [])]
    assert work.logit_slots == work.value_slots == 208


@pytest.mark.parametrize("workload", ["448 from 32", "1024 from 64"])
def test_modelled_time_is_close_to_the_floor(rows: Sequence[dict[str, Any]], workload: str) -> None:
    chosen = [r for r in rows if r["floor_us"] and r["dtype"] == "bfloat16" and r["workload"] == workload]
    chosen = [r for r in chosen if r["heads"] == 4]
    assert {r["device"] for r in chosen} == {"A100 SXM 80GB", "H100 SXM"}
    for row in chosen:
        assert row["floor_us"] < row["modelled_us"] <= MODELLED[row["target"], workload] * row["floor_us"], row


def test_the_floor_is_the_longest_of_its_terms() -> None:
    device = roofline.device_of(80)
    assert device is not None
    work = {"bytes_compulsory": 1000.0, "operations": 1000.0, "exponentials": 1.0}
    floor = roofline.floor(device, 10**6, **work, half=True)
    assert floor.binding == "memory"
    assert floor.total == pytest.approx(1e6 * 1e9 / 2039e9)
    assert roofline.floor(device, 10**6, **{**work, "operations": 1e6}, half=True).binding == "tensor"
    assert roofline.floor(device, 10**6, **{**work, "exponentials": 1e5}, half=True).binding == "special"


def test_phases_follow_each_other_where_a_multiprocessor_has_one_program() -> None:
    device = roofline.device_of(90)
    assert device is not None
    work = {"bytes_compulsory": 500.0, "bytes_asked": 500.0, "operations": 5e5, "exponentials": 10.0}
    uses = {"issue": 100.0, "special": 20.0, "L1": 60.0, "float64": 0.0, "integer": 50.0, "float32": 40.0}
    two = roofline.Execution(uses, False, False, 2, 10 * device.sms)
    beside = roofline.modelled(device, 10**6, two, **work, half=True)
    assert beside.total == beside.terms["tensor"] + roofline.LAUNCH_US
    for alone in (replace(two, together=1), replace(two, programs=device.sms)):
        after = roofline.modelled(device, 10**6, alone, **work, half=True)
        assert after.terms == pytest.approx(beside.terms)
        longest = sum(after.terms[name] for name in ("memory", "tensor", "L1"))
        assert after.total == pytest.approx(longest + roofline.LAUNCH_US)
        ahead = roofline.modelled(device, 10**6, replace(alone, ahead=True), **work, half=True)
        assert ahead.total == pytest.approx(after.total - after.terms["memory"])
        slow = roofline.modelled(device, 10**6, replace(alone, ahead=True), **{**work, "bytes_asked": 1e5}, half=True)
        assert slow.total == pytest.approx(slow.terms["L2"] + roofline.LAUNCH_US)
    uneven = roofline.modelled(device, 10**6, replace(two, programs=2 * device.sms + 1), **work, half=True)
    for unit in (*uses, "tensor"):  # three programs are waited for
        assert uneven.terms[unit] == pytest.approx(beside.terms[unit] * 3 * device.sms / (2 * device.sms + 1))
    assert uneven.terms["memory"] == beside.terms["memory"]
    by_warp = roofline.modelled(device, 10**6, replace(two, by_warp=True), **work, half=True)
    assert by_warp.terms["tensor"] == pytest.approx(beside.terms["tensor"] / 0.629)
    unknown = roofline.modelled(device, 10**6, replace(two, uses=None), **work, half=True)
    assert unknown.terms["special"] == pytest.approx(1e6 * 2e7 / (16 * device.sms * device.clock))


@pytest.mark.parametrize("device", roofline.DEVICES, ids=lambda device: device.name)
def test_a_device_s_rates_are_those_of_its_tensor_cores_at_its_clock(device: roofline.Device) -> None:
    operations = {80: 2048, 90: 4096, 89: 512, 86: 512}[device.arch]  # of 16 bits, a cycle and multiprocessor
    assert device.tensor == pytest.approx(operations * device.sms * device.clock, rel=1e-3)
    assert device.tensor_tf32 == pytest.approx(device.tensor / 2)
    lanes = {80: (64, 32), 90: (128, 64), 89: (128, 2), 86: (128, 2)}[device.arch]  # of float32 and of float64
    assert (device.lanes, device.lanes_float64) == lanes
    assert device.plain == 2 * 32 * device.rate("float32")
    cycles = {"issue": 4, "special": 1 / 2, "L1": 1, "integer": 2, "float64": lanes[1] / 32}
    for unit, uses in cycles.items():
        assert device.rate(unit) == pytest.approx(uses * device.sms * device.clock)
    # Multiprocessors read at most 64 bytes a cycle each.
    assert device.memory < device.l2 < 64 * device.sms * device.clock


def test_a_new_image_size_compiles_nothing(compiler: Executor) -> None:
    text = printed(
        compiler,
        "from benchmarks.modelled_gpu.compiled import *\nfrom anyup.bench.workloads import Workload\n"
        "config = Case(workloads(384)[0], '90', 'bfloat16').configs[0]\n"
        "cases = [((448, 448), (32, 32), 384), ((464, 400), (29, 25), 768), ((129, 17), (3, 1), 384)]\n"
        "cases = [Case(Workload(s, g, c), '90', 'bfloat16', config=config) for s, g, c in cases]\n"
        "cases.append(Case(Workload((448, 448), (32, 32), 383), '90', 'bfloat16', config=config))\n"
        "parts = ((0, 0, 2048, 2048), (1, 16, 1999, 460))\n"
        "cases += [Case(Workload((48, 448), (32, 32), 384), '90', 'bfloat16', config=config, part=p) for p in parts]\n"
        "print(*[key_of(case) for case in cases])",
    )
    first, second, third, odd_channels, one_part, another = text.split()
    assert first == second == third
    assert odd_channels != first  # the keys do tell kernels apart
    assert one_part == another != first


def test_no_stride_is_multiplied_in_32_bits(compiler: Executor) -> None:
    """At 2048 x 2048, C = 1024 and batch 4 the output has 2^34 elements."""
    text = printed(
        compiler,
        "from benchmarks.modelled_gpu.compiled import *\n"
        "part = (1024, 1024, 4096, 4096)\n"
        "for dtype, grid, part in (\n"
        "    ('bfloat16', 128, None), ('float32', 128, None), ('bfloat16', 64, None), ('bfloat16', 64, part)\n"
        "):\n"
        "    case = Case(square(2048, grid, channels=1024, batch=4), '90', dtype, save_lse=True, part=part)\n"
        "    print(compilation_of(case.launch(), target_of('90')).run().asm['ttir'])",
    )
    assert "stride" in text
    assert not narrow_strides(text)
    assert narrow_strides("%x = arith.muli %a, %key_row_stride : i32")


def narrow_strides(text: str) -> list[str]:
    """Lines of Triton's IR that multiply or splat a stride, or the channels, in 32 bits, before they are widened."""
    return [
        line
        for line in text.splitlines()
        if re.search(r"arith\.muli|tt\.splat", line) and re.search(r"%\w*stride\b|%channels\b", line)
        if re.search(r":\s*(tensor<[^>]*x)?i32", line) and not re.search(r"splat %channels", line)
    ]


def test_every_target_has_limits_and_devices_are_targets() -> None:
    assert set(ARCHITECTURES) == set(LIMITS)
    assert {str(device.arch) for device in roofline.DEVICES} <= set(ARCHITECTURES)


LOOPS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0030*/                   BRA.DIV ~URZ, `(.L_x_9) ;
        /*0040*/              @P1 BRA `(.L_x_1) ;
        /*0050*/                   FMUL R1, R1, R2 ;
        /*0060*/              @!P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   CALL.REL.NOINC `($__internal_0) ;
        /*0090*/                   EXIT ;
.L_x_9:
        /*00a0*/                   MUFU.EX2 R1, R1 ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""


def test_instructions_in_loops_count_as_often_as_the_loops_turn() -> None:
    code = Code(1, 0, 0, 0, 0, 4, tuple(nvidia_blocks(LOOPS)))
    executed = code.executed([(3, [(5, [])])])
    assert executed["MOV"] == 1
    assert executed["FADD"] == executed["FMUL"] == 3
    assert executed["MUFU"] == 0  # only after a divergence
    assert executed["BRA"] == 1 + 15 + 15 + 3
    with pytest.raises(ValueError, match="loops"):
        code.executed([(3, []), (2, [])])


def test_a_use_of_a_unit_is_of_32_lanes_of_4_bytes() -> None:
    names = [
        *("MUFU.EX2", "MUFU.RCP", "SHFL.BFLY", "LDS.128", "LDG.E.64", "STG.E.128", "STS", "LDSM.16.MT88.4"),
        *(
            "LDGSTS.E.BYPASS.LTC128B.128",
            "DFMA",
            "F2F.F32.F64",
            "I2F.F64",
            "FFMA.FTZ",
            "IMAD.MOV.U32",
            "IADD3.X",
            "NOP",
        ),
        *("LDGDEPBAR", "LDC.64", "STL.64"),
    ]
    text = "".join(f"        /*{16 * n:04x}*/                   {name} R1, R2 ;\n" for n, name in enumerate(names))
    code = Code(1, 0, 0, 0, 0, 4, tuple(nvidia_blocks(text)))
    uses = {"special": 2, "L1": 1 + 4 + 2 + 4 + 1 + 4 + 4 + 2, "float64": 3, "float32": 2, "integer": 1}
    assert code.uses([]) == {"issue": len(names), **uses}
    assert code.loads_ahead([])
    text = text.replace("STS.E.BYPASS", ".E")
    assert not Code(1, 0, 0, 0, 0, 4, tuple(nvidia_blocks(text))).loads_ahead([])


SKIPPED = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   FMUL R1, R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
{inside}
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/              @!P2 BRA `(.L_x_2) ;
        /*0050*/                   MOV R1, R2 ;
.L_x_2:
        /*0060*/                   EXIT ;
"""


def test_what_a_branch_skips_counts_as_often_as_it_is_run() -> None:
    text = SKIPPED.format(inside="        /*0028*/                   FADD R1, R1, R2 ;\n" * 20)
    code = Code(1, 0, 0, 0, 0, 4, tuple(nvidia_blocks(text)))
    executed = code.executed([(8, [Branch(0.25)])])
    assert executed["FADD"] == 8 * 0.25 * 20
    assert executed["FMUL"] == 8
    assert executed["MOV"] == 2  # one instruction is no branch worth telling
    # Where the code has other branches, all count as taken.
    assert code.executed([(8, [Branch(0.25), Branch(0.5)])])["FADD"] == 8 * 20
    assert code.executed([Branch(0.5), (8, [])])["FADD"] == 8 * 20
    with pytest.raises(ValueError, match="loops"):
        code.executed([(8, [Branch(0.25)]), (2, [])])


def test_loops_of_amd_code_are_read_too() -> None:
    text = ".LBB0_1:\n\tv_add_f32 v0, v0, v1\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
    executed = Code(1, 0, 0, 0, 0, 4, tuple(amd_blocks(text))).executed([(7, [])])
    assert executed["v_add_f32"] == 7
    assert executed["s_endpgm"] == 1
