"""The command `anyup tune`: its options, and the run. Torch is imported when it runs."""

from __future__ import annotations

import argparse

from anyup.command_paths import Written
from anyup.options import UsageError, check_output, nonempty, number, whole_number

HELP = "time the kernels on this GPU and keep the fastest configs"

DESCRIPTION = """\
Time the window attention's kernels on this machine's GPU, each config in many ways, and write the fastest configs to
a table in the user's cache folder, where the kernels find them from then on. A result never depends on it.

The configs of all kernels (forward, and the gradients of queries, keys and values) are timed for several
sizes and dtypes; each is compared with the reference first. The table is complete after each case: ctrl-C keeps
what is found until then. ANYUP_CONFIGS names another folder, or is "off": then no table is read or written.
Models with other heads, another window or another precision of float32 have configs of their own: name them.
"""

_DTYPES = ("bfloat16", "float32", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `anyup tune`."""
    parser.add_argument("--device", type=nonempty, metavar="cuda:N", help="the card (default: cuda:0)")
    parser.add_argument("--quick", action="store_true", help="two sizes, two dtypes and the configs that promise most")
    parser.add_argument("--workload", type=nonempty, nargs="+", metavar="SIZE", help='only these, as "448 from 32"')
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, help="only these")
    parser.add_argument(
        "--heads",
        nargs=2,
        type=whole_number(1),
        metavar=("NUMBER", "WIDTH"),
        help="number and width of the attention's heads (default: 4 32)",
    )
    parser.add_argument("--window", choices=("ratio", "cell", "none"), help="kind of the window (default: ratio)")
    parser.add_argument("--ratio", type=number(above=0), help="ratio of the window (default: 0.1)")
    parser.add_argument(
        "--precision", choices=("highest", "high"), help="torch's matmul precision, for float32 (default: highest)"
    )
    parser.add_argument(
        "--report",
        type=Written,
        metavar="OUT.json",
        help="also what became of every config tried, a line of JSON for each",
    )
    parser.add_argument("--debug", action="store_true", help="show Python's traceback with an error")


def run(arguments: argparse.Namespace) -> None:
    """Time the configs; print the table's path and the report's on stdout."""
    from anyup.bench import attention_passes
    from anyup.bench.workloads import find
    from anyup.tuning import tune
    from anyup.window import check_window, make_window

    for name in arguments.workload or ():
        try:
            find(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
    report = check_output(arguments.report, (".json",), "report") if arguments.report else None
    usual = attention_passes.WINDOW
    window = make_window(arguments.window or usual.kind, usual.ratio if arguments.ratio is None else arguments.ratio)
    try:
        check_window(window)
    except ValueError as error:
        raise UsageError(str(error)) from error
    table = tune.run(
        arguments.device,
        quick=arguments.quick,
        workloads=arguments.workload,
        dtypes=arguments.dtype,
        heads=tuple(arguments.heads or (attention_passes.HEADS, attention_passes.HEAD_DIM)),
        window=window,
        precision=arguments.precision,
        report=report,
    )
    for written in (table, report):
        if written:
            print(written)
