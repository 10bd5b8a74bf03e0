"""What is known of a step once its device has got there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Record:
    """What to log of a step; its numbers are on their way from a device.

    Args:
        step: the step's number, counted from 0.
        facts: what the host knows of it.
        numbers: each a tensor without dimensions, the loss under "loss".
    """

    def __init__(self, step: int, facts: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> None:
        self._step, self._facts, self._names = step, dict(facts), list(numbers)
        self._numbers = torch.stack([number.detach().float() for number in numbers.values()])
        self._arrived: torch.cuda.Event | None = None
        if self._numbers.device.type == "cuda":
            # Copied now, and behind no later step: then reading waits for this step alone.
            host = torch.empty(self._numbers.shape, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, Any]:
        """All of it, when the device has done the step; FloatingPointError where the loss is not finite.

        Another number that is not finite is None: the norm of a gradient that has overflowed.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = dict(zip(self._names, self._numbers.tolist(), strict=True))
        if not math.isfinite(numbers["loss"]):
            raise FloatingPointError(f"step {self._step}: the loss is {numbers['loss']}; the last checkpoint is whole")
        return {**self._facts, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
