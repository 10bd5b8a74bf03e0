"""A call within a budget of memory: with whole maps where they fit, else one image after the other and in bands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.budget import is_small, limit_on
from anyup.limited_memory import choice
from anyup.limited_memory.executor import Executor, OutOfMemoryRetry
from anyup.limited_memory.request import Request
from anyup.limited_memory.stream import stream
from anyup.limited_memory.task import Task
from anyup.untraced import untraced

if TYPE_CHECKING:
    from anyup.repetition import Seen


@untraced
def call(
    request: Request, *, vis_attn: bool, max_memory: float | str | None, out: Any, seen: Seen | None = None
) -> Any:
    """The call of an `AnyUp`: (B, C, H, W), or `out`. A call with whole maps is recorded for repetition (`seen`)."""
    with request.threads():
        differentiates = request.wants_gradient
        for name, setting in (("out", out), ("max_memory", max_memory)):
            if setting is not None and differentiates:
                raise RuntimeError(
                    f"{name} does not differentiate: call it under torch.no_grad() or torch.inference_mode()"
                )
        if out is not None:
            if vis_attn:
                raise ValueError("vis_attn: the picture is not drawn where the result goes to `out`")
            for _ in stream(request, max_memory=max_memory, out=out, keep=True):
                pass
            return out
        task = request.task()
        limit = _limit(task, request.device, max_memory)
        request.check_room(task, whole=differentiates or limit is None)
        if differentiates:
            return request.upsample_whole(vis_attn)
        retry = OutOfMemoryRetry(choice.choose(task, limit))
        if retry.plan.order == "whole":
            try:
                return _whole(request, vis_attn, retry.plan.peak_bytes, seen)
            except torch.OutOfMemoryError as error:
                retry.take_less(error)
        if vis_attn:
            raise ValueError(f"vis_attn: the picture needs whole maps, which do not fit; the plan is\n{retry.plan}")
        return _one_by_one(request, retry)


def _limit(task: Task, device: torch.device, max_memory: float | str | None) -> int | None:
    """The bytes that a call may allocate; None: no limit, as where whole maps are small beside the GPU's memory."""
    if max_memory is None and device.type == "cuda" and is_small(choice.choose(task, None).peak_bytes, device):
        return None
    return limit_on(device, max_memory)


def _whole(request: Request, vis_attn: bool, peak_bytes: int, seen: Seen | None) -> Tensor:
    if seen is None or not seen.repetition.is_open:
        return request.upsample_whole(vis_attn)
    # The recorder does not see the kernels that torch.compile launches for flex attention.
    if "flex" in request.explain().chosen.values():
        return request.upsample_whole(vis_attn)
    return seen.record(peak_bytes, lambda: (request.upsample_whole(vis_attn),))[0]


@torch.no_grad()
def _one_by_one(request: Request, retry: OutOfMemoryRetry) -> Tensor:
    """Upsample one image after the other by the plan: (B, C, H, W), channels last in memory."""
    (height, width), out = request.size, None
    for index in range(len(request)):
        executor = Executor(request.one(index), retry)
        executor.prepare()
        if out is None:
            out = executor.new(len(request), height, width)
        executor.fill(out[index : index + 1], slice(0, height), slice(0, width))
    assert out is not None
    return out.permute(0, 3, 1, 2)
