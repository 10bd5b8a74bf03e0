"""The pages' tables of what `anyup evaluate` stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anyup.bench import stored
from anyup.evaluation.report import probes_table

Cells = tuple[list[str], list[list[str]]]
"""A table's header and rows."""


EDITIONS = {
    "147d84054b6b00432547112c2ef3035a86d8ff20c516ac4f44b5c80a7c01b555": "first edition",
    "33c6287e4fdf754cd7561b08964e29d7bd402749858833aba24a3990f899526d": "second edition",
}
"""Earlier `anyup_mini`, by their sha256 in results; what is stored of them is not of the weights in the package."""


def _named(results: Mapping[str, Any], method: str) -> str:
    """Weights as code, with their edition where they are an earlier one, and interpolation as a word."""
    described = results["methods"][method]
    if described["kind"] == "interpolation":
        return method
    edition = EDITIONS.get(described.get("sha256"))
    return f"`anyup_mini`, {edition}" if edition else f"`{method}`"


def probes(path: Path) -> Cells:
    """Mean and spread over the seeds of each method's metrics, and the mean loss of the last epoch."""
    results = stored.read_json(path, "results of `anyup evaluate`")
    header, rows = probes_table(results["evaluation"], results["results"], results["losses"])
    return header, [[_named(results, method), *cells] for method, *cells in rows]


def features(path: Path) -> Cells:
    """1 - cosine of the weights as a share of bilinear's, for each encoder and task."""
    results = stored.read_json(path, "results of `anyup evaluate`")
    learned = [name for name, method in results["methods"].items() if method["kind"] != "interpolation"]
    rows = [
        [f"`{encoder}`", task, *(f"{of['methods'][name]['relative']['ratio']:.3f}" for name in learned)]
        for encoder, tasks in results["encoders"].items()
        for task, of in tasks.items()
    ]
    return ["encoder", "task", *(_named(results, name) for name in learned)], rows


def card(path: Path) -> Cells:
    """Of one set of weights and each encoder: `features`, and the share of photographs that are better than bilinear.

    A row for each encoder, a pair of columns for each task.
    """
    results = stored.read_json(path, "results of `anyup evaluate`")
    (learned,) = (name for name, method in results["methods"].items() if method["kind"] != "interpolation")
    rows, tasks = [], list[str]()
    for encoder, of_encoder in results["encoders"].items():
        relative = [of["methods"][learned]["relative"] for of in of_encoder.values()]
        rows.append(
            [f"`{encoder}`", *(cell for of in relative for cell in (f"{of['ratio']:.3f}", f"{of['better']:.0%}"))]
        )
        tasks = tasks or list(of_encoder)
    return ["encoder", *(title for task in tasks for title in (task, "better on"))], rows


EVALUATED: dict[str, Callable[[Path], Cells]] = {"probes": probes, "features": features, "card": card}
