"""`python -m benchmarks.million`: the table of a million photographs in docs/scaling.md, on paper; nothing is computed.

What is counted: bytes that are stored, and floating-point operations of a ViT-S. What is modelled: the upsampling, in
`results/model.json`. What is measured: the processor's share of a photograph. What is assumed stands in `ASSUMED`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.modelled_gpu.model import RESULT

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"

PHOTOGRAPHS, CARDS = 1_000_000, 64
SIDE, GRID, CHANNELS = 448, 32, 384

ASSUMED = {
    "cards of a machine": 8,
    "bytes a second to a card's host": 20e9,
    "bytes a second to a machine's disks": 6e9,
    "bytes a second to a machine's network": 12.5e9,  # 100 Gbit
    "operations a second of the encoder": 30e12,  # float32, of a peak of 67e12
}

PREPARED_IN = 0.030
"""Seconds of one core, measured: a photograph of 512 x 512 read, decoded, hashed and resized, twice."""

_BEGIN, _END = "<!-- python -m benchmarks.million -->", "<!-- end -->"


@dataclass(frozen=True)
class Stored:
    """What is kept of a photograph, in words, and its bytes."""

    name: str
    bytes: int


_MAP = SIDE * SIDE
STORED = (
    Stored("384 channels, float32", _MAP * CHANNELS * 4),
    Stored("384 channels, float16", _MAP * CHANNELS * 2),
    Stored("64 components, float16, and their basis", _MAP * 64 * 2 + (64 + 1) * CHANNELS * 4),
    Stored("16 components, float16, and their basis", _MAP * 16 * 2 + (16 + 1) * CHANNELS * 4),
    Stored("21 logits of a head, float16", _MAP * 21 * 2),
    Stored("1,000 points, float16", 1000 * CHANNELS * 2),
    Stored("the grid of 32 x 32, float16, upsampled when it is read", GRID * GRID * CHANNELS * 2),
)


def encoder_operations() -> int:
    """Of a ViT-S with a token for each cell and one more: the products of its 12 blocks."""
    tokens, width, blocks = GRID * GRID + 1, CHANNELS, 12
    return blocks * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def upsampling_seconds() -> float:
    """Of one photograph on an H100 in float32, modelled."""
    wanted = ("H100 SXM", "float32", CHANNELS, f"{SIDE} from {GRID}", "sum")
    keys = ("device", "dtype", "channels", "workload", "level")
    (found,) = (row for row in json.loads(RESULT.read_text()) if tuple(row.get(key) for key in keys) == wanted)
    return float(found["modelled_us"]) / 1e6


def seconds(stored: Stored) -> dict[str, float]:
    """Of the whole run, for each of its parts alone."""
    each = PHOTOGRAPHS / CARDS
    machines = CARDS / ASSUMED["cards of a machine"]
    on_card = 0.0 if "upsampled when" in stored.name else upsampling_seconds()
    return {
        "read and prepare": PREPARED_IN * each,
        "encode": encoder_operations() / ASSUMED["operations a second of the encoder"] * each,
        "upsample": on_card * each,
        "copy": stored.bytes / ASSUMED["bytes a second to a card's host"] * each,
        "disks": stored.bytes * PHOTOGRAPHS / ASSUMED["bytes a second to a machine's disks"] / machines,
        "network": stored.bytes * PHOTOGRAPHS / ASSUMED["bytes a second to a machine's network"] / machines,
    }


def table() -> str:
    """Markdown: bytes, and the minutes of each part, for each thing that may be stored."""
    parts = list(seconds(STORED[0]))
    lines = [["stored of a photograph", "bytes", "a million", *(f"{part}, min" for part in parts)]]
    lines.append(["---"] * len(lines[0]))
    for stored in STORED:
        minutes = [f"{value / 60:.1f}" for value in seconds(stored).values()]
        lines.append([stored.name, _bytes(stored.bytes), _bytes(stored.bytes * PHOTOGRAPHS), *minutes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.split(_END, 1)[1]}"


def _bytes(count: float) -> str:
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the page."""
    argparse.ArgumentParser(prog="python -m benchmarks.million", description=main.__doc__).parse_args(arguments)
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
