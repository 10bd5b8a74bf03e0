"""One process, or several under torchrun by way of Accelerate.

Each process takes its share of a step's samples; the gradients are the mean over the processes, which the divisors of
the loss turn into the gradients that one process has for the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from anyup.installing import pip_install


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

    def wait(self) -> None:
        """Until every process is here."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes, every one of which must ask."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process; every process must ask."""
        return self.mean([float(flag)])[0] > 0

    def close(self, *, failed: bool = False) -> None:
        """Leave the group of processes, with the others; a process that failed does not wait for them."""


class AccelerateEngine(Engine):
    """One of several processes: torchrun's environment variables say which, Accelerate does the rest."""

    def __init__(self, device: torch.device) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError(f"several processes need Accelerate: {pip_install('accelerate')}") from error
        self._accelerator: Any = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        super().__init__(self._accelerator.device)
        self._sums: dict[int, torch.Tensor] = {}

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def mean(self, values: Sequence[float]) -> list[float]:
        # In a tensor that stays: a thread of gloo lets go of it after the result is there, some time later on a busy
        # machine. Were it the last to do so it would need the interpreter, whose end it does not survive.
        sums = self._sums.setdefault(len(values), torch.empty(len(values), device=self.device))
        sums.copy_(torch.tensor(values))
        torch.distributed.all_reduce(sums)
        return (sums / self.world).tolist()

    def close(self, *, failed: bool = False) -> None:
        if not failed:
            self.wait()
        self._accelerator.end_training()


def is_first() -> bool:
    """Whether this process will be the one that reports and writes, as torchrun tells it."""
    return int(os.environ.get("RANK", "0")) == 0


def start(device: torch.device) -> Engine:
    """The engine for this process: several where torchrun says so."""
    return AccelerateEngine(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Engine(device)
