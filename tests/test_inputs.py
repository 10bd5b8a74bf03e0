"""A caller's mistakes, each met before any work and named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyup import AnyUp, argument_checks, with_head
from anyup.ops import window_attention
from anyup.ops.dispatch import Operation
from anyup.window import RatioWindow

IMAGE = torch.zeros(2, 3, 16, 12)
FEATURES = torch.ones(2, 5, 4, 3)


@pytest.fixture(scope="module")
def model() -> AnyUp:
    return AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3)


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about an image comes once per process: each test starts without it."""
    monkeypatch.setattr(argument_checks, "_warned_unnormalised", False)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any operation that starts is an error of its own."""

    def run(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("worked before checking")

    monkeypatch.setattr(Operation, "run", run)


BAD_CALLS = [
    ({"image": IMAGE[0]}, ValueError, r"image: expected \(B, 3, height, width\), got shape \(3, 16, 12\)"),
    ({"image": IMAGE[:, :1]}, ValueError, r"image: expected 3 channels.*\(2, 1, 16, 12\)"),
    ({"image": torch.zeros(2, 4, 16, 12)}, ValueError, r"image: expected 3 channels.*\(2, 4, 16, 12\)"),
    ({"image": torch.zeros(2, 3, 0, 12)}, ValueError, r"image: expected at least one.*\(2, 3, 0, 12\)"),
    ({"image": torch.zeros(2, 3, 16, 12, dtype=torch.uint8)}, TypeError, r"image: .*floating-point.*uint8.*normalise"),
    ({"image": torch.zeros(2, 3, 16, 12, dtype=torch.complex64)}, TypeError, r"image: .*floating-point.*complex64"),
    ({"image": IMAGE.numpy()}, TypeError, r"image: expected a tensor, got ndarray"),
    ({"image": None}, TypeError, r"image: expected a tensor, got NoneType"),
    ({"image": IMAGE.to("meta")}, ValueError, r"image: .*cpu.*meta"),
    ({"features": FEATURES[0]}, ValueError, r"features: expected \(B, C, height, width\), got shape \(5, 4, 3\)"),
    ({"features": FEATURES.flatten(2)}, ValueError, r"features: .*\(2, 5, 12\)"),
    ({"features": FEATURES[:1]}, ValueError, r"features: expected the image's batch of 2, got 1"),
    ({"features": FEATURES[:, :0]}, ValueError, r"features: expected at least one.*\(2, 0, 4, 3\)"),
    ({"features": FEATURES[:, :, :0]}, ValueError, r"features: expected at least one.*\(2, 5, 0, 3\)"),
    ({"features": FEATURES.int()}, TypeError, r"features: .*floating-point.*int32"),
    ({"features": FEATURES.bool()}, TypeError, r"features: .*floating-point.*bool"),
    ({"features": FEATURES.to(torch.float8_e4m3fn)}, TypeError, r"features: .*float8_e4m3fn"),
    ({"features": [1.0]}, TypeError, r"features: expected a tensor, got list"),
    ({"features": FEATURES.to("meta")}, ValueError, r"features: .*cpu.*meta"),
    ({"values": FEATURES[:, :, :3]}, ValueError, r"values: expected the features' grid \(4, 3\), got \(3, 3\)"),
    ({"values": FEATURES[:1]}, ValueError, r"values: .*batch of 2, got 1"),
    ({"values": FEATURES.long()}, TypeError, r"values: .*floating-point.*int64"),
    ({"values": FEATURES[0]}, ValueError, r"values: .*\(5, 4, 3\)"),
    ({"values": "logits"}, TypeError, r"values: expected a tensor, got str"),
    ({"output_size": 0}, ValueError, r"output_size: expected positive integers, got 0"),
    ({"output_size": (16,)}, ValueError, r"output_size: .*\(16,\)"),
    ({"output_size": (16, 12, 3)}, ValueError, r"output_size: .*\(16, 12, 3\)"),
    ({"output_size": (0, 12)}, ValueError, r"output_size: .*0"),
    ({"output_size": (16, -1)}, ValueError, r"output_size: .*-1"),
    ({"output_size": (16.0, 12)}, TypeError, r"output_size: .*16.0"),
    ({"output_size": (True, 12)}, TypeError, r"output_size: .*True"),
    ({"output_size": "16"}, (TypeError, ValueError), r"output_size: .*'1"),
    ({"output_size": np.array([16, 12, 3])}, ValueError, r"output_size: .*16, 12, 3"),
    ({"q_chunk_size": 0}, ValueError, r"q_chunk_size: .*0"),
    ({"q_chunk_size": -5}, ValueError, r"q_chunk_size: .*-5"),
    ({"q_chunk_size": 2.5}, TypeError, r"q_chunk_size: .*2.5"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS)
def test_a_mistake_is_named_before_any_work(
    model: AnyUp, changed: dict[str, Any], error: Any, message: str, no_work: None
) -> None:
    with pytest.raises(error, match=message):
        model(**{"image": IMAGE, "features": FEATURES, **changed})


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "floating-point.* 16, 32 or 64 bits, got torch.float8_e4m3fn"),
    "complex": (lambda t: t.to(torch.complex64), "floating-point.* got torch.complex64"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "floating-point.* got torch.quint8"),
    "sparse": (lambda t: t.to_sparse(), "expected a dense tensor, got one of torch.sparse_coo"),
    "of oneDNN": (lambda t: t.to_mkldnn(), "expected a dense tensor, got one of torch._mkldnn"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "expected a dense tensor, got a nested one"),
    "jagged": (
        lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        "expected a dense tensor, got a nested one",
    ),
    "meta": (lambda t: t.to("meta"), "meta"),
}

ENTRIES: dict[str, Callable[[AnyUp, dict[str, Any]], object]] = {
    "call": lambda model, arguments: model(**arguments),
    "stream": lambda model, arguments: model.stream(**arguments),
    "frames": lambda model, arguments: next(model.frames([(arguments["image"], arguments["features"])])),
    "explain": lambda model, arguments: model.explain(**arguments),
    "encode_image": lambda model, arguments: model.encode_image(arguments["image"]),
    "with_head": lambda model, arguments: with_head(model, nn.Conv2d(5, 2, 1))(**arguments),
    "window_attention": lambda model, arguments: window_attention(**arguments, window=RatioWindow(0.1)),
}

_CALL = {"image": IMAGE, "features": FEATURES}
_ATTENTION = {"query": torch.ones(2, 4, 4, 2, 8), "key": torch.ones(2, 3, 3, 2, 8), "value": torch.ones(2, 3, 3, 5)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        *(("call", argument) for argument in ("image", "features", "values", "out")),
        *(("stream", argument) for argument in ("image", "features", "values", "out")),
        *(("explain", argument) for argument in ("image", "features", "values")),
        ("encode_image", "image"),
        *(("with_head", argument) for argument in ("image", "features", "out")),
        *(("window_attention", argument) for argument in _ATTENTION),
    ],
)
def test_a_tensor_of_another_kind_is_named_in_one_line(
    entry: str, argument: str, kind: str, model: AnyUp, no_work: None
) -> None:
    arguments = _ATTENTION if entry == "window_attention" else _CALL
    plain = arguments.get(argument, torch.zeros(2, 5, 16, 12) if argument == "out" else FEATURES)
    if (entry, argument) == ("with_head", "out"):
        plain = torch.zeros(2, 2, 16, 12)
    change, message = KINDS[kind]
    with torch.no_grad(), pytest.raises((TypeError, ValueError)) as caught:
        ENTRIES[entry](model, {**arguments, argument: change(plain)})
    named = "key" if (entry, argument, kind) == ("window_attention", "query", "meta") else argument
    assert re.match(f"{named}: .*{message}", str(caught.value)) and "\n" not in str(caught.value)


def test_a_model_on_meta_takes_tensors_on_meta_and_no_others(model: AnyUp) -> None:
    meta = AnyUp(qk_dim=16, num_heads=2, lfu_dim=8).to("meta")
    assert meta(IMAGE.to("meta"), FEATURES.to("meta")).is_meta
    assert meta.encode_image(IMAGE.to("meta")).queries.is_meta
    with pytest.raises(ValueError, match="features: expected a tensor on meta like the model, got one on cpu"):
        meta(IMAGE.to("meta"), FEATURES)


def test_every_checked_call_is_a_mistake_away_from_a_good_one(model: AnyUp) -> None:
    assert model(IMAGE, FEATURES).shape == (2, 5, 16, 12)
    assert model(IMAGE, FEATURES, (4, 5), False, 7, values=FEATURES[:, :2]).shape == (2, 2, 4, 5)


def test_an_image_of_other_channels_is_measured_by_the_model_s() -> None:
    model = AnyUp(input_dim=4, qk_dim=16, num_heads=2)
    assert model(torch.zeros(1, 4, 8, 8), FEATURES[:1]).shape == (1, 5, 8, 8)
    with pytest.raises(ValueError, match="image: expected 4 channels"):
        model(IMAGE, FEATURES)


@pytest.mark.parametrize("image", [IMAGE + 128, IMAGE - 25, IMAGE.half() + 255])
def test_an_unnormalised_image_warns_once_and_is_worked_on(model: AnyUp, image: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"image: values reach .* ImageNet") as caught:
        outs = [model(image, FEATURES) for _ in range(3)]
    assert all(out.shape == (2, 5, 16, 12) for out in outs)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(IMAGE + 128, FEATURES),
        lambda model: model.encode_image(IMAGE + 128),
        lambda model: model.stream(IMAGE + 128, FEATURES),
        lambda model: model.stream(IMAGE, FEATURES * 1e9, dtype=torch.float16),
        lambda model: model(IMAGE, FEATURES * 1e9, out=torch.empty(2, 5, 16, 12, dtype=torch.float16)),
        lambda _: AnyUp(qk_dim=16, num_heads=2, misspelt=1),
    ],
)
def test_a_warning_shows_the_line_of_the_caller(model: AnyUp, call: Callable[[AnyUp], object]) -> None:
    with torch.no_grad(), pytest.warns(UserWarning, match="image|float16|misspelt") as caught:
        call(model)
    assert [warning.filename for warning in caught] == [__file__]


def levels(high: int = 255) -> Tensor:
    """A photograph of bytes, divided by 255."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, high + 1, IMAGE.shape, generator=generator) / 255


@pytest.mark.parametrize("image", [levels(), levels(90), levels() * 255 * (1 / 255), levels().double()])
def test_a_photograph_that_was_only_divided_by_255_warns(model: AnyUp, image: Tensor) -> None:
    with torch.no_grad(), pytest.warns(UserWarning, match="image: values are levels of 0 to 255 divided by 255, and"):
        model(image, FEATURES)


@pytest.mark.parametrize(
    "image",
    [
        (levels(20) + 0.55 - 0.485) / 0.229,  # fog: normalised, and in [0, 1]
        torch.rand(IMAGE.shape),
        levels().round(),  # 0 and 1
        levels() - 0.5,
        levels().half(),
        IMAGE + 1 / 255,
    ],
)
def test_an_image_that_may_be_normalised_does_not_warn(model: AnyUp, image: Tensor) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(image, FEATURES)


def test_a_normalised_image_does_not_warn(model: AnyUp) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(torch.linspace(-2.2, 2.7, IMAGE.numel()).view_as(IMAGE), FEATURES)
        model(IMAGE[:0], FEATURES[:0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_nan_in_the_image_is_neither_refused_nor_hidden(model: AnyUp, backend: str) -> None:
    image = IMAGE.clone()
    image[0, 0, 0, 0] = torch.nan
    model = AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, backend=backend)
    with torch.no_grad():
        out = model(image, FEATURES)
    assert out[0].isnan().all() and out[1].isfinite().all()  # it spreads by the normalisations of its own image


def test_nobody_can_names_every_backend_s_reason(model: AnyUp) -> None:
    model = AnyUp(qk_dim=16, num_heads=2, backend={"window_attention": ("triton", "flex")})
    explanation = model.explain(IMAGE, FEATURES).explanations[-1]
    if explanation.chosen is not None:
        pytest.skip("this machine runs one of them")
    with pytest.raises(NotImplementedError) as error:
        model(IMAGE, FEATURES)
    for candidate in explanation.candidates:
        assert candidate.reasons
        assert all(f"not {candidate.name}: {reason}" in str(error.value) for reason in candidate.reasons)


def test_nobody_can_is_found_out_before_any_work(no_work: None) -> None:
    model = AnyUp(qk_dim=16, num_heads=2, backend={"window_attention": ("triton", "flex")})
    if model.explain(IMAGE, FEATURES).chosen["window_attention"] is not None:
        pytest.skip("this machine runs one of them")
    with pytest.raises(NotImplementedError, match="window_attention"):
        model(IMAGE, FEATURES)


@pytest.mark.parametrize("argument", ["image", "features", "values"])
def test_a_forward_mode_derivative_is_refused_and_not_zero(argument: str, model: AnyUp, no_work: None) -> None:
    given = {"image": IMAGE, "features": FEATURES, "values": FEATURES}

    def call(tensor: Tensor) -> Tensor:
        return model(**{**given, argument: tensor})

    tensor = given[argument]
    with pytest.raises(NotImplementedError, match=f"{argument}: forward-mode derivatives are not implemented"):
        torch.func.jvp(call, (tensor,), (torch.ones_like(tensor),))


def test_sizes_may_be_integers_of_another_library_s(model: AnyUp) -> None:
    size = (np.int64(5), torch.tensor(4))
    with torch.no_grad():
        assert model(IMAGE, FEATURES, size).shape == (2, 5, 5, 4)  # type: ignore[arg-type]
        region = [np.int32(1), np.int32(0), np.int32(2), np.int32(3)]
        ((_, _, piece),) = model.stream(IMAGE, FEATURES, region=region, tile=np.int64(2))  # type: ignore[arg-type]
    assert piece.shape == (2, 5, 2, 3)


def test_images_without_values_are_not_looked_at(model: AnyUp) -> None:
    with torch.no_grad():
        out = torch.func.vmap(lambda image: model(image[None], FEATURES[:1])[0])(IMAGE)
        torch.testing.assert_close(out, model(IMAGE, FEATURES[:1].expand(2, -1, -1, -1)))
