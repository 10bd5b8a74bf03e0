"""Compiling kernels before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from anyup.argument_checks import OutputSize, check_size
from anyup.ops.configs import is_refusal
from anyup.ops.kernel_device import installed, interprets
from anyup.repetition import FULL_CALLS

if TYPE_CHECKING:
    from anyup.model import AnyUp


def compile_ahead(call: Callable[[], object], device: torch.device) -> None:
    """Compile a call's kernels side by side: the call runs without launching them, and its result is undefined."""
    if device.type != "cuda" or not installed() or interprets():
        return
    from anyup.kernels.launch import compiled_ahead

    try:
        with compiled_ahead():
            call()
    except Exception as error:
        # The call itself meets what the device refuses, and warns.
        if not is_refusal(error):
            raise


@torch.no_grad()
def warm_up(
    upsampler: AnyUp,
    image_size: Sequence[int],
    feature_size: Sequence[int],
    channels: int,
    *,
    output_size: OutputSize,
    values: int | None,
    batch: int,
    dtype: torch.dtype | None,
) -> None:
    """See `AnyUp.warm_up`."""
    image_size, feature_size = check_size("image_size", image_size), check_size("feature_size", feature_size)
    for name, number in (("channels", channels), ("values", values), ("batch", batch)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}: expected a positive integer, got {number!r}")
    device, dtype = upsampler.rope.freqs.device, dtype or upsampler.rope.freqs.dtype
    # Values from -2 to 2, because the check warns about an image that is not normalised.
    image = torch.rand(batch, upsampler.config["input_dim"], *image_size, device=device).mul(4).sub(2).to(dtype)
    features = torch.rand(batch, channels, *feature_size, device=device).to(dtype)
    carried = None if values is None else torch.rand(batch, values, *feature_size, device=device).to(dtype)

    def call() -> object:
        return upsampler(image, features, output_size, values=carried)

    compile_ahead(call, device)
    for _ in range(FULL_CALLS):
        call()
