"""Results: as JSON for machines, as a table for people."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from anyup._version import __version__
from anyup.images import complete_or_absent


class Column(NamedTuple):
    """Of a probe's table: a metric, its title, what it is multiplied by, and its decimals."""

    metric: str
    title: str
    factor: float
    digits: int


_COLUMNS = {
    "segmentation": (Column("miou", "mIoU, %", 100, 2), Column("accuracy", "pixel accuracy, %", 100, 2)),
    "depth": (
        Column("rmse", "RMSE, m", 1, 4),
        Column("delta1", "δ < 1.25, %", 100, 2),
        Column("scaled_rmse", "scaled: RMSE, m", 1, 4),
        Column("scaled_delta1", "scaled: δ < 1.25, %", 100, 2),
    ),
    "normals": (
        Column("mean", "mean, °", 1, 2),
        Column("median", "median, °", 1, 2),
        Column("rmse", "RMSE, °", 1, 2),
        Column("below_11_25", "< 11.25°, %", 100, 2),
        Column("below_22_5", "< 22.5°, %", 100, 2),
        Column("below_30", "< 30°, %", 100, 2),
    ),
}


def probes_table(
    evaluation: str,
    results: Mapping[str, Any],
    losses: Sequence[Mapping[str, Sequence[float]]],
    *,
    metres: bool = True,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean and spread over the seeds of each method's metrics, and its mean loss in the last epoch.

    Args:
        evaluation: "segmentation", "depth" or "normals".
        metres: whether depth is in metres; relative depth has no unit.
    """
    columns = _COLUMNS[evaluation]
    titles = [column.title if metres else column.title.removesuffix(", m") for column in columns]
    rows = [
        [
            method,
            *(
                f"{factor * of[metric]['mean']:.{digits}f} ± {factor * of[metric]['std']:.{digits}f}"
                for metric, _, factor, digits in columns
            ),
            f"{statistics.fmean(losses[-1][method]):.4f}",
        ]
        for method, of in results.items()
    ]
    return ["method", *titles, "training loss"], rows


def write_json(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Write results, complete or not at all; a number that is not finite is an error."""
    text = json.dumps(results, indent=1, allow_nan=False)
    with complete_or_absent(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the results were made with."""
    return {
        "anyup": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (of a sample; 0 for one value) of a non-empty sequence."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table, the columns aligned for a terminal."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def number(value: float, digits: int = 4) -> str:
    """A number with so many decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
