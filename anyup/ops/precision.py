"""Which tensors the operations take, and in which dtype they compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that every operation takes."""

_MATMUL_PRECISION = {"tf32": "high", "bf16": "medium"}


def check_dense(name: str, tensor: Any) -> None:
    """Raise TypeError, which names the argument, unless it is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {tensor.layout}; use to_dense()")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise TypeError, which names the argument, unless it is None or a dtype that every operation takes."""
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating-point dtype of 16, 32 or 64 bits, got {dtype!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic: float64 for float64, float32 for any other, because half precision is for storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the operands of products: bfloat16 for bfloat16 on a CPU that multiplies it, else the working dtype.

    Such a CPU (AVX512-BF16, AMX) adds the products up in float32 and rounds the sum to bfloat16.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and torch.backends.mkldnn.enabled and _multiplies_bfloat16():
        return dtype
    return working_dtype(dtype)


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return units and torch.backends.mkldnn.is_available()


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors in a dtype, converted together: a conversion for each tensor would be a kernel launch for each."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    together = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of many terms: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def key_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which keys are computed: float64 on a CPU (cheap on the small grid), else the working dtype."""
    return torch.float64 if device.type == "cpu" else working_dtype(dtype)


def float32_matmul_precision(device_type: str) -> str:
    """The precision of float32 products on a type of device: torch's "highest", "high" or "medium".

    It follows all of torch's settings: `torch.set_float32_matmul_precision`, `allow_tf32` and each `fp32_precision` for
    matrix products. `torch.get_float32_matmul_precision` raises where these settings differ.
    """
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    return _MATMUL_PRECISION.get(backend.matmul.fp32_precision, "highest")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    # The device meta has no autocast. `torch.amp.is_autocast_available` knows this too, but torch.compile cannot trace
    # it before torch 2.12.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off for a type of device."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()
