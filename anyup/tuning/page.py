"""The report of `anyup tune`: what each config of each kernel gave, and the gain over the shipped rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from anyup.bench.report import formatting, plots, tables
from anyup.bench.stored import read_json

FORMAT = 1

_CASE = ("kernel", "dtype", "precision", "heads", "head_dim", "keys", "workload")


@dataclass(frozen=True)
class Case:
    """The rows of one case, in the order in which they were tried; the rule's config is the first that ran."""

    rows: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """Kernel, dtype and the most keys of a tile."""
        row = self.rows[0]
        precision = f" ({row['precision']})" if row["precision"] else ""
        return f"{row['kernel'].replace('_', ' ')}, {row['dtype']}{precision}, {row['workload']}"

    @property
    def ran(self) -> list[Mapping[str, Any]]:
        """Those with a time."""
        return [row for row in self.rows if row["us"] is not None]

    @property
    def rule(self) -> Mapping[str, Any] | None:
        """The rule's config, None where no config of the rule ran."""
        return next((row for row in self.ran if row["rule"]), None)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The chosen config, None where none ran."""
        return next((row for row in self.rows if row["best"]), None)

    @property
    def chosen(self) -> float | None:
        """Microseconds of what was chosen: the best config, or the kernels that run instead of this one."""
        microseconds: float | None = self.best["us"] if self.best else self.rows[0].get("apart")
        return microseconds

    @property
    def gain(self) -> float | None:
        """How many times as fast as the rule's config that is."""
        return self.rule["us"] / self.chosen if self.rule and self.chosen else None

    @property
    def changed(self) -> str:
        """What the chosen config has other than the rule's."""
        if self.best is None:
            return "no config runs" if self.chosen is None else "one kernel for each gradient"
        if self.rule is None:
            return "the rule's configs do not run"
        pairs = [
            f"{name} {self.rule['config'].get(name)} → {value}"
            for name, value in self.best["config"].items()
            if value != self.rule["config"].get(name)
        ]
        return ", ".join(pairs) or "nothing: the rule's"


def read(path: Path) -> dict[str, Any]:
    """The JSON that `anyup tune --report` wrote; raises ValueError naming the file where it is something else."""
    tune: dict[str, Any] = read_json(path, "a report of `anyup tune`")
    check(tune, str(path))
    return tune


def check(tune: Any, where: str = "tune") -> None:
    """Raise ValueError, saying where, unless this is what `anyup tune --report OUT.json` writes."""
    if not isinstance(tune, dict) or tune.get("format") != FORMAT or not isinstance(tune.get("rows"), list):
        raise ValueError(f"{where}: expected a report of `anyup tune`, an object of format {FORMAT} with rows")
    for number, row in enumerate(tune["rows"]):
        missing = [name for name in (*_CASE, "config", "us", "reason", "best", "rule") if name not in row]
        if missing:
            raise ValueError(f"{where}: row {number}: {', '.join(missing)} missing")


def cases(rows: Sequence[Mapping[str, Any]]) -> Iterator[Case]:
    """Rows by case."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _CASE), []).append(row)
    for one in found.values():
        yield Case(tuple(one))


def section(tune: Mapping[str, Any]) -> str:
    """HTML: the gains, every config's time as a plot, and every config."""
    found = list(cases(tune["rows"]))
    if not found:
        return "<p>No case was searched.</p>"
    head = ("case", "chosen instead of the rule's", "rule", "chosen", "gain", "tried", "failed")
    lines = []
    for case in found:
        rule, chosen = case.rule, case.chosen
        lines.append(
            (
                case.name, case.changed, rule and _microseconds(rule["us"]), chosen and _microseconds(chosen),
                "" if case.gain is None else f"{case.gain:.2f}x", len(case.rows), len(case.rows) - len(case.ran),
            )
        )  # fmt: skip
    made = {name: value for name, value in tune.items() if name not in ("rows", "format")}
    parts = [tables.facts(made), tables.plain(head, lines, numbers=2)]
    figure = plots.drawn(
        plots.tune_figure,
        [
            (
                case.name,
                case.rule["us"] if case.rule else None,
                [row["us"] for row in case.ran],
                case.chosen,
            )
            for case in found
        ],
    )
    if figure is not None:
        caption = (
            "Every config that ran, its time over that of the rule's. Cases that the rule does not run are left out."
        )
        parts.append(f"<figure>{plots.svg(figure, 'tune')}<figcaption>{caption}</figcaption></figure>")
    parts += [
        f"<details><summary>{escape(case.name)}: {len(case.rows)} configs</summary>{_configs(case)}</details>"
        for case in found
    ]
    return "".join(parts)


def _configs(case: Case) -> str:
    """Every config of a case, the fastest first, then what failed and why."""
    names = list(case.rows[0]["config"])
    rule = case.rule["us"] if case.rule else None
    lines = []
    for row in sorted(case.rows, key=lambda row: (row["us"] is None, row["us"] or 0.0)):
        what = "chosen" if row["best"] else "the rule's" if row["rule"] else ""
        ratio = f"{row['us'] / rule:.3f}" if rule and row["us"] is not None else ""
        time = "" if row["us"] is None else _microseconds(row["us"])
        lines.append((what, row["reason"], time, ratio, *(row["config"].get(name) for name in names)))
    return tables.plain(("", "failure", "time", "over the rule's", *names), lines, numbers=2)


def _microseconds(value: float) -> str:
    return formatting.seconds(value * 1e-6)
