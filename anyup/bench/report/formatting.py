"""Numbers of results as people read them: the same in the terminal, the report and the pages."""

from __future__ import annotations

from typing import Any

_BACKENDS = {
    "published": "published forward",
    "published, unchunked": "published forward, unchunked",
}


def seconds(value: float) -> str:
    """Three digits, as in "110 s", "0.705 s", "12.8 ms", "83 µs"."""
    for least, unit, factor in ((0.1, "s", 1.0), (1e-4, "ms", 1e3), (0.0, "µs", 1e6)):
        if value >= least:
            return f"{digits(value * factor)} {unit}"
    raise ValueError(f"seconds: expected a time, got {value!r}")


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, or all before the point; never an exponent."""
    rounded = float(f"{value:.{count}g}")
    if rounded == 0:
        return "0"
    decimals = max(0, count - 1 - int(f"{abs(rounded):e}".split("e")[1]))
    return f"{value:.{decimals}f}"


def rate(value: float, unit: str) -> str:
    """A rate in 10^9, as in "234 GFLOP/s"."""
    return f"{digits(value / 1e9)} G{unit}"


def times(value: float) -> str:
    """A factor, as in "0.93x", "8.1x", "120x"."""
    return f"{value:.0f}x" if value >= 99.95 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def percent(value: float) -> str:
    """A share, as in "7 %"."""
    return f"{100 * value:.0f} %"


def backend(name: str) -> str:
    """Who computes."""
    return _BACKENDS.get(name, name)


def operation(name: str) -> str:
    """What is computed."""
    return "whole model" if name == "model" else name.replace("_", " ")


def chunk(value: Any) -> str:
    """The baseline's queries at a time; empty where there is none."""
    if value is None or value == "":
        return ""
    return "unchunked" if value == "all" else f"chunks of {value}"
