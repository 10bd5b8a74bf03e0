"""What ranks receive, as the benchmark counts it on paper, against the exchanges that happen; the page's numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Ranks

import anyup.ranks
from benchmarks.million import PAGE
from benchmarks.ranks import modelled, sent

SIZE, GRID, CHANNELS, COUNT = 24, 6, 5, 3

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "ranks.json"

NAMES = {"merging statistics": "statistics", "joining the pooled keys": "pooled keys"}


def received(group: Any) -> dict[str, int]:
    """Bytes that come to this rank from others in a call, by what they are."""
    found: Counter[str] = Counter()
    exchange = anyup.ranks.Ranks
    gather, operation, broadcast = exchange.gather, dist.P2POp, dist.broadcast

    def gathered(self: anyup.ranks.Ranks, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        found[NAMES[what]] += tensor.nbytes * (self.count - 1)
        return gather(self, tensor, what)

    def transfer(direction: Any, tensor: torch.Tensor, *peer: Any) -> dist.P2POp:
        found["image rows"] += tensor.nbytes if direction is dist.irecv else 0
        return operation(direction, tensor, *peer)

    def sending(tensor: torch.Tensor, *peer: Any, **more: Any) -> Any:
        found["features"] += tensor.nbytes
        return broadcast(tensor, *peer, **more)

    exchange.gather = gathered  # type: ignore[method-assign]
    dist.P2POp, dist.broadcast = transfer, sending  # type: ignore[assignment,misc]
    try:
        torch.manual_seed(0)
        image, features = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, CHANNELS, GRID, GRID)
        with torch.inference_mode():
            first = dist.get_rank() == 0
            anyup.distributed.upsample(anyup.AnyUp(), *((image, features) if first else (None, None)), group=group)
    finally:
        exchange.gather = gather  # type: ignore[method-assign]
        dist.P2POp, dist.broadcast = operation, broadcast  # type: ignore[misc]
    return dict(found)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_what_ranks_receive_is_what_is_counted_on_paper(tmp_path: Path) -> None:
    ranks = Ranks(COUNT, tmp_path)
    found = ranks.run([()] * COUNT, received)
    ranks.close()
    assert all(isinstance(each, dict) for each in found), found
    counted = sent(SIZE, GRID, CHANNELS, COUNT)
    del counted["of these, halos"]
    assert {name: max(each.get(name, 0) for each in found) for name in counted} == counted


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not here")
def test_the_page_s_times_on_paper_are_those_of_the_benchmark() -> None:
    text = " ".join(PAGE.read_text().split())
    one, parts = (modelled(16384, 1024, 384, ranks) for ranks in (1, 8))
    total, attention, exchange = sum(parts.values()), parts.pop("window attention"), parts.pop("exchange")
    keys = parts.pop("feature unification") + parts.pop("keys")
    received = sent(16384, 1024, 384, 8, itemsize=2)
    for sentence in (
        f"takes {total / 1e3:.1f} s on eight H100 of one machine, and {sum(one.values()) / 1e3:.0f} s on one",
        f"the window attention is {attention / 1e3:.2f} s of the {total / 1e3:.1f}",
        f"Encoders and projection take {sum(parts.values()):.0f} ms; unification and keys, which every rank makes, "
        f"{keys:.0f} ms; the exchange {exchange:.0f} ms",
        f"receives {received['image rows'] / 1e6:.0f} MB of the image",
        f"{received['features'] / 1e6:.0f} MB of features, {received['pooled keys'] / 1e6:.0f} MB of pooled keys and "
        f"{received['statistics'] / 1e3:.0f} KB of statistics",
    ):
        assert sentence in text


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not here")
def test_the_page_s_memory_and_processor_time_are_those_stored() -> None:
    numbers = r"\| (\d+) \| (\S+) GB \| (\S+) GB \| (\S+) s \|"
    table = [[float(number) for number in row] for row in re.findall(numbers, PAGE.read_text())]
    rows = sorted(json.loads(RESULTS.read_text()), key=lambda row: (-row["size"], row["ranks"]))
    stored = [
        [row["ranks"], max(row["peak_mb"]) / 1e3, max(row["before_mb"]) / 1e3, max(row["processor_seconds"])]
        for row in rows
    ]
    assert len(table) == len(stored)
    for shown, measured in zip(table, stored, strict=True):
        assert shown == pytest.approx(measured, abs=0.051, rel=0)
        assert shown[:3] == pytest.approx(measured[:3], abs=0.0051, rel=0)
