"""Feature distances that several test files measure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import NamedTuple

import torch
from support.accuracy import assert_backend_accurate
from torch import Tensor

from anyup.ops.feature_distance import feature_distance


class Shape(NamedTuple):
    """Windows of maps; `windows` 0: the whole map."""

    size: tuple[int, int]
    channels: int = 24
    windows: int = 0
    window: tuple[int, int] = (1, 1)
    batch: int = 1
    channels_last: bool = True  # of the target; the prediction's are last


SHAPES = {
    "whole maps": Shape((9, 7), batch=2),
    "a target with channels first": Shape((9, 7), channels=130, batch=2, channels_last=False),
    "windows that overlap": Shape((9, 8), windows=3, window=(5, 6), batch=2, channels_last=False),
    "a window of all pixels": Shape((5, 6), windows=1, window=(5, 6)),
    "one pixel": Shape((1, 1), channels=3),
    "one row": Shape((1, 40), windows=2, window=(1, 17)),
    "one channel": Shape((6, 5), channels=1, windows=2, window=(3, 2)),
    "blocks of channels": Shape((4, 5), channels=300),
    "empty batch": Shape((4, 5), batch=0),
}


def tensors_of(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prediction, target and places; both maps are of the dtype and not far from each other."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape.size
    prediction = torch.randn(shape.batch, height, width, shape.channels, generator=generator).permute(0, 3, 1, 2)
    if not shape.windows:
        near, places = prediction[:, None], None
    else:
        rows, columns = shape.window
        corners = [
            torch.randint(0, most + 1, (shape.batch, shape.windows), generator=generator)
            for most in (height - rows, width - columns)
        ]
        places = torch.stack(corners, dim=2)
        near = torch.empty(shape.batch, shape.windows, shape.channels, rows, columns)
        for image, of_image in enumerate(places.tolist()):
            for window, (top, left) in enumerate(of_image):
                near[image, window] = prediction[image, :, top : top + rows, left : left + columns]
    target = near + 0.5 * torch.randn(near.shape, generator=generator)
    if shape.channels_last:
        target = target.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    target = (target if shape.windows else target[:, 0]).to(dtype)
    return prediction.to(dtype), target, places


def assert_distances_accurate(
    shape: Shape, dtype: torch.dtype = torch.float32, *, backend: str = "torch", seed: int = 0
) -> None:
    """The error rule for a backend.

    A batch of few images has few results, where the reference's own error is sometimes small by luck: what one batch
    does not decide, one of six times as many images does. A wrong result fails each time.
    """
    for more in (1, 6):
        prediction, target, places = tensors_of(shape._replace(batch=more * shape.batch), dtype, seed)
        with suppress(AssertionError) if more == 1 else nullcontext():
            assert_backend_accurate(measured(target, places), {"prediction": prediction}, backend=backend)
            return


def measured(target: Tensor, places: Tensor | None) -> Callable[..., Tensor]:
    """Both distances (B, 2) of a prediction, as the error rule runs them."""

    def run(*, backend: str, prediction: Tensor) -> Tensor:
        to = {"device": prediction.device, "dtype": torch.float64 if prediction.dtype == torch.float64 else None}
        moved = None if places is None else places.to(prediction.device)
        return torch.stack(feature_distance(prediction, target.to(**to), moved, backend=backend), dim=1)

    return run
