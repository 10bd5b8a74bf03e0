"""The keys' kernels on a card's path, against float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import fill, wave

from anyup import AnyUp

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_obey_the_error_rule(dtype: torch.dtype, launched: Counter[str]) -> None:
    image_keys, features = wave((2, 3, 7, 16), 3).to(dtype), wave((2, 20, 3, 7), 7).to(dtype)

    def upsampler() -> AnyUp:
        return fill(AnyUp(qk_dim=16, num_heads=2, kernel_size_lfu=3), 0).eval().to(dtype)

    with torch.no_grad():
        keys, copied = upsampler().to("cuda").keys(image_keys.cuda(), features.cuda())
        assert launched.total() == 2 + 4 + 1 + 4, launched
        assert torch.equal(copied.cpu(), features) and copied.permute(0, 2, 3, 1).is_contiguous()
        reference, _ = upsampler().keys(image_keys, features)
        exact, _ = upsampler().double().keys(image_keys.double(), features.double())
    assert_close_enough(keys.cpu(), reference.to(dtype), exact)
