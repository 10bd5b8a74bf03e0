"""What ranks receive, as the benchmark counts it on paper, against the exchanges that happen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Ranks

import anyup
from benchmarks.ranks import sent

SIZE, GRID, CHANNELS, COUNT = 24, 6, 5, 3

NAMES = {"merging statistics": "statistics", "joining the pooled keys": "pooled keys"}


def received(group: Any) -> dict[str, int]:
    """Bytes that come to this rank from others in a call, by what they are."""
    found: Counter[str] = Counter()
    gather, operation, broadcast = anyup.distributed.Ranks.gather, dist.P2POp, dist.broadcast

    def gathered(self: anyup.distributed.Ranks, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        found[NAMES[what]] += tensor.nbytes * (self.count - 1)
        return gather(self, tensor, what)

    def transfer(direction: Any, tensor: torch.Tensor, *peer: Any) -> dist.P2POp:
        found["image rows"] += tensor.nbytes if direction is dist.irecv else 0
        return operation(direction, tensor, *peer)

    def sending(tensor: torch.Tensor, *peer: Any, **more: Any) -> Any:
        found["features"] += tensor.nbytes
        return broadcast(tensor, *peer, **more)

    anyup.distributed.Ranks.gather = gathered  # type: ignore[method-assign]
    dist.P2POp, dist.broadcast = transfer, sending  # type: ignore[assignment,misc]
    try:
        torch.manual_seed(0)
        image, features = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, CHANNELS, GRID, GRID)
        with torch.inference_mode():
            first = dist.get_rank() == 0
            anyup.distributed.upsample(anyup.AnyUp(), *((image, features) if first else (None, None)), group=group)
    finally:
        anyup.distributed.Ranks.gather = gather  # type: ignore[method-assign]
        dist.P2POp, dist.broadcast = operation, broadcast  # type: ignore[misc]
    return dict(found)


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_what_ranks_receive_is_what_is_counted_on_paper(tmp_path: Path) -> None:
    ranks = Ranks(COUNT, tmp_path)
    found = ranks.run([()] * COUNT, received)
    ranks.close()
    assert all(isinstance(each, dict) for each in found), found
    counted = sent(SIZE, GRID, CHANNELS, COUNT)
    del counted["of these, halos"]
    assert {name: max(each.get(name, 0) for each in found) for name in counted} == counted
