"""`python -m benchmarks.host`: what a call on a card costs the host, in microseconds, part by part; no card is needed.

The card is a stand-in (`stand_in_card.py`): the whole `triton` path runs, and Triton's driver, JIT and C launcher with
it, over a libcuda that does nothing. A part is what a call costs less without it, or what is timed inside of it. Times
are brought to one state of the machine by a loop of additions beside each call.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyup import AnyUp
from anyup.ops.precision import working_dtype
from benchmarks.modelled_gpu.model_steps import OPERATORS

Change = Callable[[], AbstractContextManager[object]]

_ADDITIONS = 5000
_WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select")

_ROUNDS = 60
_WARM = 6


def loop_of_additions() -> int:
    """Nanoseconds that it takes: the clock of this machine in its present state."""
    start, total = time.thread_time_ns(), 0
    for number in range(_ADDITIONS):
        total += number
    return time.thread_time_ns() - start


class Clock:
    """Microseconds of processor time of calls that alternate, each brought to the fastest loop of additions seen."""

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[int, int]]] = {}

    def alternate(self, call: Callable[[], object], changes: Mapping[str, Change], rounds: int = _ROUNDS) -> None:
        """The call with each of the changes in each round; what a change takes to make is not timed."""
        for change in changes.values():
            with change():
                for _ in range(_WARM):
                    call()
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for name, change in changes.items():
                    with change():
                        before, start = loop_of_additions(), time.thread_time_ns()
                        call()
                        took = time.thread_time_ns() - start
                    self._samples.setdefault(name, []).append((took, max(before, loop_of_additions())))
        finally:
            gc.enable()

    @property
    def loop(self) -> float:
        """Microseconds of the fastest loop of additions."""
        return min(loop for samples in self._samples.values() for _, loop in samples) / 1e3

    def microseconds(self, name: str) -> float:
        """A tenth of the calls were faster."""
        times = sorted(took / loop for took, loop in self._samples[name])
        return times[len(times) // 10] * self.loop


class Counted(TorchDispatchMode):
    """What torch is asked for, views apart: operations of its own that make or fill memory, and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.allocations = self.views = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count."""
        name = func._schema.name
        # A number that is read, a shape that depends on numbers, a copy from one device to another.
        self.waits += name in _WAITS or ("_to_copy" in name and (kwargs or {}).get("device") is not None)
        result = func(*args, **kwargs)
        if "empty" in name:
            self.allocations += 1
        elif _is_view(result, (args, kwargs)) and not func._schema.is_mutable:
            self.views += 1
        else:
            self.operations[name.removeprefix("aten::")] += 1
        return result


def _is_view(result: Any, given: Any) -> bool:
    """Whether nothing was made; not by the schema, that says "a view" of what may be a copy: `contiguous`, `to`."""
    storages = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    return all(leaf.untyped_storage().data_ptr() in storages for leaf in made)


@contextmanager
def decided_as_on_a_card() -> Iterator[None]:
    """What is decided by a tensor's being on the CPU is decided as on a card."""
    with ExitStack() as stack:
        for where, attribute, instead in (
            ("anyup.network", "key_dtype", lambda dtype, device: working_dtype(dtype)),
            ("anyup.ops.convolution", "goes_through_convolution", lambda x: False),
            ("anyup.network", "on_threads_for", lambda largest, device: nullcontext()),
            ("anyup.argument_checks", "_warned_unnormalised", True),
        ):
            stack.enter_context(patch.object(importlib.import_module(where), attribute, instead))
        yield


@contextmanager
def bodies() -> Iterator[None]:
    """Each operator's body is called directly, so that a dispatch mode sees what it does."""
    with ExitStack() as stack:
        for place in OPERATORS.values():
            operator = importlib.import_module(f"anyup.ops.{place}")
            stack.enter_context(patch.object(operator, "_forward", operator._run_forward))
        yield


def count(call: Callable[[], object]) -> dict[str, Any]:
    """What one call asks torch and the driver for."""
    from anyup.kernels.launch import Launch

    launches: Counter[str] = Counter()

    def launch(self: Launch) -> None:
        launches[self.kernel.__name__] += bool(all(self.grid))

    counted = Counted()
    with bodies(), patch.object(Launch, "__call__", launch), torch.no_grad():
        call()  # makes tables that later calls find
        launches.clear()
        with counted:
            call()
    return {
        "launches": sum(launches.values()),
        "operations": sum(counted.operations.values()),
        "allocations": counted.allocations,
        "views": counted.views,
        "waits": counted.waits,
        "kernels": dict(launches),
        "torch": dict(counted.operations),
    }


class Recorded(TorchDispatchMode):
    """What torch is asked for, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and keep it."""
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(call: Callable[[], object]) -> list[tuple[Any, Any, Any]]:
    """All that a call asks torch for."""
    with bodies(), Recorded() as mode:
        call()
    return mode.calls


def made(dtype: torch.dtype, output: int, grid: int, channels: int) -> tuple[AnyUp, Tensor, Tensor]:
    """The default upsampler, an image (1, 3, output, output) and features (1, channels, grid, grid)."""
    image = torch.zeros(1, 3, output, output, dtype=dtype)
    return AnyUp().to(dtype).eval(), image, torch.zeros(1, channels, grid, grid, dtype=dtype)


def measure(dtype: torch.dtype, output: int, grid: int, channels: int) -> dict[str, Any]:
    """The parts of a call, of the sizes of `made`."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.jit import JITFunction

    from anyup import repetition
    from anyup.kernels.launch import Launch

    upsampler, image, features = made(dtype, output, grid, channels)

    def call() -> object:
        return upsampler(image, features)

    def nothing(*_: object, **__: object) -> None:
        return None

    def without(owner: Any, attribute: str) -> Change:
        return lambda: patch.object(owner, attribute, nothing)

    def upsample(*_: object) -> object:
        return upsampler.upsample_whole(image, features, (output, output))

    def unchecked() -> AbstractContextManager[object]:
        return patch.object(type(upsampler), "__call__", upsample)

    changes: dict[str, Change] = {
        "repeated": lambda: patch.object(repetition, "DEVICES", ("cpu",)),
        "call": nullcontext,
        "the C launcher": without(CudaLauncher, "__call__"),
        "Triton's JIT": without(JITFunction, "run"),
        "launches": without(Launch, "__call__"),
        "operators' wrappers": bodies,
        "checks and planning": unchecked,
    }
    with torch.inference_mode(), decided_as_on_a_card():
        call()
        counted = count(call)
        clock = Clock()
        clock.alternate(call, changes)
        asked = recorded(call)
        repeated = Clock()
        repeated.alternate(lambda: [function(*args, **kwargs) for function, args, kwargs in asked], {"": nullcontext})
    whole = clock.microseconds("call")
    parts = {name: whole - clock.microseconds(name) for name in changes if name not in ("call", "repeated")}
    parts["torch's operations"] = repeated.microseconds("")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "output": output,
        "grid": grid,
        "channels": channels,
        "loop": clock.loop,
        "call": whole,
        "repeated": clock.microseconds("repeated"),
        "parts": parts,
        "counts": counted,
    }


def report(result: dict[str, Any]) -> str:
    """The figures for people."""
    counts = result["counts"]
    lines = [
        f"{result['output']} from {result['grid']}, C = {result['channels']}, {result['dtype']}: "
        f"{result['repeated']:.0f} microseconds of host time a call ({_ADDITIONS} additions: {result['loop']:.0f})",
        f"  {'a call in full':<28}{result['call']:8.0f}, of it",
        *(f"    {name:<26}{value:8.0f}" for name, value in result["parts"].items()),
        f"  {counts['launches']} launches, {counts['operations']} operations of torch, "
        f"{counts['allocations']} allocations, {counts['views']} views, {counts['waits']} waits for the device",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--output", type=int, default=448, metavar="PIXELS")
    parser.add_argument("--grid", type=int, default=4, metavar="CELLS")
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    options = parser.parse_args(arguments)
    from benchmarks import stand_in_card

    torch.set_num_threads(1)
    launches = stand_in_card.put_in()
    result = measure(getattr(torch, options.dtype), options.output, options.grid, options.channels)
    assert launches() > 0, "no launch has reached the driver"
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main(sys.argv[1:])
