"""The upsampled features at single pixels, without any map of the output's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyup.budget import limit_on
from anyup.limited_memory import choice
from anyup.limited_memory.executor import Executor
from anyup.limited_memory.prediction import whole
from anyup.limited_memory.request import Request
from anyup.untraced import untraced


@untraced
def at_points(request: Request, points: Tensor, *, max_memory: float | str | None) -> Tensor:
    """`AnyUp.at_points`: (B, N, C)."""
    values = request.values
    pixels, weights = _pixels(_checked(points, len(request), request.size), request.size)
    # Planned as a stream of one pixel: statistics and keys, but no map of the output.
    task = request.task(region=(0, 0, 1, 1), tile=(1, 1))
    if request.network.wants_gradient(request.image):
        if max_memory is not None:
            raise RuntimeError("max_memory: the gradient of the image or the weights needs whole maps of the queries")
        plan = whole(task, None)
    else:
        plan = choice.choose(task, limit_on(request.device, max_memory))
    with torch.no_grad():  # the executor checks the backends of a stream, which has no gradients
        executor = Executor(request, plan, of_points=True)
    with request.threads():
        found = [executor.at(index, *places.unbind(1)) for index, places in enumerate(pixels)]
    result = torch.stack(found) if found else values.new_empty(0, pixels.shape[1], values.shape[1])
    if weights is None:
        return result
    corners = result.unflatten(1, (4, -1))
    return (corners * weights[..., None].to(corners)).sum(dim=1)


def _checked(points: Any, batch: int, size: tuple[int, int]) -> Tensor:
    """The points on the CPU, in int64 or float64; raises a ValueError or TypeError unless all lie in the output."""
    if not isinstance(points, Tensor):
        raise TypeError(f"points: expected a tensor, got {type(points).__name__}")
    if points.dim() != 3 or points.shape[0] != batch or points.shape[2] != 2:
        raise ValueError(
            f"points: expected rows and columns ({batch}, N, 2) for a batch of {batch}, got {tuple(points.shape)}"
        )
    if points.dtype == torch.bool or points.is_complex():
        raise TypeError(f"points: expected integers or floating-point numbers, got {points.dtype}")
    points = points.detach().to("cpu", torch.float64 if points.is_floating_point() else torch.int64)
    inside = ((points >= 0) & (points <= torch.tensor(size) - 1)).all(dim=2)  # a NaN fails both comparisons
    if not bool(inside.all()):
        raise ValueError(
            f"points: expected rows from 0 to {size[0] - 1} and columns from 0 to {size[1] - 1}, got "
            f"{points[~inside][0].tolist()}"
        )
    return points


def _pixels(points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The pixels to compute: integer points (B, N, 2) themselves, and None; else the four pixels around each point,
    (B, 4 N, 2), and their weights (B, 4, N).
    """
    if not points.is_floating_point():
        return points, None
    first = points.floor()
    share = points - first
    corners, weights = [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.tensor((down, right))
        corners.append(torch.minimum(first.long() + step, torch.tensor(size) - 1))
        weights.append(torch.where(step.bool(), share, 1 - share).prod(dim=2))
    return torch.cat(corners, dim=1), torch.stack(weights, dim=1)
