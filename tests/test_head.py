"""A linear head before the upsampling equals the head after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import fill, wave
from torch import Tensor, nn

from anyup import AnyUp, with_head

IMAGE, FEATURES = wave((2, 3, 24, 20), 3, 0.8), wave((2, 12, 6, 5), 7)


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


def after(model: AnyUp, head: nn.Module, image: Tensor, features: Tensor, **settings: Any) -> Tensor:
    out = model(image, features, **settings)
    if isinstance(head, nn.Linear):
        return head(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return head(out)


HEADS = [
    nn.Conv2d(12, 5, 1),
    nn.Conv2d(12, 5, 1, bias=False),
    nn.Conv2d(12, 6, 1, groups=3),
    nn.Conv2d(12, 40, 1, padding="same"),
    nn.Linear(12, 5),
    nn.Linear(12, 1, bias=False),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_head_before_equals_the_head_after(head: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, head = upsampler().to(dtype), type(head)(**_arguments(head)).to(dtype)
    image, features = IMAGE.to(dtype), FEATURES.to(dtype)
    with torch.no_grad():
        actual = with_head(model, head)(image, features)
        expected = after(model, head, image, features)
        exact = after(upsampler(backend="reference").double(), head.double(), image.double(), features.double())
    assert actual.shape == (2, expected.shape[1], 24, 20)
    assert_close_enough(actual, expected, exact)


def _arguments(head: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    if isinstance(head, nn.Linear):
        return {"in_features": head.in_features, "out_features": head.out_features, "bias": head.bias is not None}
    return {
        "in_channels": head.in_channels,
        "out_channels": head.out_channels,
        "kernel_size": 1,
        "groups": head.groups,
        "padding": head.padding,
        "bias": head.bias is not None,
    }


@pytest.mark.parametrize("head", [nn.Conv2d(12, 5, 1), nn.Linear(12, 5)], ids=["convolution", "linear"])
def test_gradients_before_equal_the_gradients_after(head: nn.Conv2d | nn.Linear) -> None:
    model, head = upsampler().double(), type(head)(**_arguments(head)).double()
    gradients = []
    for run in (with_head(model, head), lambda *inputs: after(model, head, *inputs)):
        image, features = (t.double().requires_grad_() for t in (IMAGE, FEATURES))
        out = run(image, features)
        tensors = [image, features, *head.parameters(), model.rope.freqs]
        gradients.append(torch.autograd.grad((out * wave(tuple(out.shape), 9).double()).sum(), tensors))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_other_arguments_pass_through() -> None:
    model, head = upsampler(), nn.Conv2d(12, 5, 1)
    with torch.no_grad():
        out = with_head(model, head)(IMAGE, FEATURES, (11, 13), q_chunk_size=7)
        torch.testing.assert_close(out, after(model, head, IMAGE, FEATURES, output_size=(11, 13)), rtol=1e-4, atol=1e-4)


def test_a_module_with_head_holds_both_s_parameters() -> None:
    model, head = upsampler(), nn.Conv2d(12, 5, 1)
    module = with_head(model, head)
    assert {id(p) for p in module.parameters()} == {id(p) for m in (model, head) for p in m.parameters()}


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(12, 5, 3, padding=1),
        nn.Conv2d(12, 5, (1, 3)),
        nn.Conv2d(12, 5, 1, stride=2),
        nn.Conv2d(12, 5, 1, padding=1),
    ],
    ids=["3x3", "1x3", "stride", "padding"],
)
def test_a_convolution_that_sees_more_than_its_pixel_is_refused(head: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="head: expected a 1x1 convolution"):
        with_head(upsampler(), head)


@pytest.mark.parametrize("head", [nn.Sequential(nn.Conv2d(12, 5, 1)), nn.ReLU(), nn.ConvTranspose2d(12, 5, 1), None])
def test_a_head_of_another_kind_is_refused(head: Any) -> None:
    with pytest.raises(TypeError, match=f"head: .*{type(head).__name__}"):
        with_head(upsampler(), head)


def test_a_head_of_complex_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="head: expected floating-point weights .*, got torch.complex64"):
        with_head(upsampler(), nn.Linear(12, 5, dtype=torch.complex64))


@pytest.mark.parametrize("head", [nn.Conv2d(12, 5, 1), nn.Linear(12, 5)], ids=["convolution", "linear"])
@pytest.mark.parametrize(
    ("features", "error"),
    [
        (FEATURES[0], ValueError),
        (FEATURES[:, :7], ValueError),
        (FEATURES[:1], ValueError),
        (FEATURES.int(), TypeError),
        (FEATURES[:, :, :0], ValueError),
        ([1.0], TypeError),
    ],
    ids=["three dimensions", "channels", "batch", "integers", "empty", "list"],
)
def test_features_that_do_not_fit_are_named_before_the_head_runs(
    features: Any, error: type[Exception], head: nn.Conv2d | nn.Linear
) -> None:
    with pytest.raises(error, match="features: "):
        with_head(upsampler(), head)(IMAGE, features)
