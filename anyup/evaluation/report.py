"""Results: as JSON for machines, as a table for people."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from anyup._version import __version__
from anyup.images import complete_or_absent


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
