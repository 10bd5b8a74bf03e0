"""The whole upsampler on a card's path, from the image to the gradients, no backend named."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.card import under_ttsem
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.limited_memory import choice, prediction
from anyup.limited_memory.plans import Bands

pytestmark = pytest.mark.gpu

BATCH, IMAGE, HALF = (1, (9, 10), (torch.float16,)) if under_ttsem() else (2, (11, 18), (torch.float16, torch.bfloat16))
"""Under ttsem the tests of the operators have the batches of two, several tiles in a row, and every dtype."""

SMALL: dict[str, Any] = {"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3}


def model(device: str, dtype: torch.dtype, **arguments: Any) -> AnyUp:
    return fill(AnyUp(**SMALL, **arguments), 0).to(device, dtype)


def inputs() -> tuple[Tensor, Tensor]:
    return wave((BATCH, 3, *IMAGE), 3, 0.8), wave((BATCH, 13, 4, 5), 7)


@pytest.fixture(scope="module")
def wide_output(_device_or_skip: None) -> Tensor:
    """What the upsampler gives in float32 on the card."""
    image, features = (tensor.to("cuda") for tensor in inputs())
    with torch.inference_mode():
        return model("cuda", torch.float32).eval()(image, features)


def of_attention(launched: Counter[str]) -> Counter[str]:
    """The launches of the window attention's kernels."""
    others = ("feature_unification_", "pixel_encoder_", "query_projection_")
    return Counter({name: number for name, number in launched.items() if not name.startswith(others)})


def results(upsampler: AnyUp, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradient of the features, the image and every parameter that has one."""
    image, features = (tensor.to(device, dtype).requires_grad_() for tensor in inputs())
    out = upsampler(image, features)
    grad = wave(tuple(out.shape), 11).to(device, dtype)
    leaves = {"image": image, "features": features, **dict(upsampler.named_parameters())}
    gradients = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {name: tensor.detach().cpu() for name, tensor in {"output": out, **found}.items()}


# Under ttsem the operator's tests have the other window.
@pytest.mark.parametrize("window", ["ratio"] if under_ttsem() else ["ratio", "cell"])
def test_the_upsampler_on_a_card_gives_what_the_reference_gives_on_a_cpu(window: str, launched: Counter[str]) -> None:
    upsampler = model("cuda", torch.float32, window=window)
    image, features = (tensor.to("cuda") for tensor in inputs())
    chosen = upsampler.explain(image, features).chosen
    assert chosen.pop("window_attention") == "triton"
    # A pair's operator and the keys' are for inference.
    assert chosen == {
        "pixel_encoder": "triton",
        "feature_unification": "triton",
        "pixel_encoder_pair": None,
        "key_grid": None,
        "query_projection": "triton",
    }
    actual = results(upsampler, "cuda", torch.float32)
    assert of_attention(launched).total() == 4 and launched.total() == 94
    narrow, exact = (
        results(model("cpu", dtype, window=window, backend="reference"), "cpu", dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert launched.total() == 94, "the reference launched a kernel"
    assert actual.keys() == exact.keys() and len(actual) > 60
    for name in ("output", "gradients"):
        together = (_together(found, exact, name) for found in (actual, narrow, exact))
        assert_close_enough(*together, name)


def _together(found: dict[str, Tensor], exact: dict[str, Tensor], kind: str) -> Tensor:
    """The output, or all gradients as one tensor, each in units of its largest number.

    One by one, a gradient of few numbers exceeds twice the reference's error wherever that is small by luck.
    """
    names = [name for name in exact if name.startswith(kind.removesuffix("s"))]
    return torch.cat([found[name].flatten() / exact[name].abs().max().to(found[name].dtype) for name in names])


def test_a_stream_on_a_card_gives_what_the_plain_call_gives(wide_output: Tensor, launched: Counter[str]) -> None:
    upsampler = model("cuda", torch.float32).eval()
    image, features = (tensor[:1].to("cuda") for tensor in inputs())
    with torch.inference_mode():
        pieces = list(upsampler.stream(image, features, tile=(7, IMAGE[1])))
    assert [(rows.start, rows.stop) for rows, _, _ in pieces] == [(0, 7), (7, IMAGE[0])]
    # Statistics of four passes of three encoders, the encoded image for two of these and for each piece, the queries.
    assert launched["pixel_encoder_pass, float32"] >= 12
    # One for each piece.
    launched = of_attention(launched)
    assert launched.total() == 2 and all(name.startswith("forward ") for name in launched)
    for rows, columns, piece in pieces:
        assert (piece - wide_output[:1, :, rows, columns]).abs().max() < 1e-4 * wide_output.abs().max()


@pytest.mark.parametrize(
    ("bands", "dtype"),
    [
        pytest.param(Bands(4, 3), torch.float32, id="nothing"),
        pytest.param(Bands(4, 5, together=False, kept=8, kept_for_output=4), torch.bfloat16, id="one map"),
    ],
)
def test_bands_of_an_image_go_through_the_kernels(
    bands: Bands, dtype: torch.dtype, wide_output: Tensor, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "choose", lambda task, limit, **_: prediction.banded(task, bands, limit))
    upsampler = model("cuda", dtype).eval()
    image, features = (tensor[:1].to("cuda", dtype) for tensor in inputs())
    with torch.inference_mode():
        out = upsampler(image, features)
    assert launched[f"pixel_encoder_pass, {str(dtype).removeprefix('torch.')}"] >= 36
    limit = 1e-4 if dtype == torch.float32 else 0.05
    assert (out.float() - wide_output[:1]).abs().max() < limit * wide_output.abs().max()


def test_a_card_is_told_to_multiply_in_tf32_by_the_newer_settings_too(
    wide_output: Tensor, precision_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once one of them is used, `torch.get_float32_matmul_precision` raises."""
    from anyup.kernels.launch import Launch

    precisions: set[Any] = set()
    launch = Launch.__call__

    def recorded(self: Launch) -> None:
        precisions.add(self.constants.get("PRECISION"))
        launch(self)

    monkeypatch.setattr(Launch, "__call__", recorded)
    image, features = (tensor.to("cuda") for tensor in inputs())
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with torch.inference_mode():
        out = model("cuda", torch.float32).eval()(image, features)
    assert "tf32" in precisions and "tf32x3" not in precisions
    assert (out - wide_output).abs().max() < 0.01 * wide_output.abs().max()


@pytest.mark.parametrize("half", HALF)
def test_under_autocast_half_queries_carry_wide_values(
    half: torch.dtype, wide_output: Tensor, launched: Counter[str]
) -> None:
    upsampler = model("cuda", torch.float32)
    image, features = (tensor.to("cuda") for tensor in inputs())
    with torch.no_grad(), torch.autocast("cuda", half):
        out = upsampler(image, features)
    assert out.dtype == features.dtype
    name = str(half).removeprefix("torch.")
    assert [kernel.split(", ")[1:] for kernel in of_attention(launched)] == [[name, "float32"]]
    assert (out - wide_output).abs().max() < 0.05 * wide_output.abs().max()


@pytest.mark.parametrize("half", HALF)
def test_a_half_precision_upsampler_stays_near_the_wide_one(
    half: torch.dtype, wide_output: Tensor, launched: Counter[str]
) -> None:
    image, features = (tensor.to("cuda") for tensor in inputs())
    with torch.inference_mode():
        out = model("cuda", half)(image.to(half), features.to(half))
    assert out.dtype == half
    assert launched[f"pixel_encoder_pass, {str(half).removeprefix('torch.')}"] > 0
    assert (out.float() - wide_output).abs().max() < 0.05 * wide_output.abs().max()
