"""The pages' tables of what `anyup evaluate` stored."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anyup.bench import stored

Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""A table's header and rows."""

_COLUMNS: dict[str, tuple[tuple[str, str, float, int], ...]] = {
    "segmentation": (("miou", "mIoU, %", 100, 2), ("accuracy", "pixel accuracy, %", 100, 2)),
    "depth": (
        ("rmse", "RMSE, m", 1, 4),
        ("delta1", "δ₁, %", 100, 2),
        ("scaled_rmse", "scaled: RMSE, m", 1, 4),
        ("scaled_delta1", "scaled: δ₁, %", 100, 2),
    ),
    "normals": (
        ("mean", "mean", 1, 2),
        ("median", "median", 1, 2),
        ("rmse", "RMSE", 1, 2),
        ("below_11_25", "< 11.25°", 100, 2),
        ("below_22_5", "< 22.5°", 100, 2),
        ("below_30", "< 30°", 100, 2),
    ),
}
"""Of a probe's table: a metric, its title, what it is multiplied by, and its decimals."""


def _named(results: Mapping[str, Any], method: str) -> str:
    """Weights as code, interpolation as a word."""
    return method if results["methods"][method]["kind"] == "interpolation" else f"`{method}`"


def probes(path: Path) -> Cells:
    """Mean and spread over the seeds of each method's metrics, and the mean loss of the last epoch."""
    results = stored.read_json(path, "results of `anyup evaluate`")
    columns = _COLUMNS[results["evaluation"]]
    rows = [
        (
            _named(results, method),
            *(
                f"{factor * of[name]['mean']:.{digits}f} ± {factor * of[name]['std']:.{digits}f}"
                for name, _, factor, digits in columns
            ),
            f"{statistics.fmean(results['losses'][-1][method]):.4f}",
        )
        for method, of in results["results"].items()
    ]
    return ("method", *(title for _, title, _, _ in columns), "training loss"), rows


def features(path: Path) -> Cells:
    """1 - cosine of the weights as a share of bilinear's, for each encoder and task."""
    results = stored.read_json(path, "results of `anyup evaluate`")
    learned = [name for name, method in results["methods"].items() if method["kind"] != "interpolation"]
    rows = [
        (f"`{encoder}`", task, *(f"{of['methods'][name]['relative']['ratio']:.3f}" for name in learned))
        for encoder, tasks in results["encoders"].items()
        for task, of in tasks.items()
    ]
    return ("encoder", "task", *(_named(results, name) for name in learned)), rows


EVALUATED: dict[str, Callable[[Path], Cells]] = {"probes": probes, "features": features}
