"""What `anyup tune` compares before it times: in every dtype, on whatever runs kernels here."""

from __future__ import annotations

import pytest
import torch

from anyup.bench.attention_passes import AttentionPasses, ParityError
from anyup.bench.workloads import Workload
from anyup.kernels.config_tables import KINDS
from anyup.window import RatioWindow

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rule_s_cuts_pass_the_check_and_a_wider_window_does_not(dtype: torch.dtype) -> None:
    passes = AttentionPasses(Workload((10, 14), (5, 6), channels=20), dtype, torch.device("cuda"), heads=2, head_dim=16)
    for kernel in KINDS:
        passes.check(kernel, passes.rule(kernel)[0])
    passes.window = RatioWindow(0.3)
    for kernel in KINDS:
        with pytest.raises(ParityError, match=f"{kernel}: error .* exceeds"):
            passes.check(kernel, passes.rule(kernel)[0])
