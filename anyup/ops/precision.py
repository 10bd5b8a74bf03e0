"""What is computed in which dtype."""

from __future__ import annotations

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that every operation takes."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is for storage: arithmetic is float32, or float64 where the caller's tensors are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """For sums of many terms: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
