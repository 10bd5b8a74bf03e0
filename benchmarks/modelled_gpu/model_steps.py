"""The whole forward, step by step, as it would run on a card that is not here: launches, and what stays torch's.

The model itself runs, on the "meta" device, where nothing is computed: each `Launch` that its operators plan is noted
instead of being launched, and so is each call that torch would answer with kernels of its own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anyup import AnyUp
from anyup.bench.workloads import Workload
from anyup.kernels.launch import Launch, Target
from anyup.ops import kernel_device

ENCODERS = ("image encoder", "key and query encoder")
STAGES = (*ENCODERS, "query projection", "feature unification", "keys", "window attention")
"""In the order of the table. "keys" is what happens on the small grid: the blocks, and what the model asks of torch."""

OPERATORS = {
    "pixel_encoder": "pixel_encoder.operator",
    "pixel_encoder_pair": "pixel_encoder.pair",
    "query_projection": "query_projection.operator",
    "feature_unification": "feature_unification.operator",
    "key_grid": "key_grid.operator",
    "window_attention": "window_attention.operator",
}
"""The module of each operator in `anyup.ops`."""

# Kernels that torch launches for a call, where it is not one: of a group normalisation one for the moments, one for
# scale and shift, one to apply them.
_KERNELS = {"native_group_norm": 3}

_NO_KERNELS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Step:
    """A launch of ours, or a call of torch.

    Attributes:
        stage: one of `STAGES`.
        name: of the kernel, or of torch's operator.
        launch: None where it is torch's.
        bytes_moved: of torch's: each tensor that comes in or goes out, once.
        operations: of torch's: floating-point operations of products.
        kernels: how many are launched; of torch's at least.
    """

    stage: str
    name: str
    launch: Launch | None = None
    bytes_moved: int = 0
    operations: int = 0
    kernels: int = 1


class watched(TorchDispatchMode):
    """Notes the calls that torch answers with a kernel."""

    def __init__(self, steps: list[Step], stage: Callable[[], str], device_type: str) -> None:
        super().__init__()
        self._steps, self._stage, self._device_type = steps, stage, device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made and not any(made[0] is tensor for tensor in given) and _is_view(made[0], given):
            return result
        # What is on another device is of few numbers: tables of windows, made once and kept.
        here = made and made[0].device.type == self._device_type
        if func.namespace == "aten" and here and name not in _NO_KERNELS:
            # In place or not, the products are the same.
            count = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
            self._steps.append(
                Step(
                    self._stage(),
                    name,
                    bytes_moved=sum(_bytes(tensor) for tensor in (*given, *made)),
                    operations=count(*args, **kwargs, out_val=result) if count else 0,
                    kernels=_KERNELS.get(name, 1),
                )
            )
        return result


def _is_view(made: Tensor, given: list[Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return made.untyped_storage()._cdata in storages


def _bytes(tensor: Tensor) -> int:
    """What there is of it: a stride of 0 repeats nothing."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return functools.reduce(lambda a, b: a * b, sizes, 1) * tensor.element_size()


def name_of(launch: Launch) -> str:
    """The kernel's, as a step has it."""
    return str(launch.kernel.__name__).strip("_").removesuffix("_kernel")


def staged(stages: list[str], stage: Callable[[], str], body: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its stage on top of `stages` while it runs."""

    def run(*arguments: Any) -> Any:
        stages.append(stage())
        try:
            return body(*arguments)
        finally:
            stages.pop()

    return run


@contextmanager
def noted(device_type: str, *, launches: bool) -> Iterator[list[Step]]:
    """The steps of a forward on a kind of device that runs in this block; with `launches` they are launched too."""
    steps: list[Step] = []
    stages = ["keys"]
    encoders = iter(ENCODERS)
    launch = Launch.__call__

    def note(self: Launch) -> None:
        if all(self.grid):
            name = name_of(self)
            stage = "feature unification" if name.startswith("feature_unification") else stages[-1]
            steps.append(Step(stage, name, self))
        if launches:
            launch(self)

    def stage_of(name: str) -> str:
        if name.startswith("pixel_encoder"):
            return next(encoders, "keys")
        return "keys" if name == "key_grid" else name.replace("_", " ")

    with ExitStack() as stack:
        stack.enter_context(patch.object(Launch, "__call__", note))
        for name, place in OPERATORS.items():
            # The operator's body as a plain function: what happens inside is seen, and runs on the meta device.
            module = importlib.import_module(f"anyup.ops.{place}")
            stack.enter_context(
                patch.object(module, "_forward", staged(stages, functools.partial(stage_of, name), module._run_forward))
            )
        stack.enter_context(watched(steps, lambda: stages[-1], device_type))
        yield steps


@contextmanager
def pretended_card(card: Target | None, multiprocessors: int | None = None) -> Iterator[None]:
    """Kernels take tensors on "meta", compiled for a card; None: as Triton's interpreter would be given them."""
    unification = importlib.import_module("anyup.ops.feature_unification.fused")
    with ExitStack() as stack:
        stack.enter_context(patch.object(kernel_device, "_device_reasons", lambda device, interpreted: ()))
        if card is not None:
            stack.enter_context(patch.object(kernel_device, "_target", lambda device, interpreted: card))
            for module in (kernel_device, unification):
                stack.enter_context(patch.object(module, "interprets", lambda: False))
        if multiprocessors is not None:
            number = multiprocessors
            stack.enter_context(patch.object(kernel_device, "_multiprocessors", lambda device, interpreted: number))
        yield


def steps_of(
    workload: Workload,
    dtype: torch.dtype,
    card: Target | None,
    *,
    arguments: dict[str, Any] | None = None,
    multiprocessors: int | None = None,
) -> list[Step]:
    """The steps of a forward of `AnyUp(**arguments, backend="triton")` in a dtype, on so many multiprocessors."""
    with torch.device("meta"):
        model = AnyUp(**(arguments or {}), backend="triton").to(dtype).eval()
        image = torch.empty(workload.batch, model.config["input_dim"], *workload.size, dtype=dtype)
        features = torch.empty(workload.batch, workload.channels, *workload.grid, dtype=dtype)
    with torch.no_grad(), pretended_card(card, multiprocessors):
        for _ in range(2):  # the first makes what later ones find
            with noted("meta", launches=False) as steps:
                model(image, features)
    return steps
