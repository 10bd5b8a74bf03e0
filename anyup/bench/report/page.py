"""`report.html`: one page with everything about a run, which needs no network and no other file.

    python -m anyup.bench.report results.json -o report.html [--codegen FILE]

makes it again from stored results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anyup.bench import stored
from anyup.bench.report import formatting, modelled, plots, tables
from anyup.command_paths import Read, Written, settle_paths
from anyup.images import complete_or_absent
from anyup.options import UsageError

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1c20; --soft: #5a606b; --grid: #d9dce1; --shade: #f4f5f7;
  --bad: #a8071a; --busy: #8a5300;
  --series-0: #0072b2; --series-1: #c04e00; --series-2: #00795a; --series-3: #a8497d; --series-4: #9a6a00;
  --series-5: #2f87b8; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --ink: #e6e8ec; --soft: #a2a9b5; --grid: #3a3f49;
  --shade: #1f2229; --bad: #ff9c98; --busy: #ffc368;
  --series-0: #5ab4f0; --series-1: #ff9a57; --series-2: #3fd0a4; --series-3: #eda3cb; --series-4: #f3bd4e;
  --series-5: #9ad5f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; } p { max-width: 46rem; }
nav a { margin-right: 1rem; } a { color: var(--series-0); }
.sub, figcaption { color: var(--soft); }
figure { margin: 1rem 0 1.5rem; } figure svg { width: 100%; max-width: 50rem; height: auto; display: block; }
figcaption { font-size: .875rem; max-width: 46rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .4rem 1.5rem;
  margin: 1rem 0; }
.facts dt { font-size: .8rem; color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; vertical-align: bottom; color: var(--soft); }
th.number { text-align: right; }
th, td { padding: .3rem .65rem .3rem 0; border-bottom: 1px solid var(--grid); }
td { vertical-align: top; } td.number, td.absent { text-align: right; white-space: nowrap; }
td.absent { color: var(--soft); } td:first-child { white-space: nowrap; } td.notes { min-width: 9rem; }
tbody tr:hover { background: var(--shade); }
.badge { display: inline-block; border: 1px solid; border-radius: .6rem; padding: 0 .45rem; font-size: .75rem;
  white-space: nowrap; } .bad { color: var(--bad); } .busy { color: var(--busy); }
details { margin: .4rem 0; } summary { cursor: pointer; }
.notice { border-left: 3px solid var(--busy); padding-left: .75rem; }
@media print { details > * { display: block; } .wide { overflow: visible; } }
"""

_GROUPS = {
    "model": "Whole model",
    "curve": "Whole model over resolution",
    "operation": "Operations alone",
    "stages": "Stages of the whole model",
    "head": "A linear head before or after",
    "unification": "Feature unification",
    "high-resolution": "Large images within a budget",
    "dtype": "Half precision",
    "backward": "Forward and backward",
}

_CAPTIONS = {
    "time": "Time of a call, median of the repeats. The floor is the model's arithmetic at the rate of a matrix "
    "product of the same run, or its bytes at a copy's if that is longer. Crosses at the upper edge: out of memory.",
    "memory": "Peak memory above the loaded model and its inputs, in a run of its own. The floor is the output, "
    "which every call returns.",
    "stages": "Share of each stage, in %; to the right the sum.",
    "speed-up": "Against the published forward, or the definition, in the same run.",
}


def write_report(results: dict[str, Any], path: Path, *, codegen: list[Any] | None = None) -> None:
    """Write the page of a run, complete or not at all.

    Args:
        results: of `anyup bench`: format, machine and rows.
        path: of the page.
        codegen: rows of `python -m benchmarks.modelled_gpu`; by default those of a checkout. An empty list: none.

    Raises ValueError where one of them is something else, ImportError where matplotlib is missing, both before any
    work; OSError where the page cannot be written.
    """
    stored.check(results)
    if codegen is None:
        codegen = modelled.stored_rows() or []
    modelled.check(codegen)
    plots.require_matplotlib()
    _write(path, _page(results, codegen))


def _page(results: Mapping[str, Any], codegen: Sequence[Mapping[str, Any]]) -> str:
    machine, rows = results["machine"], results["rows"]
    sections: list[tuple[str, str, str]] = []
    for name, title, figure in (
        ("time", "Time over resolution", plots.drawn(plots.time_figure, results)),
        ("memory", "Memory over resolution", plots.drawn(plots.memory_figure, results)),
        ("stages", "Where the time goes", plots.drawn(plots.stage_figure, results)),
        ("speed-up", "Speed-up", plots.drawn(plots.speed_up_figure, results)),
    ):
        if figure is not None:
            picture = plots.svg(figure, name).replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
            caption = f"<figcaption>{escape(_CAPTIONS[name])} The numbers are in the tables below.</figcaption>"
            sections.append((name, title, f"<figure>{picture}{caption}</figure>"))
    sections.append(("rows", "All rows", _all_rows(results)))
    if codegen:
        sections.append(("modelled", "The kernels on GPUs (modelled)", modelled.section(codegen)))
    else:
        absent = "<p>No code generation report here: it comes with a checkout of the repository.</p>"
        sections.append(("modelled", "The kernels on GPUs (modelled)", absent))
    links = "".join(f'<a href="#{name}">{escape(title)}</a> ' for name, title, _ in sections)
    counts = ", ".join(
        f"{number} {status}" for status in stored.STATUSES if (number := sum(row["status"] == status for row in rows))
    )
    busy = sum(bool(row.get("busy")) for row in rows)
    notice = (
        f'<p class="notice">{busy} of {len(rows)} rows were measured while the machine was busy; they are marked.</p>'
        if busy
        else ""
    )
    body = (
        f"<h1>anyup bench</h1><p class='sub'>{escape(_summary(machine))}; {len(rows)} rows: {counts or 'none'}.</p>"
        f"{notice}<nav aria-label='sections'>{links}</nav>"
        f'<h2 id="machine">Machine</h2>{tables.facts(machine)}'
        + "".join(f'<h2 id="{name}">{escape(title)}</h2>{content}' for name, title, content in sections)
    )
    return _document(f"anyup bench: {machine.get('device', 'unknown device')}", body, results)


def _summary(machine: Mapping[str, Any]) -> str:
    parts = [str(machine.get("device", "unknown device"))]
    if machine.get("threads") and machine.get("device_kind") != "cuda":
        parts.append(f"{machine['threads']} threads")
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "anyup") if machine.get(name)]
    return ", ".join([*parts, f"commit {machine.get('commit') or 'unknown'}"])


def _all_rows(results: Mapping[str, Any]) -> str:
    parts = [
        "<p>Times are medians; <em>spread</em> is slowest minus fastest over the median. <em>Difference</em> is the "
        "largest error against the definition or the published forward, relative to the output's size.</p>"
    ]
    for group, rows in stored.groups(results["rows"]).items():
        title = escape(_GROUPS.get(group, formatting.operation(group)))
        common = "".join(f", {escape(text)}" for text in tables.shared(rows).values())
        parts.append(
            f"<details open><summary><strong>{title}</strong>{common}: {len(rows)} rows</summary>"
            f"{tables.rows_table(results, rows)}</details>"
        )
    return "".join(parts)


def _document(title: str, body: str, data: Mapping[str, Any]) -> str:
    # "<" would end the script where a text holds "</script>".
    raw = json.dumps(data).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>{body}</main>\n"
        f'<script type="application/json" id="results">{raw}</script></body></html>\n'
    )


def _write(path: Path, page: str) -> None:
    with complete_or_absent(path) as partial:
        partial.write_text(page, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m anyup.bench.report", description=__doc__)
    parser.add_argument("results", type=Read, help="results.json of anyup bench")
    parser.add_argument("-o", "--output", type=Written, default="report.html", help="(default: %(default)s)")
    parser.add_argument(
        "--codegen", type=Read, help="rows of benchmarks.modelled_gpu.codegen (default: the checkout's)"
    )
    arguments = parser.parse_args(argv)
    try:
        settle_paths(arguments)
        codegen = None
        if arguments.codegen:
            codegen = modelled.stored_rows(Path(arguments.codegen))
            if codegen is None:
                raise ValueError(f"{arguments.codegen}: there is no such file")
        write_report(stored.read(Path(arguments.results)), Path(arguments.output), codegen=codegen)
    except (OSError, ValueError, ImportError, UsageError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0
