"""A card of which everything but the card is there: Triton's own driver, JIT and C launcher, over a libcuda that does
nothing.

Tensors are on the CPU. Every kernel is compiled as one that does nothing, in no time; the C compiler that Triton needs
is needed here too.
Imported by processes of their own, without TRITON_INTERPRET: what it puts in stays.
"""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton.compiler
import triton.compiler.compiler
import triton.language as tl
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource
from triton.runtime import driver

SOURCE = Path(__file__).with_name("stand_in_cuda.c")


@triton.jit
def _nothing_kernel(x):
    """What every kernel becomes."""
    tl.store(x, 1.0)


def put_in() -> Callable[[], int]:
    """Put the card in, for this process; what it returns counts the launches that have reached the driver."""
    folder = Path(tempfile.mkdtemp(prefix="anyup-stand-in-card-"))
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}"]
    subprocess.run([shutil.which("gcc") or "cc", *flags, str(SOURCE), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    counter = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).stand_in_launches
    counter.restype = ctypes.c_long
    driver.set_active(_StandIn())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.device = _Device  # type: ignore[assignment,misc]
    compile_nothing()
    return lambda: int(counter())


class _StandIn(CudaDriver):
    def __init__(self) -> None:
        super().__init__()
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        """There is one."""
        return True


class _Device:
    """As torch.cuda.device costs: two calls into C."""

    def __init__(self, device: Any) -> None:
        self._before = -1

    def __enter__(self) -> None:
        self._before = abs(0)

    def __exit__(self, *_: object) -> None:
        self._before = abs(self._before)


def compile_nothing() -> None:
    """Every kernel becomes the code of one; launchers are still those of its own arguments."""
    real, made = triton.compiler.compile, []

    def compiled(src: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        if not made:
            made.append(real(ASTSource(_nothing_kernel, {"x": "*fp32"}, {}, {}), target=target))
        kernel = copy.copy(made[0])
        kernel.src = src
        kernel.module = kernel.function = kernel._run = None
        src.hash()  # as the compiler would, for what the kernel depends on
        return kernel

    for module in (triton.compiler, triton.compiler.compiler):
        module.compile = compiled
