"""Repeated calls: a call whose signature is known runs a record of an earlier call, without the Python that decides.

What a call on a card decides (backends, configs, grids, strides, conversions) follows from its signature: shapes,
strides, dtypes, alignment, settings, and the addresses of the weights. So the second and the third call of a signature
are recorded as a `Line`: torch operations and launches of compiled kernels, without a branch. If both lines are equal,
later calls run that line. Each call reads the weights at their addresses, and a line holds nothing computed from their
values, so any code may write to them between two calls.
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
"""Calls of a signature that run in full: the first compiles the kernels, the next two are recorded."""

_MOST_SIGNATURES = 32
_MOST_STEPS = 600
_ALIGNMENT = 512
"""Bytes to which each tensor in the shared scratch buffer is aligned, as torch's allocator aligns on a GPU."""

_LARGE = 2**24
"""A scratch tensor of at least so many bytes has an allocation of its own, which is freed after its last launch."""

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
        found: the tensors that the call reads and does not make, beside its arguments: weights, tables.
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
        """Whether both lines have the same statements and read the same tensors."""
        return (
            self.source == other.source
            and len(self.found) == len(other.found)
            and all(mine is its for mine, its in zip(self.found, other.found, strict=True))
            and all(_same(value, other.names[name]) for name, value in self.names.items())
        )


def _same(mine: Any, its: Any) -> bool:
    # Each call makes new views of the tensors in `found`.
    return isinstance(mine, (Tensor, functools.partial)) or mine is its or mine == its


@dataclass(frozen=True)
class Step:
    """A statement of a line.

    Attributes:
        made, read: names of the tensors that the statement makes and reads.
        call: the name of the function that it calls.
        arguments: as expressions in the line's source.
        launch: "" for an operation of torch; "direct" for a launch that takes addresses; "interpreted" for a launch
            in Triton's interpreter, which takes tensors.
        fresh: the bytes that an allocation allocates; 0 for any other statement.
    """

    made: list[str]
    read: list[str]
    call: str
    arguments: list[str]
    launch: str = ""
    fresh: int = 0

    def statement(self, scratch: dict[str, int]) -> str:
        """The source of the statement; `scratch` are the offsets of the tensors that lie in the shared buffer."""
        words = [f"memory + {scratch[word]}" if word in scratch else word for word in self.arguments]
        if self.launch == "interpreted":
            words = [str(scratch.get(word, word)) for word in self.arguments]
            words = ["buffer", *words] if scratch else words
        target = f"{', '.join(self.made)} = " if self.made else ""
        return f"{target}{self.call}({', '.join(words)})"


class Recorder(TorchDispatchMode):
    """Records the torch operations and the Triton launches of a call that reads some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._names: dict[str, Any] = {}
        self._found: list[Tensor] = []
        self._steps: list[Step] = []
        self._base_of: dict[str, str] = {}  # name of a view -> name of the tensor with the same address
        self._made = 0
        self._device = tensors[0].device
        self._inputs = [self._name_tensor(tensor, f"a{index}") for index, tensor in enumerate(tensors)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it; of our own operators, record the operations of the body."""
        kwargs = kwargs or {}
        if func in BODIES:
            with self:
                return BODIES[func](*args, **kwargs)
        if "as_strided" in func._schema.name and len(args) + len(kwargs) > 3:
            raise Unrecordable("a place in memory")
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self._known_as(tensor, "t") is None for tensor in _written(func, args, kwargs)):
            raise Unrecordable(f"{func} writes to what the call has not made")
        arguments = [self._expression(value) for value in args]
        arguments += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        read = [self._expression(tensor) for tensor in used]
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in used) and not func._schema.is_mutable:
            return result  # an operation that returned its argument, such as a conversion to the same dtype
        if func._schema.is_mutable:
            self._steps.append(Step([], read, self._name_value("f", func), arguments))
            return result
        if not used and not isinstance(result, Tensor):
            return result  # an operation on no tensor, on dtypes for example
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, (list, tuple)) or not all(isinstance(made, Tensor) for made in results):
            raise Unrecordable(f"{func} reads numbers")
        # The schema does not tell: `contiguous`, `to` and `reshape` return a view or a copy.
        is_view = bool(read) and all(_shares(view, used[0]) for view in results)
        if is_view and all(name[0] == "c" for name in read):
            for view in results:  # a view of a weight keeps its address, so it is not a step
                self._name_tensor(view, self._name_value("c", view))
            return result
        names = [self._name_tensor(made, self._next()) for made in results]
        if isinstance(result, Tensor) and func._schema.name in _ALLOCATING:
            arguments = [str(list(result.shape)), str(list(result.stride()))]
            arguments += [f"dtype={self._expression(result.dtype)}", f"device={self._expression(result.device)}"]
            fresh = result.untyped_storage().nbytes() if result.device == self._device else 0
            self._steps.append(Step(names, [], self._name_value("f", torch.empty_strided), arguments, fresh=fresh))
            return result
        if is_view:
            for name, view in zip(names, results, strict=True):
                if view.data_ptr() == used[0].data_ptr():
                    self._base_of[name] = self._base_of.get(read[0], read[0])
        made = names if result is not results or len(names) > 1 else [f"[{names[0]}]"]
        self._steps.append(Step(made, read, self._name_value("f", func), arguments))
        return result

    def launched(self, launch: Launch, compiled: Any) -> None:
        """Record a launch. It takes addresses, so a view that begins where its tensor begins is named as the tensor."""
        from anyup.kernels import launch as launches
        from anyup.ops.kernel_device import interprets

        def address_of(value: Any) -> str:
            name = self._expression(value)
            return self._base_of.get(name, name)

        names = [name for name, value in launch.arguments.items() if isinstance(value, Tensor)]
        read = [address_of(launch.arguments[name]) for name in names]
        if launches.is_direct(compiled):
            kernel = self._name_value("k", compiled)
            words = [self._expression(value) for value in (*launch.grid, *(1, 1))[:3]]
            words += ["stream", f"{kernel}.function"]
            words += [f"{kernel}.packed_metadata", "None", "None", "None", *map(address_of, launch.values)]
            # Constants: the signature holds the address of a weight, and the line keeps a table alive.
            words = [str(self._names[word].data_ptr()) if word in read and word[0] == "c" else word for word in words]
            self._steps.append(Step([], read, self._name_value("r", compiled.run), words, "direct"))
        elif interprets():
            launch_with = functools.partial(_launch_interpreted, launch, names)
            self._steps.append(Step([], read, self._name_value("l", launch_with), read, "interpreted"))
        else:
            raise Unrecordable("kernels are run by someone else than Triton")

    def line(self, results: Results) -> Line:
        """The line of the recorded steps, which returns the results."""
        if len(self._steps) > _MOST_STEPS:
            raise Unrecordable(f"{len(self._steps)} steps, at most {_MOST_STEPS}")
        ends = [self._expression(result) for result in results]
        needed, steps = set(ends), []
        for step in reversed(self._steps):
            if not step.made or not needed.isdisjoint(_bare(step.made)):  # else no later step reads its result
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
            lines.append(f"    {step.statement(scratch)}")
            needed.update(step.read)
        if scratch:
            allocate = functools.partial(torch.empty, size, dtype=torch.uint8, device=self._device)
            lines.append("    memory = buffer.data_ptr()")
            lines.append(f"    buffer = {self._name_value('f', allocate)}()")
        lines.append(f"def repeat({', '.join(['stream', *self._inputs])}):")
        return Line("\n".join([*reversed(lines), ""]), self._names, self._found)

    def _next(self) -> str:
        self._made += 1
        return f"t{self._made}"

    def _name_tensor(self, tensor: Tensor, name: str) -> str:
        self._known[id(tensor)] = weakref.ref(tensor), name
        return name

    def _known_as(self, tensor: Tensor, kinds: str) -> str | None:
        reference, name = self._known.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor and name[0] in kinds else None

    def _name_value(self, kind: str, value: Any) -> str:
        """The name of a value in the line's source."""
        for name, other in self._names.items():
            if name[0] == kind and (other is value or (type(value) is torch.device and other == value)):
                return name
        name = f"{kind}{len(self._names)}"
        self._names[name] = value
        return name

    def _expression(self, value: Any) -> str:
        """A value as an expression in the line's source."""
        if isinstance(value, Tensor):
            known = self._known_as(value, "atc")
            if known is None:
                self._found.append(value)
                known = self._name_tensor(value, self._name_value("c", value))
            return known
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._expression(each) for each in value)}]"
        return self._name_value("v", value)


def _bare(names: Sequence[str]) -> list[str]:
    """The names without the brackets that unpack a list of one result."""
    return [name.strip("[]") for name in names]


def _scratch(steps: Sequence[Step], ends: Sequence[str]) -> tuple[dict[str, int], int]:
    """Byte offsets in one shared buffer for the small tensors that only launches read and write, and the buffer's size.

    Two tensors may overlap if the launches that use the first all come before those that use the second.
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


def _launch_interpreted(launch: Launch, names: Sequence[str], *given: Any) -> None:
    """Run a launch with other tensors of the same shapes; an integer is an offset in the buffer, the first argument."""
    buffer, *places = given if len(given) > len(names) else (None, *given)
    arguments = dict(launch.arguments)
    for name, place in zip(names, places, strict=True):
        own = arguments[name]
        if isinstance(place, int):
            place = buffer[place : place + own.untyped_storage().nbytes()].view(own.dtype)
        arguments[name] = place.as_strided(own.shape, own.stride(), place.storage_offset())
    replace(launch, arguments=arguments)()


class Repetition:
    """A signature: the number of its calls, and, once its line is known, the function that runs the line."""

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
        """Whether the signature still needs calls in full before it is known if they can be repeated."""
        return self._calls < FULL_CALLS

    def run(self, tensors: Sequence[Tensor]) -> Results | None:
        """The results for these tensors; None where the call must run in full."""
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
        """The results of the call, which runs in full; the second and the third call of the signature are recorded."""
        from anyup.kernels.launch import compiles_ahead

        if compiles_ahead() or not self.is_open or not self._lock.acquire(blocking=False):
            return call()
        try:
            self._calls += 1
            if self._calls == 1:  # it compiles kernels, makes tables, and learns which configs the device refuses
                return call()
            return self._recorded(tensors, peak, call)
        finally:
            self._lock.release()

    def _recorded(self, tensors: Sequence[Tensor], peak: int, call: Callable[[], Results]) -> Results:
        from anyup.kernels.launch import listening

        recorder = Recorder(tensors)
        try:
            # In inference mode a dispatch mode would see composite operations, not the ones that they consist of.
            with torch.inference_mode(False), torch.no_grad(), listening(recorder.launched), recorder:
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
    """A call's signature, and the tensors that the call reads beside weights."""

    repetition: Repetition
    tensors: Sequence[Tensor]

    def repeat(self) -> Results | None:
        """The results; None where the call must run in full."""
        return self.repetition.run(self.tensors)

    def record(self, peak: int, call: Callable[[], Results]) -> Results:
        """The results of the call in full, whose peak is so many bytes; later calls may repeat it."""
        return self.repetition.record(self.tensors, peak, call)


class Weights:
    """The dictionaries that hold an upsampler's parameters and buffers: no call walks over its modules."""

    def __init__(self, network: Network) -> None:
        modules = list(network.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._identities = self._identified()
        self._held = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self._hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules[1:]]
        # A module of another package may do something else at each call, and its weights may have no address.
        self._is_known = all(type(module).__module__.partition(".")[0] in _MAKERS for module in modules) and all(
            type(tensor) in (Tensor, nn.Parameter) for tensor in self.tensors
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [tensor for held in self._held for tensor in held.values() if tensor is not None]

    def are_there(self) -> bool:
        """Whether the upsampler still consists of the same modules."""
        return self._identified() == self._identities

    def are_watched(self) -> bool:
        """Whether a module of the upsampler has a hook or a `forward` of its own, or comes from another package."""
        return not self._is_known or any(self._hooks) or any(["forward" in held for held in self._attributes])  # noqa: C419

    def addresses(self) -> list[int]:
        """The address of each parameter and buffer."""
        return [tensor.data_ptr() for held in self._held for tensor in held.values() if tensor is not None]

    def _identified(self) -> list[int]:
        return [id(module) for children in self._children for module in children.values()]


class Calls:
    """The signatures of an upsampler's calls, for the present addresses of its weights."""

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._addresses: list[int] = []
        self._known: OrderedDict[Signature, Repetition] = OrderedDict()
        self._lock = threading.Lock()

    def weights_of(self, network: Network) -> Weights:
        """The upsampler's weights; where one has another address than before, all signatures are forgotten."""
        weights = self._weights
        if weights is None or not weights.are_there() or weights.addresses() != self._addresses:
            with self._lock:
                weights = self._weights = Weights(network)
                self._known.clear()
                self._addresses = weights.addresses()
        return weights

    def find(self, signature: Signature, device: torch.device) -> Repetition:
        """The repetition of a signature; a new one for a new signature."""
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
    """The tensors that a call reads beside weights, by name."""
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
    """A call and its signature; None where every such call must run in full."""
    # Any other argument goes through the checks of the call in full.
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
    """A call of `AnyUp.encode_image`, with checked arguments, and its signature; None where it must run in full."""
    return _seen(network, {"image": image}, ("encode_image", size, tuple(grids)), None)


def _seen(network: Network, named: dict[str, Tensor], settings: Any, made_with: Any) -> Seen | None:
    """As `seen_before`, for these tensors and settings; `made_with` are the weights that made a context, or None."""
    tensors = list(named.values())
    if getattr(network, "_is_replica", False):  # of nn.DataParallel, made for each call
        return None
    if not all(type(each) is Tensor and each.device == tensors[0].device for each in tensors):
        return None
    if len({id(each) for each in tensors}) < len(tensors):  # the record would give both one name
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
    """Whether something observes each operation: a tracer, a mode, a capture, a derivative, a global hook."""
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
    """Whether all active modes are those of `torch.set_default_device` and of `with torch.device`."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
