"""The kernels of the window attention on one workload: a launch of each with any config, and whether it is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.bench.parity import ParityError
from anyup.bench.workloads import Workload
from anyup.ops.configs import run_first
from anyup.ops.kernel_device import dot_precision, multiprocessors, target
from anyup.ops.window_attention import fused
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import RatioWindow, Window, axis_bounds

if TYPE_CHECKING:
    from anyup.kernels.config_tables import Case, KernelConfig
    from anyup.kernels.launch import Launch

HEADS, HEAD_DIM = 4, 32
WINDOW = RatioWindow(0.1)

_HALF = (torch.float16, torch.bfloat16)
_MOST_DRAWN = 2**24
_CROP = (9, 13)  # rows and columns of pixels: no multiple of a tile


class AttentionPasses:
    """Random queries, keys, values and an output gradient of a workload, and the kernels' launches on them.

    Args:
        workload: the sizes.
        dtype: of all tensors.
        device: where they are.
        heads, head_dim, window: the model's by default.
    """

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
        *,
        heads: int = HEADS,
        head_dim: int = HEAD_DIM,
        window: Window = WINDOW,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            # Drawn on the CPU, the same for each card, and repeated where it would take long.
            count = math.prod(shape)
            drawn = torch.randn(min(count, _MOST_DRAWN), generator=generator).to(device, dtype)
            return drawn.repeat(-(-count // _MOST_DRAWN))[:count].view(shape)

        batch, size, grid, channels = workload.batch, workload.size, workload.grid, workload.channels
        self.workload = workload
        self.window = window
        self.query = noise(batch, *size, heads, head_dim)
        self.key = noise(batch, *grid, heads, head_dim)
        self.value = noise(batch, *grid, channels)
        self.scale = head_dim**-0.5
        self._crops = _crops(workload, window)
        self._noise = noise

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.query.device

    @property
    def heads(self) -> int:
        """How many there are."""
        return self.query.shape[3]

    def most_keys(self, rows: int, columns: int) -> int:
        """The most keys that a tile of rows x columns pixels sees."""
        return most_keys(self.window, self.workload.size, self.workload.grid, (rows, columns))

    def case(self, kernel: str) -> Case:
        """What a table calls a kernel on this workload."""
        return fused.case(kernel, self.query, self.key, self.value, self.window)

    def rule(self, kernel: str) -> Sequence[KernelConfig]:
        """The configs of a kernel where there is no table, best first; none where it is not for this workload."""
        from anyup.kernels import window_attention_config

        known: dict[str, Any] = {
            "target": target(self.device),
            "half": self.query.dtype in _HALF,
            "heads": self.heads,
            "head_dim": self.query.shape[4],
        }
        if kernel == "forward":
            return window_attention_config.forward_configs(self.most_keys, **known, channels=self.workload.channels)
        if kernel == "backward_query":
            return window_attention_config.backward_query_configs(self.most_keys, **known)
        w = self.workload
        sizes = (w.size[0] * w.size[1], w.batch * w.keys, w.channels)
        if kernel == "backward_key_value":
            return window_attention_config.backward_key_value_configs(*sizes, **known)
        return window_attention_config.backward_grid_configs(*sizes, of_values=kernel == "backward_value", **known)

    def fitted(self, kernel: str, config: KernelConfig) -> KernelConfig | None:
        """A config as it would be launched on this workload; None where it does not fit."""
        from anyup.kernels.config_tables import fitted

        return fitted(config, self.rule(kernel), most_keys=self.most_keys, channels=self.workload.channels)

    def launch(self, kernel: str, config: KernelConfig) -> Launch:
        """The launch to time."""
        return self._plan(kernel, config, None if kernel == "forward" else self._dense)[0]

    def check(self, kernel: str, config: KernelConfig) -> None:
        """Run a kernel; raise ParityError unless its result obeys the error rule, where a few pixels decide it.

        Outputs and gradients of queries are looked at there; gradients of keys and values are those of an output
        gradient that is zero everywhere else. The rule is the tests' (docs/design.md): twice as far from the
        definition in float64 as the definition in the tensors' dtype, and two roundings of the largest value.
        """
        launch, results = self._plan(kernel, config, None if kernel == "forward" else self._sparse)
        launch()
        exact, reference = self._expected[kernel]
        for found, wide, narrow in zip(self._looked_at(kernel, results), exact, reference, strict=True):
            largest = _largest(wide)
            error = _largest(found.double().cpu() - wide)
            bound = 2 * _largest(narrow.double() - wide) + 2 * torch.finfo(narrow.dtype).eps * largest
            if not error <= bound:  # a NaN is no small error
                raise ParityError(f"{kernel}: error {error:.1e} exceeds {bound:.1e} (values up to {largest:.1e})")

    def _plan(self, kernel: str, config: Any, given: Mapping[str, Tensor] | None) -> tuple[Launch, tuple[Tensor, ...]]:
        """A launch and the tensors it fills; gradients of keys and values are (parts, ...)."""
        from anyup.kernels.window_attention_backward_grid import plan_backward_key, plan_backward_value
        from anyup.kernels.window_attention_backward_key_value import plan_backward_key_value
        from anyup.kernels.window_attention_backward_query import plan_backward_query
        from anyup.kernels.window_attention_forward import plan_forward

        q, k, v = self.query, self.key, self.value
        shared: dict[str, Any] = {
            "window": fused.window_rule(self.window, self.workload.grid),
            "scale": self.scale,
            "precision": dot_precision(),
            "config": config,
        }
        if given is None:
            out, no_lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(0, dtype=torch.float32)
            return plan_forward(q, k, v, out, no_lse, **shared, kept=self._kept(config)), (out,)
        grad, lse, inv_l, delta = (given[name] for name in ("grad", "lse", "inv_l", "delta"))
        if kernel == "backward_query":
            result, *statistics = torch.empty_like(q), torch.empty_like(inv_l), torch.empty_like(delta)
            return plan_backward_query(grad, q, k, v, lse, result, *statistics, **shared), (result,)
        filled = {"backward_key": (k,), "backward_value": (v,), "backward_key_value": (k, v)}[kernel]
        results = tuple(
            like.new_empty((config.partials, *like.shape), dtype=torch.float32 if config.partials > 1 else like.dtype)
            for like in filled
        )
        if kernel == "backward_value":
            return plan_backward_value(grad, q, k, lse, inv_l, *results, **shared), results
        plan = plan_backward_key if kernel == "backward_key" else plan_backward_key_value
        return plan(grad, q, k, v, lse, inv_l, delta, *results, **shared), results

    def _kept(self, config: Any) -> Tensor | None:
        """Memory for the weights of the forward pass, where its config keeps them there."""
        from anyup.kernels.window_attention_forward import allocate_kept

        on = multiprocessors(self.value.device)
        return allocate_kept(self.value, most_keys=self.most_keys, multiprocessors=on, config=config)

    # What the backward passes are given: a gradient of noise for the clock, since arithmetic on zeros takes less power
    # than it takes in earnest, and one that is zero but for the crops for the eye.

    @cached_property
    def _dense(self) -> Mapping[str, Tensor]:
        return self._given(self._noise(*self.query.shape[:3], self.value.shape[3]))

    @cached_property
    def _sparse(self) -> Mapping[str, Tensor]:
        return self._given(self._sparse_grad)

    @cached_property
    def _sparse_grad(self) -> Tensor:
        grad = self.value.new_zeros(*self.query.shape[:3], self.value.shape[3])
        for crop in self._crops:
            part = grad[-1][crop.area]
            part.copy_(self._noise(*part.shape))
        return grad

    def _given(self, grad: Tensor) -> Mapping[str, Tensor]:
        """A gradient of the output, and the statistics that the forward pass and the first backward pass store."""
        from anyup.kernels.window_attention_backward_query import plan_backward_query
        from anyup.kernels.window_attention_forward import plan_forward

        q, k, v = self.query, self.key, self.value
        lse, inv_l, delta = (q.new_empty(q.shape[:4], dtype=torch.float32) for _ in range(3))
        shared: dict[str, Any] = {
            "window": fused.window_rule(self.window, self.workload.grid),
            "scale": self.scale,
            "precision": dot_precision(),
        }
        out, grad_query = v.new_empty(grad.shape), torch.empty_like(q)
        run_first(
            lambda c: plan_forward(q, k, v, out, lse, **shared, config=c, kept=self._kept(c))(), self.rule("forward")
        )
        run_first(
            lambda c: plan_backward_query(grad, q, k, v, lse, grad_query, inv_l, delta, **shared, config=c)(),
            self.rule("backward_query"),
        )
        return {"grad": grad, "lse": lse, "inv_l": inv_l, "delta": delta}

    def _looked_at(self, kernel: str, results: Sequence[Tensor]) -> list[Tensor]:
        """What of a kernel's results is compared, in the order of the reference's."""
        if kernel in ("forward", "backward_query"):
            return [results[0][-1][crop.area].flatten(0, 1) for crop in self._crops]
        return [result.sum(dim=0)[-1].to(self.key.dtype).flatten(0, 1) for result in results]

    @cached_property
    def _expected(self) -> Mapping[str, tuple[list[Tensor], list[Tensor]]]:
        """By kernel, what `_looked_at` should be: in float64, and as the definition in the tensors' dtype gives it."""
        exact, reference = (self._definition(dtype) for dtype in (torch.float64, self.query.dtype))
        return {kernel: (exact[kernel], reference[kernel]) for kernel in exact}

    def _definition(self, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        key, value = (t[-1].flatten(0, 1).to("cpu", dtype).requires_grad_() for t in (self.key, self.value))
        grad = self._sparse_grad
        queries, outputs, grads = [], [], []
        for crop in self._crops:
            query = self.query[-1][crop.area].flatten(0, 1).to("cpu", dtype).requires_grad_()
            logits = torch.einsum("nad,mad->anm", query, key[crop.keys]) * self.scale
            weights = torch.softmax(logits.masked_fill(~crop.sees, float("-inf")), dim=-1).mean(dim=0)
            queries.append(query)
            outputs.append(weights @ value[crop.keys])
            grads.append(grad[-1][crop.area].flatten(0, 1).to("cpu", dtype))
        gradients = torch.autograd.grad(outputs, [*queries, key, value], grads)
        return {
            "forward": [out.detach() for out in outputs],
            "backward_query": list(gradients[:-2]),
            "backward_key": [gradients[-2]],
            "backward_value": [gradients[-1]],
            "backward_key_value": list(gradients[-2:]),
        }


@dataclass(frozen=True)
class _Crop:
    """A few pixels of the last image.

    Attributes:
        area: rows and columns of the pixels.
        keys: numbers of the keys that any of them sees, row by row, (keys,).
        sees: whether a pixel sees a key, (pixels, keys).
    """

    area: tuple[slice, slice]
    keys: Tensor
    sees: Tensor


def _crops(workload: Workload, window: Window) -> list[_Crop]:
    """A rectangle of pixels in the middle, across borders of tiles, and one in the last corner unless they overlap."""
    bounds = [axis_bounds(window, *sizes) for sizes in zip(workload.size, workload.grid, strict=True)]
    crops: list[_Crop] = []
    for corner in (False, True):
        slices, seen = [], []
        for size, keys, length, (start, stop) in zip(workload.size, workload.grid, _CROP, bounds, strict=True):
            first = max(size - length, 0) if corner else max((size - length) // 2, 0)
            pixels = slice(first, min(first + length, size))
            key = torch.arange(keys)
            low, high = (torch.tensor(bound[pixels])[:, None] for bound in (start, stop))
            slices.append(pixels)
            seen.append((key >= low) & (key < high))
        sees = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).flatten(2, 3).flatten(0, 1)
        if corner and all(crops[0].area[axis].stop > slices[axis].start for axis in (0, 1)):
            continue  # a pixel in both would count twice in the gradients of its keys
        used = sees.any(dim=0).nonzero()[:, 0]
        crops.append(_Crop((slices[0], slices[1]), used, sees[:, used]))
    return crops


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
