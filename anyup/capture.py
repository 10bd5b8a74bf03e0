"""A call as a CUDA graph, which the host starts with one launch however many kernels the call has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from anyup.argument_checks import OutputSize
from anyup.budget import limit_on
from anyup.image_context import ImageContext, weights_of
from anyup.limited_memory import choice
from anyup.limited_memory.request import Request
from anyup.progress import human_bytes
from anyup.repetition import Weights, read_by
from anyup.untraced import untraced

if TYPE_CHECKING:
    from anyup.network import Network

DEVICES = ("cuda",)
"""The device types that have graphs."""

_WARMING = 3

Out = TypeVar("Out")


@dataclass(frozen=True)
class Graph(Generic[Out]):
    """A call as a CUDA graph that is replayed.

    Attributes:
        out: the result, a tensor or several, which each replay overwrites; it lies in the graph's memory.
        held_bytes: the memory that the graph keeps allocated as long as it lives.
    """

    graph: torch.cuda.CUDAGraph
    out: Out
    held_bytes: int

    def __call__(self) -> Out:
        self.graph.replay()
        return self.out


def graph_of(call: Callable[[], Out], device: torch.device, pool: Any = None) -> Graph[Out]:
    """Capture a call; raises NotImplementedError where the call has an operation that no graph can hold.

    Graphs with the same `pool`, of `torch.cuda.graph_pool_handle`, share their memory: what one has returned is used
    up before the next one is replayed.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a capture can neither compile kernels nor look up free memory
            for _ in range(_WARMING):
                call()
        torch.cuda.current_stream().wait_stream(side)
        # A capture allocates from a pool of its own, which stays reserved: reserved bytes grow by the graph's memory.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        try:
            # Without `stream=` torch would capture on a stream of the device on which it captured first. Another thread
            # may pin memory meanwhile, which "global" takes for a mistake of this one.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                out = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotImplementedError(f"the call cannot be captured: {str(error).splitlines()[0]}") from error
        return Graph(graph, out, torch.cuda.memory_reserved() - before)


class CapturedCall:
    """What `AnyUp.capture` returns: a call for tensors of the captured shapes and dtypes, which replays a CUDA graph.

    Attributes:
        output_size: (H, W).
        nbytes: the GPU memory that it keeps: copies of the inputs, all maps in between, and the result.
    """

    def __init__(
        self,
        upsampler: Network,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: tuple[int, int],
        values: Tensor | None,
    ) -> None:
        self.output_size = output_size
        self._upsampler, self._device = upsampler, features.device
        self._reads_context = isinstance(image, ImageContext)
        with torch.inference_mode(False):  # outside inference mode a tensor made in it cannot be overwritten
            self._inputs = {name: tensor.clone() for name, tensor in read_by(image, features, values).items()}
        self._window = upsampler.window
        self._weights = Weights(upsampler)
        self._addresses = self._weights.addresses()
        own = self._inputs
        if isinstance(image, ImageContext):
            grid = (features.shape[2], features.shape[3])
            keys = {grid: own["image keys"]} if "image keys" in own else {}
            image = ImageContext(own.get("image", image.image), own["queries"], keys, image.weights)
        else:
            image = own["image"]
        call = partial(upsampler.upsample_whole, image, own["features"], output_size, values=own.get("values"))
        with torch.inference_mode(False), torch.no_grad():
            self._graph = graph_of(call, self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that stay allocated as long as this object lives."""
        return self._graph.held_bytes + sum(each.numel() * each.element_size() for each in self._inputs.values())

    @torch.no_grad()
    def __call__(self, image: Tensor | ImageContext, features: Tensor, values: Tensor | None = None) -> Tensor:
        """The call for other tensors of the captured shapes and dtypes.

        Returns:
            (B, C or Cv, H, W), the same tensor each time: the next call overwrites it, so `clone()` it to keep it.

        Raises:
            ValueError, TypeError: which argument is not like the one that was captured.
            RuntimeError: a weight has another address (after `to`, or a new parameter) or the window has changed since
                the capture: capture the call again. New values in the weights (a training step, `load_state_dict`)
                need no new capture.
        """
        upsampler, weights = self._upsampler, self._weights
        if not weights.are_there() or weights.addresses() != self._addresses:
            raise RuntimeError("the upsampler's weights have been replaced since the capture; capture the call again")
        if upsampler.window != self._window:
            raise RuntimeError(f"the upsampler's window was {self._window} at the capture; capture the call again")
        if not isinstance(image, ImageContext if self._reads_context else Tensor):
            expected = "a context of encode_image" if self._reads_context else "an image"
            raise TypeError(f"image: the call was captured with {expected}, got {type(image).__name__}")
        if isinstance(image, ImageContext) and image.weights != weights_of(upsampler.parameters()):
            raise ValueError("image: the context was made by another upsampler, or before its weights changed")
        given = read_by(image, features, values)
        if given.keys() != self._inputs.keys():
            raise ValueError(
                f"the call was captured with {', '.join(self._inputs)}, got {', '.join(given)}; capture another one"
            )
        for name, own in self._inputs.items():
            _check_like(name, given[name], own)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for name, own in self._inputs.items():
                own.copy_(given[name])
            return self._graph()

    def __repr__(self) -> str:
        read = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._inputs.items())
        return f"CapturedCall({read} to {self.output_size}, {human_bytes(self.nbytes)} on {self._device})"


@untraced
def capture(
    upsampler: Network,
    image: Tensor | ImageContext,
    features: Tensor,
    output_size: OutputSize,
    values: Tensor | None,
) -> CapturedCall:
    """Check the arguments of `AnyUp.capture`, and capture the call."""
    request = Request.of(upsampler, image, features, output_size, values=values)
    device = request.device
    if device.type not in DEVICES:
        raise RuntimeError(f"capture: a CUDA graph needs a GPU, and the upsampler is on {device}")
    if request.wants_gradient:
        raise RuntimeError("capture does not differentiate: call it under torch.no_grad() or torch.inference_mode()")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("capture: a graph is being captured already; a plain call can be part of it")
    plan = choice.choose(request.task(), limit_on(device, None))
    if plan.order != "whole":
        raise ValueError(f"capture: a graph holds whole maps, which do not fit; the plan of a call is\n{plan}")
    return CapturedCall(upsampler, image, features, request.size, values)


def _check_like(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != own.shape or given.device != own.device:
        raise ValueError(
            f"{name}: the call was captured with {tuple(own.shape)} on {own.device}, "
            f"got {tuple(given.shape)} on {given.device}"
        )
    if given.dtype != own.dtype:
        raise TypeError(f"{name}: the call was captured in {own.dtype}, got {given.dtype}")
