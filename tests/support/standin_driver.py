"""A driver of Triton's for a card that is not here: kernels are compiled and bound as on one, and not run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """A module, a function, registers, spills and the most threads of a block."""
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """As of an H100."""
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}


class _NoLaunch:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        """Nothing runs."""


class _StandIn(DriverBase):
    utils, launcher_cls = _Utils(), _NoLaunch

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs")


def stand_in() -> None:
    """Launches of tensors on the CPU are compiled for compute capability 9.0 from now on."""
    driver.set_active(_StandIn())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
