"""What the compiler makes of each kernel, and a roofline of it; no GPU is needed.

    python -m benchmarks.modelled_gpu [--kernel NAME] [--arch 80 90 gfx942] [--dtype bfloat16] [--json FILE [--merge]]
    python -m benchmarks.modelled_gpu --model [--workload "448 from 32"] [--dtype bfloat16] [--json FILE]
    python -m benchmarks.modelled_gpu --model --backward [--dtype bfloat16] [--json FILE]

Every launch is planned by the package itself, with the config that it would choose, and compiled ahead of time.
Registers, spills, shared memory and instructions are the compiler's; bytes, operations and times are *modelled*
(`roofline`). A target with a device in the roofline's table gets that device's times. With `--model` the launches are
those of whole forwards, on each of these devices (`model`), and with `--backward` those of a training step.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "results" / "codegen.json"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line for each row; times are modelled."""
    head = (
        "kernel", "target", "dtype", "C", "workload", "tile, block, warps", "reg", "spill", "shared KB", "warps/SM",
        "tensor", "ld/st bits", "instr/px", "B/px asked", "floor us", "modelled us", "ratio", "binds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        config = row["config"]
        pixels = config.get("block_pixels")
        if "block_keys" in config:
            block = f"{config.get('resident_blocks') or 'any'} x {config['block_keys']}"
        else:
            block = f"{pixels} pixels" if pixels else "-"
        warps = min(row["warps_by_registers"], row["warps_by_shared"], row["warps_by_threads"])
        ratio = f"{row['modelled_us'] / row['floor_us']:.2f}" if row["floor_us"] else ""
        cells = (
            row["kernel"].removeprefix("window_attention_"), row["target"], row["dtype"], row["channels"],
            row["workload"], f"{config.get('rows', '-')}x{config.get('columns', '-')}, {block}, {config['num_warps']}",
            row["registers"],
            f"{row['spill_bytes']}/{row['spill_instructions']}", f"{row['shared_bytes'] / 1024:.0f}",
            f"{warps}/{row['warps_of']}", "-" if (products := row["tensor_core_instructions"]) is None else products,
            f"{row['widest_load_bits']}/{row['widest_store_bits']}", row["instructions_per_pixel"] or "",
            f"{row['bytes_per_pixel']:.0f}/{row['bytes_asked_per_pixel']:.0f}", row["floor_us"] or "",
            row["modelled_us"] or "", ratio, row["modelled_term"] or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def store(file: Path, rows: Sequence[dict[str, Any]], *, merge: bool = False) -> None:
    """Write rows of kernels as JSON; with `merge` in the place of the file's rows of the same cases."""
    names = ("kernel", "target", "dtype", "channels", "workload", "heads", "head_dim")
    kept = json.loads(file.read_text()) if merge and file.exists() else []
    write(file, list({tuple(row[name] for name in names): row for row in (*kept, *rows)}.values()))


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, a line for each; the file is complete at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(partial, file)


def print_model(workloads: Sequence[str], dtypes: Sequence[str], channels: int, file: Path | None) -> None:
    """Print whole forwards on each device, and what they are to reach; store them in `file`, where there is one.

    Of all but the first workload the stages are stored and not their launches.
    """
    from benchmarks.modelled_gpu import model, roofline

    asked = [model.workload_of(workload, channels) for workload in workloads]
    rows = [row for each in asked for dtype in dtypes for row in model.rows(each, dtype, roofline.DEVICES)]
    if file:
        levels = ("stage", "sum")
        write(file, [row for row in rows if row["workload"] == asked[0].name or row["level"] in levels])
    print(f"C = {channels}: counted from launches and code; times modelled.\n")
    print(model.table(rows))
    print("", *model.verdicts(rows), sep="\n")


def print_training_step(dtypes: Sequence[str], file: Path | None) -> None:
    """Print a training step on each device; store it in `file`, where there is one."""
    from benchmarks.modelled_gpu import roofline, training_step

    rows = [row for dtype in dtypes for row in training_step.rows(dtype, roofline.DEVICES)]
    if file:
        write(file, rows)
    print("Counted from launches, torch's calls and code; times modelled.\n")
    print(training_step.table(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from benchmarks.modelled_gpu import operation_kernels
    from benchmarks.modelled_gpu.compiled import (
        ARCHITECTURES,
        CHANNELS,
        DTYPES,
        HEAD_DIM,
        HEADS,
        KERNELS,
        cases,
        measure,
    )

    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelled_gpu", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--channels", nargs="+", type=int, default=CHANNELS, help="of --model: the first")
    parser.add_argument("--heads", nargs=2, type=int, default=(HEADS, HEAD_DIM), metavar=("NUMBER", "WIDTH"))
    every = (*KERNELS, *operation_kernels.KERNELS)
    parser.add_argument("--kernel", nargs="+", default=every, choices=every)
    parser.add_argument("--smallest", action="store_true", help="the smallest workload alone")
    parser.add_argument("--json", type=Path, help=f"where to store the rows; the repository's is {RESULT}")
    parser.add_argument("--merge", action="store_true", help="keep the file's rows of other cases")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--model", action="store_true", help="the whole forward, stage by stage, modelled")
    parser.add_argument("--backward", action="store_true", help="of --model: a training step of the published recipe")
    parser.add_argument("--workload", nargs="+", default=["448 from 32"], help="of --model: output and grid")
    chosen = parser.parse_args(arguments)
    if chosen.backward:
        if not chosen.model:
            parser.error("--backward: belongs to --model")
        print_training_step(chosen.dtype, chosen.json)
        return
    if chosen.model:
        print_model(chosen.workload, chosen.dtype, chosen.channels[0], chosen.json)
        return
    sizes = slice(1) if chosen.smallest else slice(None)
    attention = [name for name in chosen.kernel if name in KERNELS]
    others = [name for name in chosen.kernel if name not in KERNELS]
    wanted = list(cases(chosen.arch, chosen.dtype, chosen.channels, tuple(chosen.heads), attention, sizes))
    rows = measure(wanted, chosen.workers)
    for case in operation_kernels.cases(chosen.arch, chosen.dtype, others, sizes):
        rows.append(operation_kernels.row_of(case))
    if chosen.json:
        store(chosen.json, rows, merge=chosen.merge)
    print("Code by the compiler; bytes, operations and times modelled.\n")
    print(table(rows))
