"""The stored outputs and gradients of the published implementation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.accuracy import BACKENDS
from support.recipe import CASES, golden_arrays, golden_call, wave
from torch import Tensor

OUTPUT_TOLERANCE = 3e-5
GRADIENT_TOLERANCE = 5e-5  # of the gradient's stored norm

CASES_WITH_GRADIENTS = sorted({key.split("/")[0] for key in golden_arrays("grads")})

# A sum that cancels: the stored vector is 1.0e-4 of its norm away from the float64 gradient, by float32 noise. What is
# compared with it has noise of its own, so it may be as far on the other side of the float64 gradient.
NOISY_GRADIENTS = ("channels_130/key_features_encoder.1.block.0.weight",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_is_the_published_one(name: str, backend: str) -> None:
    with torch.no_grad():
        out = golden_call(name, backend)()
    expected = golden_arrays("outputs")[name]
    assert out.shape == expected.shape and out.dtype == torch.float32
    assert (out - expected).abs().max().item() <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_output_reads_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    with torch.no_grad():
        out = golden_call(name, "torch")()
    assert (out - golden_arrays("outputs")[name]).abs().max().item() <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_float64_reference_is_as_near_as_float32_vectors_can_be(name: str) -> None:
    with torch.no_grad():
        out = golden_call(name, "reference", torch.float64)()
    assert (out - golden_arrays("outputs")[name]).abs().max().item() <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_float64_torch_backend_is_the_float64_reference(name: str) -> None:
    with torch.no_grad():
        out, expected = (golden_call(name, backend, torch.float64)() for backend in BACKENDS)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_every_stored_case_is_tested() -> None:
    assert set(golden_arrays("outputs")) == set(CASES)
    assert set(CASES_WITH_GRADIENTS) <= set(CASES) and len(CASES_WITH_GRADIENTS) > 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES_WITH_GRADIENTS)
def test_gradients_are_the_published_ones(name: str, backend: str) -> None:
    _assert_gradients(name, _gradients(name, backend))


@pytest.mark.parametrize("name", CASES_WITH_GRADIENTS)
def test_gradients_read_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    _assert_gradients(name, _gradients.__wrapped__(name, "torch"))


@pytest.mark.parametrize("name", CASES_WITH_GRADIENTS)
def test_float64_gradients_of_the_torch_backend_are_the_reference_s(name: str) -> None:
    expected = _gradients(name, "reference", torch.float64)
    for key, gradient in _gradients(name, "torch", torch.float64).items():
        error = (gradient - expected[key]).abs().max()
        assert error <= 1e-11 * expected[key].abs().max(), key


def test_value_rows_and_output_projection_have_no_gradient() -> None:
    gradients = _gradients("square", "torch")
    assert not gradients["cross_decode.cross_attn.attention.in_proj_weight"][256:].any()
    assert not gradients["cross_decode.cross_attn.attention.in_proj_bias"][256:].any()
    assert not any("out_proj" in key for key in gradients)


def _assert_gradients(name: str, gradients: dict[str, Tensor]) -> None:
    stored = {k.split("/", 1)[1]: v for k, v in golden_arrays("grads").items() if k.startswith(f"{name}/")}
    assert {"image", "features"} < set(stored)
    for key, expected in stored.items():
        # A parameter that never influences the result may have no gradient at all.
        actual = _sample(gradients[key]) if key in gradients else torch.zeros_like(expected)
        bound = GRADIENT_TOLERANCE * expected[0].item()
        if f"{name}/{key}" in NOISY_GRADIENTS:
            exact = _sample(_gradients(name, "reference", torch.float64)[key])
            noise = (exact - expected).abs().max().item()
            bound = noise + max(bound, noise)
        error = (actual - expected).abs().max().item()
        assert error <= bound, f"{key}: error {error:.3e} exceeds {bound:.3e}"


def _sample(gradient: Tensor) -> Tensor:
    """What is stored of a gradient: its norm, and at most 64 entries at equal distances."""
    flat = gradient.flatten()
    step = max(1, flat.numel() // 64)
    return torch.cat((flat.double().norm()[None], flat[::step][:64].double()))


@cache
def _gradients(name: str, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    call = golden_call(name, backend, dtype)
    call.image.requires_grad_()
    call.features.requires_grad_()
    out = call()
    (out * wave(tuple(out.shape), 31 + call.seed).to(dtype)).sum().backward()
    tensors = dict(call.model.named_parameters(), image=call.image, features=call.features)
    return {key: tensor.grad for key, tensor in tensors.items() if tensor.grad is not None}
