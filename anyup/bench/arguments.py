"""The options of `anyup bench`, without torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse

from anyup.command_paths import Read, Written
from anyup.options import MOST_THREADS, nonempty, number, whole_number

GROUPS = ("model", "curve", "stages", "operation", "unification", "head", "dtype", "backward", "high-resolution")
"""What can be measured alone, in the order of the suite."""


class _Measured(Written):
    """The folder of a benchmark."""

    holds = ("results.json", "report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `anyup bench`."""
    parser.add_argument(
        "-o", "--output", type=_Measured, required=True, metavar="DIR", help="folder of results.json and report.html"
    )
    parser.add_argument(
        "--device", type=nonempty, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, forward; on a card in bfloat16 too: minutes")
    parser.add_argument(
        "--published", type=Read, metavar="PATH", help="a checkout of wimmerth/anyup, whose code is timed beside ours"
    )
    parser.add_argument(
        "--budget",
        type=number(above=0),
        default=180.0,
        metavar="S",
        help="leave out calls of more seconds (default: 180)",
    )
    parser.add_argument(
        "--threads", type=whole_number(1, MOST_THREADS), help="torch's threads on a CPU (default: torch's own)"
    )
    parser.add_argument(
        "--repeats", type=whole_number(1), default=5, help="times that each call is measured, at most (default: 5)"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these: {', '.join(GROUPS)}")
    parser.add_argument("--restart", action="store_true", help="measure again what the folder holds already")
    parser.add_argument("--debug", action="store_true", help="show Python's traceback with an error")
