"""Calls for one frame after the other, which reuse memory, or a CUDA graph, of the frame before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from anyup.argument_checks import OutputSize
from anyup.capture import CapturedCall, capture
from anyup.image_context import ImageContext
from anyup.network import Network
from anyup.ops.memory import Pages
from anyup.repetition import Repetition, seen_before


def upsampled_frames(
    upsampler: Network,
    frames: Iterable[Any],
    output_size: OutputSize,
    max_memory: float | str | None,
    *,
    repeats: bool,
) -> Iterator[Tensor]:
    """See `AnyUp.frames`. `repeats`: a call may be repeated from its record, which nothing of a subclass is in."""
    if isinstance(frames, Tensor) or not isinstance(frames, Iterable):
        raise TypeError(f"frames: expected an iterable of (image, features), got {type(frames).__name__}")
    call = _Call(upsampler, output_size, max_memory, repeats and max_memory is None)
    return (call(*_arguments(frame)) for frame in frames)


def _arguments(frame: Any) -> Sequence[Any]:
    expected = "frames: expected (image, features) or (image, features, values) of each"
    if not isinstance(frame, (tuple, list)):
        raise TypeError(f"{expected}, got {type(frame).__name__}")
    if len(frame) not in (2, 3):
        raise ValueError(f"{expected}, got a {type(frame).__name__} of {len(frame)}")
    return frame


class _Call:
    """The call for each frame, with the memory and the graph that frames share."""

    def __init__(
        self, upsampler: Network, output_size: OutputSize, max_memory: float | str | None, repeats: bool
    ) -> None:
        self._upsampler, self._output_size, self._max_memory = upsampler, output_size, max_memory
        self._repeats = repeats
        self._pages = Pages()
        self._repetition: Repetition | None = None  # the signature of the frame before
        self._captured: CapturedCall | None = None
        self._tried = False

    def __call__(self, image: Tensor | ImageContext, features: Tensor, values: Tensor | None = None) -> Tensor:
        captured = self._capture(image, features, values)
        if captured is not None:
            with suppress(torch.OutOfMemoryError):
                return captured(image, features, values).clone()
            captured = self._captured = None  # the graph's maps leave no room for results
        with self._pages.reuse():
            upsampled: Tensor = self._upsampler(
                image, features, self._output_size, values=values, max_memory=self._max_memory
            )
            return upsampled

    def _capture(self, image: Tensor | ImageContext, features: Tensor, values: Tensor | None) -> CapturedCall | None:
        """The captured call that serves this frame; None where the frame needs a call in full."""
        seen = None
        if self._repeats:
            seen = seen_before(self._upsampler, image, features, self._output_size, None, values)
        repetition = None if seen is None else seen.repetition
        if repetition is None or repetition is not self._repetition:
            self._repetition, self._captured, self._tried = repetition, None, False
        elif not self._tried:
            self._tried = True
            # Whole maps do not fit, or an operation cannot be captured. A wrong argument raises again in the call.
            with suppress(ValueError, NotImplementedError, torch.OutOfMemoryError):
                self._captured = capture(self._upsampler, image, features, self._output_size, values)
        return self._captured
