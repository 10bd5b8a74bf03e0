"""Processes of a group of torch.distributed, on this machine, to which tests give jobs.

They are started once for many tests. A job is a function of a module, called on each of the first ranks with the group
of these ranks as its first argument; what it returns or raises comes back.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.patience import PATIENCE

TESTS = Path(__file__).parents[1]


class RankError(Exception):
    """What a job raised on a rank: its class' name and its text."""


def start(code: str, folder: Path, rank: int, ranks: int, **more: str) -> subprocess.Popen[str]:
    """A process of Python whose group, of gloo, is initialised when `code` runs; it meets the others in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")))
    begin = (
        "import datetime, torch, torch.distributed as dist\n"
        "torch.set_num_threads(1)\n"
        f"dist.init_process_group('gloo', init_method='file://{folder / 'meeting'}', rank={rank}, world_size={ranks},\n"
        f"    timeout=datetime.timedelta(seconds={PATIENCE}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", begin + code],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class Ranks:
    """Some processes of a group, waiting for jobs."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder = folder
        code = f"from support import ranks; ranks.serve({str(folder)!r})"
        self._processes = [start(code, folder, rank, count) for rank in range(count)]

    def run(self, each: Sequence[Sequence[Any]], job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the job returns on each of the first ranks, a `RankError` where it raises.

        `each` has, for each rank, its own arguments, which come after the group and before `arguments`.
        """
        count = len(each)
        for rank, process in enumerate(self._processes):
            own = each[rank] if rank < count else ()
            folder = str(Path(inspect.getfile(job)).parent)
            told = folder, job.__module__, job.__qualname__, count, (*own, *arguments)
            (self._folder / f"job-{rank}").write_bytes(pickle.dumps(told))
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "done\n", process.stderr.read()
            results.append(pickle.loads((self._folder / f"result-{rank}").read_bytes()))
        return results[:count]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate(timeout=PATIENCE)  # the end of their input ends them


def serve(folder: str) -> None:
    """Do jobs until there are no more."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(count))) for count in range(1, world + 1)]
    for _ in sys.stdin:
        where, module, name, count, arguments = pickle.loads((Path(folder) / f"job-{rank}").read_bytes())
        result: Any = None
        if where not in sys.path:
            sys.path.append(where)
        if rank < count:
            try:
                result = getattr(importlib.import_module(module), name)(groups[count - 1], *arguments)
            except Exception as error:
                result = RankError(type(error).__name__, str(error))
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        print("done", flush=True)
    dist.destroy_process_group()
