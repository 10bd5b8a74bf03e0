"""One process, or several under torchrun or `accelerate launch` by way of Accelerate.

In a training each process takes its share of a step's samples; the gradients are the mean over the processes, which
the divisors of the loss turn into the gradients that one process has for the whole batch. `anyup upsample` shares
photographs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anyup.installing import pip_install

Item = TypeVar("Item")

_WAIT_FOR_PHOTOGRAPHS = timedelta(days=365)  # a process whose share is done waits for the last one


class Engine:
    """A single process on a device; as a context manager it is closed at the end."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on the device; its backward pass leaves the same gradients in every process."""
        return module.to(self.device)

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        """Within the block a wrapped module's backward pass adds to this process's own gradients if `more` follow."""
        return nullcontext()

    def wait(self) -> None:
        """Until every process is here. Raises ConnectionError, as all that waits does, where another one has ended."""

    def first_ahead(self) -> AbstractContextManager[object]:
        """A block that the first process leaves before the others enter it."""
        return nullcontext()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Of the first process's items every `world`-th, from the rank's on; those of the others are not looked at."""
        return list(items)

    def mean(self, values: Tensor) -> Tensor:
        """Each value's mean over the processes, every one of which must ask."""
        return values

    def total(self, count: int) -> int:
        """The sum of a number below 2^24 over the processes; every process must ask."""
        return round(self.mean(torch.tensor([float(count)])).item() * self.world)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process; every process must ask."""
        return self.total(flag) > 0

    def close(self, *, failed: bool = False) -> None:
        """Leave the group of processes, with the others; a process that failed does not wait for them."""


class AccelerateEngine(Engine):
    """One of several processes: torchrun's environment variables say which, Accelerate does the rest.

    With `gradients` their group is one that averages gradients quickly, as NCCL does. Without, it is one of gloo, whose
    processes may be at work for long between two words.
    """

    def __init__(self, device: torch.device, *, gradients: bool = True) -> None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            raise ImportError(f"several processes need Accelerate: {pip_install('accelerate')}") from error
        if str(device) != device.type:
            raise ValueError(f"device: each of several processes has its own: expected {device.type}, got {device}")
        group = [] if gradients else [InitProcessGroupKwargs(backend="gloo", timeout=_WAIT_FOR_PHOTOGRAPHS)]
        self._accelerator: Any = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=group or None
        )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        super().__init__(self._accelerator.device)
        self._sums: dict[int, Tensor] = {}

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        block: AbstractContextManager[object] = self._accelerator.no_sync(module) if more else nullcontext()
        return block

    def wait(self) -> None:
        with _others_alive():
            self._accelerator.wait_for_everyone()

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def share(self, items: Sequence[Item]) -> list[Item]:
        shares = [list(items[rank :: self.world]) for rank in range(self.world)] if self.first else None
        mine: list[Any] = [None]
        with _others_alive():
            torch.distributed.scatter_object_list(mine, shares)
        found: list[Item] = mine[0]
        return found

    def mean(self, values: Tensor) -> Tensor:
        # In a tensor that stays: a thread of gloo lets go of it after the result is there, some time later on a busy
        # machine. Were it the last to do so it would need the interpreter, whose end it does not survive.
        sums = self._sums.setdefault(len(values), torch.empty(len(values), device=self.device))
        sums.copy_(values)
        with _others_alive():
            torch.distributed.all_reduce(sums)
        return sums / self.world

    def close(self, *, failed: bool = False) -> None:
        if not failed:
            self.wait()
        self._accelerator.end_training()


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended; its own message says why") from error


def is_first() -> bool:
    """Whether this process will be the one that reports and writes, as torchrun tells it."""
    return int(os.environ.get("RANK", "0")) == 0


def start(device: torch.device, *, gradients: bool = True) -> Engine:
    """The engine for this process: several where torchrun says so; `gradients` as `AccelerateEngine` takes it."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return AccelerateEngine(device, gradients=gradients) if several else Engine(device)
