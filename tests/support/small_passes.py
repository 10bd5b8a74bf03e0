"""The window attention's passes on a small workload, as `anyup tune` compares them, wherever kernels run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anyup.bench.attention_passes import AttentionPasses
from anyup.bench.parity import ParityError
from anyup.bench.workloads import Workload
from anyup.kernels.config_tables import KINDS
from anyup.window import RatioWindow

SMALL = Workload((10, 14), (5, 6), channels=20)


def small_passes(
    dtype: torch.dtype, device: torch.device, *, workload: Workload = SMALL, **more: Any
) -> AttentionPasses:
    return AttentionPasses(workload, dtype, device, **{"heads": 2, "head_dim": 16, **more})


def assert_check_finds_a_wider_window(passes: AttentionPasses) -> None:
    """Each kernel's first config by the rule passes the check, and fails it where its window is another."""
    configs = {kernel: rule[0] for kernel in KINDS if (rule := passes.rule(kernel))}
    for kernel, config in configs.items():
        passes.check(kernel, config)
    passes.window = RatioWindow(0.3)
    for kernel, config in configs.items():
        with pytest.raises(ParityError, match=f"{kernel}: error .* exceeds"):
            passes.check(kernel, config)
