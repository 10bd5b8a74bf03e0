"""Plots of results, as matplotlib figures and as SVG that takes its colours from the page it stands in.

Series differ by marker and dash as well as by colour. Text stays text in the SVG.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anyup.bench.report import formatting
from anyup.bench.stored import Row, rows_of
from anyup.installing import pip_install
from anyup.progress import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for one of the page's: each is found in the SVG and replaced.
INK, GRID, PAGE = "#111213", "#d0d1d2", "#fefdfc"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_OF_PAGE = {
    INK: "currentColor",
    GRID: "var(--grid)",
    PAGE: "var(--page)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}

# Light enough for dark text on them, on a light page and on a dark one.
_STAGES = ("#8ecae6", "#f6bd60", "#b5d99c", "#f4a6a0", "#cdb4db", "#a8b8c8", "#e8dab2", "#84d2c5", "#f0c6dd")
_ON_STAGE = "#101010"

_MARKERS = "os^DvP"
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": PAGE,
    "axes.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}

_WIDTH = 7.6  # inches; 72 of the SVG's units each


def require_matplotlib() -> None:
    """Raise ImportError saying what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {pip_install('matplotlib')}") from error


def drawn(draw: Callable[..., Figure | None], *data: Any) -> Figure | None:
    """A figure in this module's style; None where there is nothing to draw."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return draw(*data)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element to stand in a page; its ids begin with what `name` gives, the same each time."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        # A page colour behind everything, so that the page's own shows through.
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Figures on one page share a space of ids: matplotlib's own are figure_1, axes_1 in each.
    prefix = "p" + hashlib.sha256(name.encode()).hexdigest()[:6] + "-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    for colour, of_page in _OF_PAGE.items():
        text = text.replace(colour, of_page)
    return text


# Over resolution


def time_figure(results: Mapping[str, Any]) -> Figure | None:
    """Time against the side of the output, log-log, ours, the published forward, and the floor."""
    series = curves(results)
    if not series:
        return None
    figure, axes = _figure(4.6)
    for number, (backend, rows) in enumerate(series.items()):
        _line(axes, number, backend, rows, "seconds")
        expected = [row for row in rows if row.get("expected_seconds") and row["status"] == "over budget"]
        if expected:
            axes.plot(
                [side(row) for row in expected],
                [row["expected_seconds"] for row in expected],
                linestyle="none",
                marker=_MARKERS[number % len(_MARKERS)],
                markerfacecolor="none",
                color=SERIES[number % len(SERIES)],
                label=f"{formatting.backend(backend)}: expected, not run",
            )
    ours = next(iter(series.values()))
    _floor(axes, ours, "floor_seconds", "floor: the arithmetic at a matrix product's rate")
    _finish_curve(axes, series, "time of a call", formatting.seconds)
    return figure


def memory_figure(results: Mapping[str, Any]) -> Figure | None:
    """Peak memory against the side of the output, log-log, and the output's own size."""
    series = curves(results)
    if not any(row.get("peak_bytes") for rows in series.values() for row in rows):
        return None
    figure, axes = _figure(4.6)
    for number, (backend, rows) in enumerate(series.items()):
        _line(axes, number, backend, rows, "peak_bytes")
    _floor(axes, next(iter(series.values())), "output_bytes", "floor: the output alone")
    _finish_curve(axes, series, "peak memory above the model", human_bytes)
    return figure


def curves(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """For each backend the whole model's forward rows over resolution, ours first; empty without two sizes of ours.

    Square images in a batch of one, of the dtype and the number of channels that most rows have.
    """
    rows = [
        row
        for name in ("curve", "model")
        for row in rows_of(results, group=name, operation="model", **{"pass": "forward"})
        if _is_square(row)
    ]
    if not rows:
        return {}
    kinds = [(row["dtype"], row.get("channels")) for row in rows]
    kind = max(kinds, key=kinds.count)
    rows = [row for row in rows if (row["dtype"], row.get("channels")) == kind]
    ours: dict[int, Row] = {}
    for row in rows:
        if row["backend"] == "anyup":
            ours.setdefault(side(row), row)
    if len(ours) < 2:
        return {}
    found: dict[str, dict[int, Row]] = {"anyup": ours}
    for row in rows:
        same = ours.get(side(row))
        if row["backend"] != "anyup" and same is not None and same["grid"] == row["grid"]:
            found.setdefault(row["backend"], {}).setdefault(side(row), row)
    return {backend: [by_side[key] for key in sorted(by_side)] for backend, by_side in found.items()}


def side(row: Row) -> int:
    """Pixels of a side of a square output."""
    return int(row["size"][0])


def _is_square(row: Row) -> bool:
    sizes = [row.get("size"), row.get("grid")]
    square = all(isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1] for size in sizes)
    return square and row.get("batch", 1) == 1


def _line(axes: Axes, number: int, backend: str, rows: Sequence[Row], field: str) -> None:
    there = [row for row in rows if row["status"] == "ok" and row.get(field)]
    axes.plot(
        [side(row) for row in there],
        [row[field] for row in there],
        color=SERIES[number % len(SERIES)],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_DASHES[number % len(_DASHES)],
        label=formatting.backend(backend),
    )
    failed = [side(row) for row in rows if row["status"] == "out of memory"]
    if failed:
        # They have no value: they stand above the upper edge, each series in a line of its own.
        height = 1.0 + 0.05 * max(number - 1, 0)
        axes.plot(
            failed, [height] * len(failed), marker="x", color=SERIES[number % len(SERIES)], clip_on=False,
            markeredgewidth=2, linestyle="none", transform=axes.get_xaxis_transform(),
            label=f"{formatting.backend(backend)}: out of memory",
        )  # fmt: skip


def _floor(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    there = [row for row in rows if row.get(field)]
    if there:
        axes.plot(
            [side(row) for row in there], [row[field] for row in there], color=INK, linewidth=1.1,
            linestyle=(0, (6, 2, 1, 2)), label=label, zorder=1,
        )  # fmt: skip


def _finish_curve(axes: Axes, series: Mapping[str, Sequence[Row]], what: str, label: Callable[[float], str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({side(row) for rows in series.values() for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(_apart(sides)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(FixedLocator(sides))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(label(float(f"{value:.3g}")))))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major")
    axes.set_xlabel("side of the square output, pixels")
    axes.set_ylabel(what)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2, handlelength=3.2)


def _short(text: str) -> str:
    """Without the zeros that end a decimal fraction."""
    return re.sub(r"(\.\d*?)0+ ", r"\1 ", text).replace(". ", " ")


def _apart(sides: Sequence[int]) -> list[int]:
    """The sides whose labels have room beside each other; of two that are close, the power of two."""
    kept: list[int] = []
    for size in sorted(sides, key=lambda size: (size & (size - 1) != 0, size)):
        if all(abs(size / other - 1) > 0.12 for other in kept) and all(abs(other / size - 1) > 0.12 for other in kept):
            kept.append(size)
    return sorted(kept)


# Bars


def stage_figure(results: Mapping[str, Any]) -> Figure | None:
    """For each row with stages one bar: the share of the time that each takes, and the sum."""
    rows = [row for row in results["rows"] if row.get("stages") and row["status"] == "ok"]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    figure, axes = _figure(1.5 + 0.42 * len(rows))
    for position, row in enumerate(rows):
        total, left = sum(row["stages"].values()), 0.0
        for number, name in enumerate(names):
            share = 100 * row["stages"].get(name, 0.0) / total
            axes.barh(
                position, share, left=left, height=0.72, color=_STAGES[number % len(_STAGES)], edgecolor=PAGE,
                linewidth=1.0, label=name if position == 0 else None,
            )  # fmt: skip
            if share >= 5:
                axes.text(
                    left + share / 2, position, f"{share:.0f}", ha="center", va="center", color=_ON_STAGE, fontsize=8.5
                )
            left += share
        axes.text(101, position, formatting.seconds(total), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_label(row, rows) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the stages' time, %")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _legend_above(figure, axes, columns=3)
    return figure


def speed_up_figure(results: Mapping[str, Any]) -> Figure | None:
    """How many times as fast as the baseline of the same run each row is, one bar each, on a log axis."""
    rows = [row for row in results["rows"] if row.get("speed_up") and row["status"] == "ok"]
    rows.sort(key=lambda row: (row["operation"] != "model", row["size"], row.get("batch", 1)))
    return None if not rows else _factors(
        [_label(row, rows) for row in rows],
        [row["speed_up"] for row in rows],
        "times as fast as the baseline of the same run",
    )  # fmt: skip


def _factors(labels: Sequence[str], factors: Sequence[float], what: str) -> Figure:
    figure, axes = _figure(1.0 + 0.3 * len(labels))
    least = min([1.0, *factors])
    axes.set_xscale("log")  # before the bars, which end at its limits
    for position, factor in enumerate(factors):
        axes.barh(position, factor - 1, left=1, height=0.68, color=SERIES[0 if factor >= 1 else 1])
        axes.annotate(
            formatting.times(factor), (max(factor, 1.0), position),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(least / 1.15 if least < 1 else 0.97, max(factors) * 1.6)
    _factor_axis(axes, labels, what, (1.0, 2.0, 5.0) if max(factors) > 2 else (1.0, 1.2, 1.5, 2.0))
    return figure


def _factor_axis(axes: Axes, names: Sequence[str], what: str, ticks: Sequence[float]) -> None:
    """A line for each name, the first on top, over a log axis of factors."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{float(f'{value:.3g}'):g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="x", which="major")
    axes.set_xlabel(what)


def _label(row: Row, among: Sequence[Row]) -> str:
    """A row's name: the workload, and what distinguishes it from the others."""
    usual = {"operation": "model", "dtype": "float32", "pass": "forward", "backend": "anyup"}
    differing = [name for name in usual if len({other[name] for other in among}) > 1 or row[name] != usual[name]]
    parts = [row["workload"]]
    for name in differing:
        if row[name] != usual[name]:
            parts.append(formatting.operation(row[name]) if name == "operation" else row[name])
    return ", ".join(parts)


def modelled_figure(kernels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure | None:
    """Modelled time over the floor: a row for each kernel, a mark for each device and workload.

    Args:
        kernels: for each kernel and device the ratios.
    """
    if not kernels:
        return None
    figure, axes = _figure(1.4 + 0.36 * len(kernels))
    devices = list(dict.fromkeys(device for ratios in kernels.values() for device in ratios))
    for number, device in enumerate(devices):
        offset = 0.16 * (number - (len(devices) - 1) / 2)
        points = [
            (ratio, position + offset)
            for position, ratios in enumerate(kernels.values())
            for ratio in ratios.get(device, ())
        ]
        axes.plot(
            *zip(*points, strict=True), linestyle="none", marker=_MARKERS[number % len(_MARKERS)],
            color=SERIES[number % len(SERIES)], label=device, markersize=5,
        )  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1)
    _factor_axis(axes, list(kernels), "modelled time over the floor", (1.0, 1.5, 2.0, 3.0, 5.0))
    _legend_above(figure, axes, columns=4)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(figure: Figure, axes: Axes, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)), handlelength=1.6)
