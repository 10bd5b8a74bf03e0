"""`python -m benchmarks.cards`: the table of docs/cards.md, from the planner alone; nothing is computed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import anyup
from anyup.budget import SHARE
from anyup.limited_memory import BudgetError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cards.md"

CARDS = (4, 8, 12, 24, 80)
"""Gigabytes, of which a call takes its usual share."""

# Image, grid, channels, channels carried (None: the features), streamed in 16 bit.
_TASKS = (
    (1024, 64, 384, None, False),
    (1024, 64, 1024, None, False),
    (2048, 128, 384, 21, False),
    (2048, 128, 1024, 21, False),
    (2048, 128, 1024, None, True),
    (4096, 256, 768, 21, False),
    (4096, 256, 768, None, True),
)

_BEGIN, _END = "<!-- python -m benchmarks.cards -->", "<!-- end -->"


def table() -> str:
    """Markdown: for each task and card, work relative to whole maps and the predicted peak."""
    header = ["float32", *(f"{size} GB" for size in CARDS)]
    lines = [header, ["---"] * len(header)]
    lines += [[_name(task), *(_cell(task, size) for size in CARDS)] for task in _TASKS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.split(_END)[1]}"


def _name(task: tuple[int, int, int, int | None, bool]) -> str:
    size, grid, channels, carried, streamed = task
    what = "streamed in 16 bit" if streamed else "returned" if carried is None else f"{carried}-class head, returned"
    return f"{size} from {grid}, C {channels}, {what}"


def _cell(task: tuple[int, int, int, int | None, bool], card: int) -> str:
    size, grid, channels, carried, streamed = task
    try:
        plan = anyup.plan(
            (size, size),
            (grid, grid),
            channels,
            device="cuda",
            max_memory=int(SHARE * card * 10**9),
            values=carried,
            stream=streamed,
            out_dtype=torch.float16 if streamed else None,
        )
    except BudgetError as error:
        return f"needs {error.smallest / SHARE / 1e9:.1f} GB"
    return f"{plan.cost:.2f}x, {plan.peak_bytes / 1e9:.1f} GB"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__).parse_args(argv)
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
