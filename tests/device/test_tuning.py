"""What `anyup tune` compares before it times: in every dtype, on whatever runs kernels here."""

from __future__ import annotations

import pytest
import torch
from support.small_passes import assert_check_finds_a_wider_window, small_passes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rule_s_configs_pass_the_check_and_a_wider_window_does_not(dtype: torch.dtype) -> None:
    assert_check_finds_a_wider_window(small_passes(dtype, torch.device("cuda")))
