"""Convolutions: their numbers, how exact they are, and that no library's own runs where it would take TF32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_close_enough
from support.allocations import operators_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyup import AnyUp
from anyup.layers import BorderConv2d
from anyup.ops import convolution
from anyup.ops.convolution import Convolution, convolve
from anyup.ops.ieee import ieee, in_ieee
from anyup.ops.winograd import WinogradConvolution

# Of products of float32 (a cosine of lengths): three standard deviations of what 128 terms in a chain leave.
CLOSE = 4e-7


@pytest.fixture(params=["products", "library"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Convolutions go this way, whatever the CPU is faster at."""
    monkeypatch.setattr(convolution, "goes_through_convolution", lambda weight: request.param == "library")
    return request.param


def tensors(batch: int, size: tuple[int, int], channels: tuple[int, int], kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels with their border, a weight, and the exact result in float64."""
    generator = torch.Generator().manual_seed(0)
    (height, width), (inputs, outputs) = size, channels
    padded = torch.randn(batch, height + kernel - 1, width + kernel - 1, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    exact = F.conv2d(padded.double().permute(0, 3, 1, 2), weight.double()).permute(0, 2, 3, 1)
    return padded, weight, exact


@pytest.mark.parametrize("channels", [(3, 16), (40, 8), (256, 32)], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolution_is_the_cross_correlation(batch: int, kernel: int, channels: tuple[int, int], way: str) -> None:
    padded, weight, exact = tensors(batch, (4, 7), channels, kernel)
    result = Convolution(weight.double())(padded.double())
    assert result.shape == exact.shape
    torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_the_gradients_are_those_of_finite_differences(kernel: int, way: str) -> None:
    padded, weight, _ = tensors(2, (3, 4), (5, 3), kernel)
    inputs = (padded.double().requires_grad_(), weight.double().requires_grad_())
    assert torch.autograd.gradcheck(convolve, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(partial(convolve, inputs[0].detach()), inputs[1:], fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: convolve(x, inputs[1].detach()), inputs[:1], fast_mode=True)


def test_the_gradients_of_many_pixels_are_no_less_exact_than_autograd_s(way: str) -> None:
    padded, weight, exact = tensors(2, (20, 30), (40, 32), 3)
    outer = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (padded, weight)]
        return torch.autograd.grad(function(*leaves), leaves, outer.to(dtype))

    by_autograd = gradients(lambda x, w: Convolution(w)(x), torch.float32)
    expected = gradients(convolve, torch.float64)
    for ours, theirs, true in zip(gradients(convolve, torch.float32), by_autograd, expected, strict=True):
        assert_close_enough(ours, theirs, true)


def test_a_convolution_of_nothing_is_nothing(way: str) -> None:
    padded, weight, _ = tensors(0, (4, 7), (8, 16), 3)
    assert Convolution(weight)(padded).shape == (0, 4, 7, 16)


def test_a_thousand_terms_and_more_are_as_exact_as_a_hundred(way: str) -> None:
    padded, weight, exact = tensors(1, (16, 16), (128, 64), 3)
    error = (Convolution(weight)(padded).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < CLOSE
    # Some library may be as exact in a single chain; where one is not, it is told apart.
    assert rounded_in_one_chain(padded, weight, exact) > CLOSE


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (2, 9)], ids=str)
def test_winograd_s_convolution_is_the_cross_correlation(size: tuple[int, int]) -> None:
    padded, weight, exact = tensors(1, size, (5, 3), 3)
    result = WinogradConvolution(weight.double())(padded[0].double())
    torch.testing.assert_close(result, exact[0], rtol=1e-12, atol=1e-12)


def test_winograd_s_convolution_is_as_exact_as_products() -> None:
    padded, weight, exact = tensors(1, (16, 16), (128, 64), 3)
    error = (WinogradConvolution(weight)(padded[0]).double() - exact[0]).square().mean().sqrt()
    assert error < CLOSE * exact.square().mean().sqrt()


def rounded_in_one_chain(padded: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """The error of the sum of all terms one after the other, in float32."""
    total = torch.zeros(exact.shape)
    height, width = exact.shape[1:3]
    for row in range(3):
        for column in range(3):
            near = padded[:, row : row + height, column : column + width]
            for channel in range(weight.shape[1]):
                total = torch.addcmul(total, near[..., channel, None], weight[:, channel, row, column])
    return (total.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_convolution_s_gradients_are_those_of_its_definition(kernel: int, way: str) -> None:
    padded, weight, _ = (t.double() for t in tensors(2, (3, 4), (5, 3), kernel))

    def run(padded: Tensor, weight: Tensor) -> Tensor:
        return Convolution(weight)(padded)

    assert torch.autograd.gradcheck(run, (padded.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [(7, 6), (1, 6), (2, 2)], ids=str)
def test_a_part_of_a_bordered_convolution_is_that_part(size: tuple[int, int], kernel: int) -> None:
    conv = BorderConv2d(3, 8, kernel).double()
    x = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = conv(x)
        for rows, columns in ((slice(0, 1), slice(0, size[1])), (slice(0, whole.shape[1]), slice(1, whole.shape[2]))):
            part = conv.part(x, rows, columns, torch.float64, held=(0, size[0]))
            torch.testing.assert_close(part, whole[:, rows, columns], rtol=1e-12, atol=1e-12)


class Convolutions(TorchDispatchMode):
    """Counts the library's convolutions, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_off_the_cpu_no_library_s_convolution_runs(kernel_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta stands for a GPU, whose convolutions of float32 take TF32 unless told not to."""
    with torch.device("meta"):
        model = AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size=kernel_size, backend="torch")
        image, features = torch.empty(1, 3, 24, 20), torch.empty(1, 9, 6, 5)
    with operators_open(monkeypatch), Convolutions() as seen:
        F.conv2d(image, torch.empty(4, 3, 1, 1, device="meta"))
        assert seen.count == 1
        with torch.no_grad():
            model.upsample_whole(image, features, (24, 20))
    assert seen.count == 1


# The references.


SETTINGS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


@pytest.fixture
def cheap_products() -> Iterator[list[str]]:
    """Torch's settings ask for TF32 wherever there is one."""
    before = precisions()
    for setting in SETTINGS:
        setting.fp32_precision = "tf32"
    try:
        yield precisions()
    finally:
        for setting, precision in zip(SETTINGS, before, strict=True):
            setting.fp32_precision = precision


def test_the_references_multiply_without_shortcuts_and_put_the_settings_back(
    cheap_products: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noting(really: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(precisions())
            return really(*args, **kwargs)

        return noted

    monkeypatch.setattr(F, "conv2d", noting(F.conv2d))
    monkeypatch.setattr(torch, "softmax", noting(torch.softmax))
    model = AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, backend="reference")
    model(torch.zeros(1, 3, 8, 9), torch.ones(1, 4, 3, 3)).sum().backward()
    assert len(seen) > 10 and all(all(p == "ieee" for p in each) for each in seen)
    assert precisions() == cheap_products


def test_a_reference_that_fails_puts_the_settings_back(cheap_products: list[str]) -> None:
    @in_ieee
    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert precisions() == cheap_products


def test_references_of_two_threads_may_overlap(cheap_products: list[str]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with ieee():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with ieee():
        leave.set()
        thread.join(30)
        assert precisions() == ["ieee"] * 4  # the first has left, the second has not
    assert precisions() == cheap_products
