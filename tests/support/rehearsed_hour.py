"""A part of the first hour where ttsem pretends the card, on tiny sizes: its arguments are those of `hour_work`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rehearsal import pretended_card
from support import card
from ttsem.sanitize import session

from anyup import AnyUp
from anyup.bench import cases, graphs, machine, suite
from anyup.bench.stages import STAGES
from anyup.bench.workloads import Workload

SMALL: dict[str, Any] = {"qk_dim": 32, "lfu_dim": 16, "num_heads": 2, "kernel_size_lfu": 3}
TINY = [Workload((side, side), (2, 2), channels=16) for side in (6, 8, 9, 10, 7)]
MARK = ("spin_kernel", 0.0)


def model(dtype: str = "float32", device: str = "cpu", backend: str | None = None) -> AnyUp:
    """Torch's backend: the kernels are launched by `small` and by the tests."""
    torch.manual_seed(0)
    return AnyUp(**SMALL, backend="torch").eval().to(device, cases.DTYPES[dtype])


def _some(comparisons: dict[str, list[suite.Comparison]]) -> dict[str, list[suite.Comparison]]:
    """Of each kind and dtype one, among them the largest."""
    whole, learning = comparisons["model"], comparisons["backward"]
    return {"model": [whole[0], whole[3], whole[14]], "backward": [learning[0], learning[2]]}


def main() -> int:
    """The part."""
    with session(90, "hour"), pretended_card() as made_up:
        from benchmarks import hour_work

        card.as_pretended(made_up)
        made_up.setattr(machine, "matmul_rate", lambda **_: 1e13)
        made_up.setattr(machine, "copy_bandwidth", lambda **_: 1e12)
        made_up.setattr(machine, "clocks", lambda device: None)
        made_up.setattr(cases, "model", model)
        made_up.setattr(suite, "REACH", TINY[:3])
        made_up.setattr(suite, "square", lambda *_: TINY[3])
        made_up.setattr(suite, "TRAINING", TINY[4])
        made_up.setattr(hour_work, "essential", lambda device: _some(suite.essential(device)))
        made_up.setattr(torch.cuda, "_sleep", lambda cycles: None)
        made_up.setattr(
            graphs, "_profiled", lambda replay: [seen for _ in STAGES for seen in (MARK, ("kernel", 1e-5), MARK)]
        )
        made_up.setattr(hour_work, "SMALL", Workload((6, 5), (2, 2), channels=16))
        made_up.setattr(hour_work, "AnyUp", lambda: AnyUp(**SMALL))
        made_up.setattr(hour_work, "ALONE", (sys.executable, str(Path(__file__)), "small"))
        return hour_work.main()


if __name__ == "__main__":
    sys.exit(main())
