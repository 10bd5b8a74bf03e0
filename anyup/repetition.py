"""A call like an earlier one, repeated without the Python that decides how: the same launches, the same operations.

What a call on a card decides (backends, configs, grids, strides, conversions) follows from its signature: shapes,
strides, dtypes, alignment, settings, and where the weights lie. So the second and the third call of a signature are
recorded, as a straight line of torch operations and launches of compiled kernels; where both are alike, later ones run
that line. Weights are read where they are, at each call: nothing that is made of their numbers is kept, so that it does
not matter who writes to them, and how.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyup.budget import has_room
from anyup.image_context import ImageContext, weights_of
from anyup.ops.precision import autocasts, float32_matmul_precision, without_autocast
from anyup.ops.registration import BODIES

if TYPE_CHECKING:
    from anyup.kernels.launch import Launch
    from anyup.network import Network

logger = logging.getLogger("anyup")

DEVICES = ("cuda",)
"""Kinds of devices on which calls are repeated."""

FULL_CALLS = 3
"""Of a signature: one that compiles, and two that are recorded."""

_MOST_SIGNATURES = 32
_MOST_STEPS = 600
_ALIGNMENT = 512
"""Of each place in a buffer, in bytes, as torch's allocator aligns on a GPU."""

_LARGE = 2**24
"""Bytes from which on what launches alone read and write is let go when the last one has, and lies by itself."""

_ALLOCATING = tuple(f"aten::{name}" for name in ("empty", "new_empty", "empty_like", "empty_strided"))

_MAKERS = ("anyup", "torch")

Signature = tuple[Any, ...]
Results = tuple[Tensor, ...]


class Unrecordable(Exception):
    """A call that cannot be repeated as a straight line, and why."""


@dataclass(frozen=True)
class Line:
    """A call as a straight line of Python.

    Attributes:
        source: a function `repeat(stream, ...)` of the call's tensors, that returns its results.
        names: what else the source mentions: operations, compiled kernels, settings, tensors.
        found: the tensors that the call has found and not made: weights, tables.
    """

    source: str
    names: dict[str, Any]
    found: list[Tensor]

    def function(self) -> Callable[..., Results]:
        """The compiled source."""
        names = dict(self.names)
        exec(compile(self.source, "<a repeated call of anyup>", "exec"), names)
        return names["repeat"]

    def is_like(self, other: Line) -> bool:
        """Whether both do the same with the same tensors."""
        return (
            self.source == other.source
            and len(self.found) == len(other.found)
            and all(mine is its for mine, its in zip(self.found, other.found, strict=True))
            and all(_same(value, other.names[name]) for name, value in self.names.items())
        )


def _same(mine: Any, its: Any) -> bool:
    # Views of what was found are new ones each time.
    return isinstance(mine, (Tensor, functools.partial)) or mine is its or mine == its


@dataclass(frozen=True)
class Step:
    """A statement of a line.

    Attributes:
        made, read: names of tensors.
        call: the name of what is called.
        arguments: in the source's words.
        launch: "" of an operation of torch; "direct" of a launch that takes addresses, or "again".
        fresh: bytes, of an operation that allocates them and does nothing else.
    """

    made: list[str]
    read: list[str]
    call: str
    arguments: list[str]
    launch: str = ""
    fresh: int = 0

    def told(self, scratch: dict[str, int]) -> str:
        """The statement, with the places in one allocation of what is there."""
        words = [f"memory + {scratch[word]}" if word in scratch else word for word in self.arguments]
        if self.launch == "opaque_zero":
            words = [str(scratch.get(word, word)) for word in self.arguments]
            words = ["buffer", *words] if scratch else words
        target = f"{', '.join(self.made)} = " if self.made else ""
        return f"{target}{self.call}({', '.join(words)})"


class Recorder(TorchDispatchMode):
    """Writes down what torch and Triton are asked for on behalf of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._names: dict[str, Any] = {}
        self._found: list[Tensor] = []
        self._steps: list[Step] = []
        self._begins_with: dict[str, str] = {}  # a view, and what it is a view of from its first number on
        self._made = 0
        self._device = tensors[0].device
        self._inputs = [self._call(tensor, f"a{index}") for index, tensor in enumerate(tensors)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and write it down; an operator of ours by its body."""
        kwargs = kwargs or {}
        if func in BODIES:
            with self:
                return BODIES[func](*args, **kwargs)
        if "as_strided" in func._schema.name and len(args) + len(kwargs) > 3:
            raise Unrecordable("a place in memory")
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self._known_as(tensor, "t") is None for tensor in _written(func, args, kwargs)):
            raise Unrecordable(f"{func} writes to what the call has not made")
        told = [*(self._told(value) for value in args), *(f"{name}={self._told(kwargs[name])}" for name in kwargs)]
        read = [self._told(tensor) for tensor in used]
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in used) and not func._schema.is_mutable:
            return result  # nothing was to do
        if func._schema.is_mutable:
            self._steps.append(Step([], read, self._name("f", func), told))
            return result
        if not used and not isinstance(result, Tensor):
            return result  # of dtypes, say
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, (list, tuple)) or not all(isinstance(made, Tensor) for made in results):
            raise Unrecordable(f"{func} reads numbers")
        # Not by its schema, that says "a view" of what may be a copy: `contiguous`, `to`, `reshape`.
        is_view = bool(read) and all(_shares(view, used[0]) for view in results)
        if is_view and all(name[0] == "c" for name in read):
            for view in results:  # of a weight: it is where it is
                self._call(view, self._name("c", view))
            return result
        names = [self._call(made, self._next()) for made in results]
        if isinstance(result, Tensor) and func._schema.name in _ALLOCATING:
            told = [str(list(result.shape)), str(list(result.stride()))]
            told += [f"dtype={self._told(result.dtype)}", f"device={self._told(result.device)}"]
            fresh = result.untyped_storage().nbytes() if result.device == self._device else 0
            self._steps.append(Step(names, [], self._name("f", torch.empty_strided), told, fresh=fresh))
            return result
        if is_view:
            for name, view in zip(names, results, strict=True):
                if view.data_ptr() == used[0].data_ptr():
                    self._begins_with[name] = self._begins_with.get(read[0], read[0])
        made = names if result is not results or len(names) > 1 else [f"[{names[0]}]"]
        self._steps.append(Step(made, read, self._name("f", func), told))
        return result

    def launched(self, launch: Launch, compiled: Any) -> None:
        """Write a launch down. It takes addresses: of a view that begins where its tensor does, the tensor's."""
        from anyup.kernels import launch as launches
        from anyup.ops.kernel_device import interprets

        def told(value: Any) -> str:
            name = self._told(value)
            return self._begins_with.get(name, name)

        names = [name for name, value in launch.arguments.items() if isinstance(value, Tensor)]
        read = [told(launch.arguments[name]) for name in names]
        if launches.is_direct(compiled):
            kernel = self._name("k", compiled)
            words = [*(self._told(value) for value in (*launch.grid, *(1, 1))[:3]), "stream", f"{kernel}.function"]
            words += [f"{kernel}.packed_metadata", "None", "None", "None", *map(told, launch.values)]
            # A weight's address is part of the signature, and a table stays.
            words = [str(self._names[word].data_ptr()) if word in read and word[0] == "c" else word for word in words]
            self._steps.append(Step([], read, self._name("r", compiled.run), words, "direct"))
        elif interprets():
            again = functools.partial(_launch_again, launch, names)
            self._steps.append(Step([], read, self._name("l", again), read, "opaque_zero"))
        else:
            raise Unrecordable("kernels are run by someone else than Triton")

    def line(self, results: Results) -> Line:
        """What was written down, that ends with the results."""
        if len(self._steps) > _MOST_STEPS:
            raise Unrecordable(f"{len(self._steps)} steps, at most {_MOST_STEPS}")
        ends = [self._told(result) for result in results]
        needed, steps = set(ends), []
        for step in reversed(self._steps):
            if not step.made or not needed.isdisjoint(_bare(step.made)):  # else nobody reads it
                steps.append(step)
                needed.update(step.read)
        scratch, size = _scratch(steps[::-1], ends)
        needed, lines = {*ends, *scratch}, [f"    return ({', '.join(ends)},)"]
        for step in steps:
            made = _bare(step.made)
            if made and made[0] in scratch:
                continue
            if gone := sorted(name for name in {*made, *step.read} - needed if name[0] == "t"):
                lines.append(f"    del {', '.join(gone)}")
            lines.append(f"    {step.told(scratch)}")
            needed.update(step.read)
        if scratch:
            allocate = functools.partial(torch.empty, size, dtype=torch.uint8, device=self._device)
            lines.append("    memory = buffer.data_ptr()")
            lines.append(f"    buffer = {self._name('f', allocate)}()")
        lines.append(f"def repeat({', '.join(['stream', *self._inputs])}):")
        return Line("\n".join([*reversed(lines), ""]), self._names, self._found)

    def _next(self) -> str:
        self._made += 1
        return f"t{self._made}"

    def _call(self, tensor: Tensor, name: str) -> str:
        self._known[id(tensor)] = weakref.ref(tensor), name
        return name

    def _known_as(self, tensor: Tensor, kinds: str) -> str | None:
        reference, name = self._known.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor and name[0] in kinds else None

    def _name(self, kind: str, value: Any) -> str:
        """A name for a value in the source."""
        for name, other in self._names.items():
            if name[0] == kind and (other is value or (type(value) is torch.device and other == value)):
                return name
        name = f"{kind}{len(self._names)}"
        self._names[name] = value
        return name

    def _told(self, value: Any) -> str:
        """A value in the source's words."""
        if isinstance(value, Tensor):
            known = self._known_as(value, "atc")
            if known is None:
                self._found.append(value)
                known = self._call(value, self._name("c", value))
            return known
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._told(each) for each in value)}]"
        return self._name("v", value)


def _bare(names: Sequence[str]) -> list[str]:
    """Names without the brackets of a list of one."""
    return [name.strip("[]") for name in names]


def _scratch(steps: Sequence[Step], ends: Sequence[str]) -> tuple[dict[str, int], int]:
    """Places in one allocation for the small of what launches alone read and write, and how many bytes that is.

    Two of these may have the same place where no launch of one lies between the first and the last of the other.
    """
    users: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        for name in step.read:
            users.setdefault(name, []).append(index)
    fresh = {step.made[0]: step.fresh for step in steps if 0 < step.fresh < _LARGE and step.made[0] not in ends}
    fresh = {
        name: -(-size // _ALIGNMENT) * _ALIGNMENT
        for name, size in fresh.items()
        if users.get(name) and all(steps[index].launch for index in users[name])
    }
    placed: list[tuple[int, int, int, int]] = []  # first and last user, first byte and the one after the last
    places: dict[str, int] = {}
    for name, size in sorted(fresh.items(), key=lambda item: -item[1]):
        first, last = users[name][0], users[name][-1]
        place = 0
        for start, stop in sorted(each[2:] for each in placed if each[0] <= last and first <= each[1]):
            if place + size <= start:
                break
            place = max(place, stop)
        placed.append((first, last, place, place + size))
        places[name] = place
    return places, max((stop for _, _, _, stop in placed), default=0)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _shares(view: Tensor, tensor: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _launch_again(launch: Launch, names: Sequence[str], *given: Any) -> None:
    """The launch with other tensors in its own's shapes; a number is a place in the buffer, which comes first."""
    buffer, *places = given if len(given) > len(names) else (None, *given)
    arguments = dict(launch.arguments)
    for name, place in zip(names, places, strict=True):
        own = arguments[name]
        if isinstance(place, int):
            place = buffer[place : place + own.untyped_storage().nbytes()].view(own.dtype)
        arguments[name] = place.as_strided(own.shape, own.stride(), place.storage_offset())
    replace(launch, arguments=arguments)()


class Repetition:
    """A signature: how often it was called, and, once its line is known, what repeats it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._line: Line | None = None
        self._lock = threading.Lock()
        self._peak = 0
        self._repeat: Callable[..., Results] | None = None

    @property
    def is_known(self) -> bool:
        """Whether calls are repeated."""
        return self._repeat is not None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be seen if calls can be repeated."""
        return self._calls < FULL_CALLS

    def run(self, tensors: Sequence[Tensor]) -> Results | None:
        """The results for these tensors; None where the call is to be made in full."""
        from anyup.kernels.launch import hooked, stream_of
        from anyup.ops.kernel_device import interprets

        repeat, index = self._repeat, self._device.index or 0
        if repeat is None or hooked() or not has_room(self._peak, self._device):
            return None
        elsewhere = self._device.type == "cuda" and torch.cuda.current_device() != index
        try:
            with torch.cuda.device(index) if elsewhere else nullcontext(), without_autocast(self._device.type):
                return repeat(0 if interprets() else stream_of(index), *tensors)
        except torch.OutOfMemoryError:
            return None

    def record(self, tensors: Sequence[Tensor], peak: int, call: Callable[[], Results]) -> Results:
        """The results of the call, which is written down the second and the third time."""
        from anyup.kernels.launch import compiles_ahead

        if compiles_ahead() or not self.is_open or not self._lock.acquire(blocking=False):
            return call()
        try:
            self._calls += 1
            if self._calls == 1:  # kernels are compiled, tables are made, what a device refuses is found out
                return call()
            return self._written_down(tensors, peak, call)
        finally:
            self._lock.release()

    def _written_down(self, tensors: Sequence[Tensor], peak: int, call: Callable[[], Results]) -> Results:
        from anyup.kernels.launch import told

        recorder = Recorder(tensors)
        try:
            # Outside of inference mode a dispatch mode sees operations in the parts that torch makes them of.
            with torch.inference_mode(False), torch.no_grad(), told(recorder.launched), recorder:
                results = call()
            line = recorder.line(results)
        except Unrecordable as reason:
            logger.debug("calls like this one are made in full each time: %s", reason)
            self._calls = FULL_CALLS
            return call()
        if self._line is None:
            self._line = line
        elif self._line.is_like(line):
            self._line, self._peak, self._repeat = None, peak, line.function()
        return results


@dataclass(frozen=True)
class Seen:
    """A call whose signature is known, and the tensors that it reads beside weights."""

    repetition: Repetition
    tensors: Sequence[Tensor]

    def repeat(self) -> Results | None:
        """The results; None where the call is to be made in full."""
        return self.repetition.run(self.tensors)

    def record(self, peak: int, call: Callable[[], Results]) -> Results:
        """The results of the call in full, which takes so many bytes, and may be repeated from now on."""
        return self.repetition.record(self.tensors, peak, call)


class Weights:
    """Where an upsampler's parameters and buffers are found: to look for the places takes longer than to look there."""

    def __init__(self, network: Network) -> None:
        parts = list(network.modules())
        self._children = [part._modules for part in parts if part._modules]
        self._identities = self._identified()
        self._held = [held for part in parts for held in (part._parameters, part._buffers) if held]
        self._hooks = [hooks for part in parts[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._parts = [part.__dict__ for part in parts[1:]]
        # A part of another's making may do another thing each time, and its weights may be nowhere.
        self._is_known = all(type(part).__module__.partition(".")[0] in _MAKERS for part in parts) and all(
            type(tensor) in (Tensor, nn.Parameter) for tensor in self.tensors
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for held in self._held for tensor in held.values() if tensor is not None]

    def are_there(self) -> bool:
        """Whether the upsampler has the parts that it had."""
        return self._identified() == self._identities

    def are_watched(self) -> bool:
        """Whether someone is told when a part of the upsampler is called, or answers in its place."""
        return not self._is_known or any(self._hooks) or any(["forward" in part for part in self._parts])  # noqa: C419

    def addresses(self) -> list[int]:
        """Where their numbers are."""
        return [tensor.data_ptr() for held in self._held for tensor in held.values() if tensor is not None]

    def _identified(self) -> list[int]:
        return [id(part) for children in self._children for part in children.values()]


class Calls:
    """The signatures that an upsampler was called with, while its weights are where they are."""

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._addresses: list[int] = []
        self._known: OrderedDict[Signature, Repetition] = OrderedDict()
        self._lock = threading.Lock()

    def weights_of(self, network: Network) -> Weights:
        """The upsampler's weights as they are now; signatures go where these have gone."""
        weights = self._weights
        if weights is None or not weights.are_there() or weights.addresses() != self._addresses:
            with self._lock:
                weights = self._weights = Weights(network)
                self._known.clear()
                self._addresses = weights.addresses()
        return weights

    def find(self, signature: Signature, device: torch.device) -> Repetition:
        """A signature's, new where it is new."""
        with self._lock:
            known = self._known.get(signature)
            if known is None:
                known = self._known[signature] = Repetition(device)
                if len(self._known) > _MOST_SIGNATURES:
                    self._known.popitem(last=False)
            else:
                self._known.move_to_end(signature)
            return known


_calls: weakref.WeakKeyDictionary[Network, Calls] = weakref.WeakKeyDictionary()


def read_by(image: Tensor | ImageContext, features: Tensor, values: Tensor | None) -> dict[str, Tensor]:
    """What a call reads, beside weights, by name."""
    named = {"image": image} if isinstance(image, Tensor) else {}
    if isinstance(image, ImageContext):
        keys = image.image_keys.get((features.shape[2], features.shape[3]))
        named = {"queries": image.queries, **({"image": image.image} if keys is None else {"image keys": keys})}
    return {**named, "features": features, **({} if values is None else {"values": values})}


def seen_before(
    network: Network,
    image: Tensor | ImageContext,
    features: Tensor,
    output_size: Any,
    q_chunk_size: Any,
    values: Tensor | None,
) -> Seen | None:
    """The call with its signature; None where it is to be made in full, each time."""
    # What else there may be has checks to meet.
    if type(features) is not Tensor or features.device.type not in DEVICES or features.dim() != 4:
        return None
    sizes = (q_chunk_size, *(output_size if isinstance(output_size, (list, tuple)) else (output_size,)))
    if any(size is not None and type(size) is not int for size in sizes):
        return None
    weights = image.weights if isinstance(image, ImageContext) else None
    return _seen(network, read_by(image, features, values), (sizes, type(output_size)), weights)


def encoding_seen_before(
    network: Network, image: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]]
) -> Seen | None:
    """The same for `AnyUp.encode_image`, with checked arguments."""
    return _seen(network, {"image": image}, ("encode_image", size, tuple(grids)), None)


def _seen(network: Network, named: dict[str, Tensor], settings: Any, made_with: Any) -> Seen | None:
    """What was seen of these tensors and settings, and of weights with which a context was made."""
    tensors = list(named.values())
    if getattr(network, "_is_replica", False):  # of nn.DataParallel, made for each call
        return None
    if not all(type(each) is Tensor and each.device == tensors[0].device for each in tensors):
        return None
    if len({id(each) for each in tensors}) < len(tensors):  # written down as one
        return None
    device = tensors[0].device
    if device.type not in DEVICES or _is_watched(device):
        return None
    calls = _calls.get(network)
    if calls is None:
        calls = _calls.setdefault(network, Calls())
    weights = calls.weights_of(network)
    if weights.are_watched() or (made_with is not None and made_with != weights_of(weights.tensors)):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *weights.tensors)):
        return None
    signature = (
        settings,
        network.window,
        *named,
        autocasts(device.type) and torch.get_autocast_dtype(device.type),
        float32_matmul_precision(device.type),
        device,
        *((t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors),
    )
    return Seen(calls.find(signature, device), tensors)


def _is_watched(device: torch.device) -> bool:
    """Whether anyone sees operations as they are made: a tracer, a mode, a graph that is captured, a derivative."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not _only_choose_devices())
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _only_choose_devices() -> bool:
    """Whether modes are those of `torch.set_default_device` and of `with torch.device`."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
