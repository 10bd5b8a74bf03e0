"""On a card no call waits: nothing is copied between host and device, and no tensor is asked what it holds.

Seen on the meta device, whose tensors hold nothing (to ask one raises), along the path that a card's tensors take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.allocations import operators_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyup import AnyUp
from anyup.kernels.launch import Launch, Target
from anyup.limited_memory import choice, prediction
from anyup.limited_memory.plans import Bands
from anyup.model import OPERATIONS
from benchmarks.modelled_gpu.model_steps import pretended_card

SMALL: dict[str, Any] = {"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3}
Size = tuple[int, int] | None
DTYPES = (torch.float32, torch.bfloat16)
BANDS = {
    "nothing kept": Bands(8, 3),
    "some rows kept": Bands(8, 5, kept=16, kept_for_output=8),
    "one encoder after the other": Bands(8, 3, together=False, kept=16, kept_for_output=8, encoded=8),
}


class Copies(TorchDispatchMode):
    """What is copied between the host and another device, operation by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if len({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            self.found.append(str(func))
        return result


@contextmanager
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The copies of a block, those of numbers that Python holds among them, which no operation does on "meta"."""
    mode = Copies()

    def watched(name: str) -> Callable[..., Tensor]:
        make = getattr(torch, name)

        def made(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = make(*args, **kwargs)
            if result.device.type != "cpu":
                mode.found.append(f"torch.{name}")
            return result

        return made

    with monkeypatch.context() as patch, mode:
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, watched(name))
        yield mode.found


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels take the tensors, and do nothing."""
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    with pretended_card(Target("cuda", 90)), operators_open(monkeypatch):
        yield


def model(dtype: torch.dtype = torch.float32, **arguments: Any) -> AnyUp:
    with torch.device("meta"):
        return AnyUp(**SMALL, **arguments).to(dtype)


def inputs(
    dtype: torch.dtype = torch.float32, size: tuple[int, int] = (24, 20), grid: tuple[int, int] = (6, 5)
) -> tuple[Tensor, Tensor]:
    return torch.empty(2, 3, *size, dtype=dtype, device="meta"), torch.empty(2, 13, *grid, dtype=dtype, device="meta")


def train(upsampler: AnyUp, image: Tensor, features: Tensor, size: Size = None) -> None:
    """The gradients of everything that has one."""
    image, features = image.requires_grad_(), features.requires_grad_()
    out = upsampler(image, features, size)
    leaves = [image, features, *upsampler.parameters()]
    torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)


def from_context(upsampler: AnyUp, image: Tensor, features: Tensor, size: Size = None) -> None:
    """A call by way of a context."""
    upsampler(upsampler.encode_image(image, size), features)


def piecewise(upsampler: AnyUp, image: Tensor, features: Tensor, size: Size = None) -> None:
    """A stream, piece by piece."""
    for _ in upsampler.stream(image, features, size, tile=(7, 9)):
        pass


WAYS: dict[str, Callable[..., None]] = {"call": AnyUp.__call__, "context": from_context, "stream": piecewise}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_inference_copies_nothing_from_the_host(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    upsampler, tensors = model(dtype), inputs(dtype)
    with torch.inference_mode(), copies(monkeypatch) as found:
        chosen = upsampler.explain(*tensors).chosen
        assert {chosen[operation] for operation in OPERATIONS} == {"triton"}
        WAYS[way](upsampler, *tensors)
    assert found == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [None, (35, 41)], ids=["", "larger than the image"])
@pytest.mark.parametrize("bands", BANDS)
def test_bands_copy_nothing_from_the_host(bands: str, size: Size, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda task, limit, **_: prediction.banded(task, BANDS[bands], limit))
    upsampler, tensors = model(), inputs()
    with torch.inference_mode(), copies(monkeypatch) as found:
        WAYS[way](upsampler, *tensors, size)
    assert found == []


@pytest.mark.parametrize(
    ("size", "grid", "output"),
    [((24, 20), (6, 5), (35, 41)), ((9, 7), (12, 9), (9, 7)), ((600, 600), (6, 5), (24, 20))],
    ids=["", "a grid finer than the image", "several tiles of pixels"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_copies_nothing_from_the_host(
    dtype: torch.dtype,
    size: tuple[int, int],
    grid: tuple[int, int],
    output: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upsampler, tensors = model(dtype), inputs(dtype, size, grid)
    assert upsampler.explain(*tensors, output).chosen["window_attention"] == "triton"
    with copies(monkeypatch) as found:
        train(upsampler, *tensors, output)
    assert found == []


def test_what_runs_without_kernels_copies_its_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    upsampler, tensors = model(backend="torch"), inputs(size=(37, 29), grid=(8, 7))
    with copies(monkeypatch) as found:
        train(upsampler, *tensors)
        assert found, "the tables were there before, or copies are not seen"
        found.clear()
        train(upsampler, *tensors)
        with torch.inference_mode():
            upsampler(*tensors)
    assert found == []


@pytest.mark.parametrize(
    "copy",
    [
        lambda on_card: torch.tensor([1.0, 2.0], device="meta"),
        lambda on_card: on_card.copy_(torch.zeros(3)),
        lambda on_card: torch.zeros(3).to("meta", non_blocking=True),
        lambda on_card: on_card[torch.tensor([0, 1])],
    ],
    ids=["numbers", "copy_", "to", "index"],
)
def test_a_copy_from_the_host_is_seen(copy: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_card = torch.empty(3, device="meta")
    with copies(monkeypatch) as found:
        copy(on_card)
    assert len(found) == 1


@pytest.mark.parametrize(
    "question", [Tensor.item, bool, Tensor.nonzero, Tensor.tolist, lambda t: t[t > 0], lambda t: t.cpu()]
)
def test_to_ask_a_tensor_raises(question: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        question(torch.empty(1, device="meta"))
