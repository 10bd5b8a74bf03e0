"""Products of float32 in three of float16, in Triton's interpreter; the kernels that make them on an NVIDIA card."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.accuracy import assert_close_enough
from support.mutations import mutate
from support.pixel_encoder_cases import Shape, encoder, tensors_of
from support.recipe import INTERPRETED
from torch import Tensor

from anyup.ops.pixel_encoder import fused_passes
from anyup.ops.query_projection import fused as fused_projection

pytestmark = INTERPRETED

INNER = 64


def some(*shape: int, spread: float = 0.0) -> Tensor:
    """Numbers whose magnitudes spread over some powers of two."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator) * (spread * (torch.rand(shape, generator=generator) - 0.5)).exp2()


def split(left: Tensor, right: Tensor, *, known: bool = True) -> Tensor:
    """left (32, INNER) @ right (INNER, 32)."""
    from support.product_kernel import product

    out = torch.empty(32, 32)
    product[(1,)](left, right, None, out, INNER=INNER, KNOWN=known, PRECISION="float16x3")
    return out


def assert_as_exact_as_float32(left: Tensor, right: Tensor, actual: Tensor) -> None:
    """Raise an AssertionError unless each row obeys the error rule for itself."""
    exact, narrow = left.double() @ right.double(), left @ right
    for row in range(32):
        assert_close_enough(actual[row], narrow[row], exact[row])


@pytest.mark.parametrize("known", [False, True])
def test_each_row_is_as_exact_as_of_float32(known: bool) -> None:
    left, right = some(32, INNER), some(INNER, 32)
    assert_as_exact_as_float32(left, right, split(left, right, known=known))


@pytest.mark.parametrize("powers", [(-60, -60), (-100, 90), (90, -100), (40, 40)])
def test_magnitudes_that_float16_does_not_have_obey_the_error_rule(powers: tuple[int, int]) -> None:
    left, right = (x * 2.0**power for x, power in zip((some(32, INNER), some(INNER, 32)), powers, strict=True))
    assert_as_exact_as_float32(left, right, split(left, right))


def test_rows_of_other_magnitudes_keep_theirs() -> None:
    left, right = some(32, INNER) * torch.arange(-32.0, 32.0, 2)[:, None].exp2(), some(INNER, 32)
    assert_as_exact_as_float32(left, right, split(left, right))


def test_numbers_that_spread_over_magnitudes_obey_the_error_rule() -> None:
    left, right = some(32, INNER, spread=30.0), some(INNER, 32, spread=30.0)
    exact = left.double() @ right.double()
    assert_close_enough(split(left, right), left @ right, exact)


def test_rows_of_zeros_are_zeros_and_rows_that_are_no_numbers_stay_apart() -> None:
    left, right = some(32, INNER), some(INNER, 32)
    left[2], left[3, 5], left[7, 1] = 0.0, torch.inf, torch.nan
    actual = split(left, right)
    assert actual[2].eq(0).all()
    assert actual[[3, 7]].isnan().all()
    assert actual[[row for row in range(32) if row not in (3, 7)]].isfinite().all()


@pytest.fixture
def as_on_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take products of float32 apart, as they do on an NVIDIA card."""
    kernels = partial(fused_passes.Kernels, precision="float16x3")
    monkeypatch.setattr(fused_passes, "Kernels", kernels)
    monkeypatch.setattr(fused_projection, "dot_precision", lambda: "float16x3")


SHAPES = {
    "image": Shape((5, 7)),
    "rotated, batch 2": Shape((4, 6), dim=32, rotates=True, batch=2),
    "as wide as the input": Shape((5, 7), inputs=16),
    "pooled, in pieces": Shape((6, 7), (2, 3), inputs=64, dim=64),
    "channels that are no power of two": Shape((4, 5), inputs=40, dim=40, rotates=True),
}


def assert_encoder_accurate(shape: Shape, tensors: dict[str, Tensor]) -> None:
    """Raise an AssertionError unless the encoder on kernels obeys the error rule."""
    with torch.no_grad():
        run = encoder(shape)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        actual = run(backend="triton", **tensors)
        reference, exact = (run(backend="reference", **given) for given in (tensors, wide))
    assert_close_enough(actual, reference, exact)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e6])
@pytest.mark.parametrize("name", SHAPES)
def test_the_pixel_encoder_obeys_the_error_rule(name: str, size: float, as_on_nvidia: None) -> None:
    tensors = tensors_of(SHAPES[name])
    assert_encoder_accurate(SHAPES[name], {**tensors, "pixels": tensors["pixels"] * size})


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e6])
def test_the_query_projection_obeys_the_error_rule(size: float, as_on_nvidia: None) -> None:
    from anyup.ops.query_projection.arguments import ProjectionParameters
    from anyup.ops.query_projection.reference import forward as reference

    encoded = some(1, 9, 17, 32) * size
    given = some(32, 32, 3, 3), some(32), some(32, 32), some(32)
    actual = fused_projection.forward(encoded, ProjectionParameters(*given))
    wide = ProjectionParameters(*(tensor.double() for tensor in given))
    assert_close_enough(actual, reference(encoded, ProjectionParameters(*given)), reference(encoded.double(), wide))


MUTATIONS = {
    "no rest of the left": ("split_matmul", "tl.dot(left_rest, right_high)", "tl.dot(left_rest * 0, right_high)"),
    "no rest of the right": ("split_matmul", "right_rest, product)", "right_rest * 0, product)"),
    "the rest of another number": ("_float16_and_rest", "x - high", "x + high"),
    "half of what takes it back": ("scale_of", "exponent - 14", "exponent - 15"),
    "too large for float16": ("scale_of", "268 - exponent", "270 - exponent"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_product_fails(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import product_kernel

    from anyup.kernels import products

    name, right, wrong = MUTATIONS[mutation]
    mutate(monkeypatch, "products", name, right, wrong)
    if name != "split_matmul":  # it calls what was changed
        mutate(monkeypatch, "products", "split_matmul", "# The rests first.", "")
    monkeypatch.setattr(product_kernel, "split_matmul", products.split_matmul)
    factors = some(32, INNER), some(INNER, 32)
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact_as_float32(*factors, split(*factors, known=False))
