"""The error rule: how close a result must be to the reference.

A result may be twice as far from the float64 reference as the reference in the result's own precision, and a
rounding of the largest value more: max|x - ref64| <= 2 max|ref - ref64| + 2 eps(dtype) max|ref64|; in float64,
where there is nothing finer to measure with, 1e-12 max|ref64|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "reference")
"""The backends that run on any device."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What they compute in."""

Run = Callable[..., Tensor]
"""Called with `backend=` and the tensors by name; returns the output."""


def assert_close_enough(actual: Tensor, reference: Tensor, exact: Tensor, name: str = "result") -> None:
    """Raise an AssertionError unless `actual` obeys the error rule.

    `reference` is the reference in the dtype of `actual`, `exact` the reference in float64 on the same inputs.
    """
    if not (actual.shape == reference.shape == exact.shape):
        raise AssertionError(f"{name}: shapes {actual.shape}, {reference.shape} and {exact.shape} differ")
    if actual.dtype != reference.dtype or exact.dtype != torch.float64:
        raise AssertionError(f"{name}: dtypes {actual.dtype}, {reference.dtype} and {exact.dtype} do not fit")
    if not actual.numel():
        return
    size, error = _largest(exact), _largest(actual.double() - exact)
    if actual.dtype == torch.float64:
        bound = 1e-12 * size
    else:
        bound = 2 * _largest(reference.double() - exact) + 2 * torch.finfo(actual.dtype).eps * size
    if not error <= bound:  # a NaN is no small error
        raise AssertionError(f"{name}: error {error:.3e} exceeds {bound:.3e} (values up to {size:.3e}), {actual.dtype}")


def assert_backend_accurate(
    run: Run, tensors: Mapping[str, Tensor], *, backend: str = "torch", gradients: bool = True
) -> None:
    """Raise an AssertionError unless a backend's output and gradients obey the error rule."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    actual = output_and_gradients(run, tensors, backend, gradients)
    reference = output_and_gradients(run, tensors, "reference", gradients)
    exact = output_and_gradients(run, wide, "reference", gradients)
    for name in exact:
        assert_close_enough(actual[name], reference[name], exact[name], name)


def assert_backend_accurate_over_draws(
    run: Run, draw: Callable[[int], Mapping[str, Tensor]], *, backend: str = "torch"
) -> None:
    """The error rule for several draws taken together, as one tensor for each result.

    Where few sums are compared, the reference's own error is sometimes small by luck: what one draw does not decide,
    six do, or forty-eight. A wrong result fails each time.
    """
    for draws in (1, 6):
        with suppress(AssertionError):
            _assert_accurate_together(run, [draw(seed) for seed in range(draws)], backend)
            return
    _assert_accurate_together(run, [draw(seed) for seed in range(48)], backend)


def _assert_accurate_together(run: Run, draws: Sequence[Mapping[str, Tensor]], backend: str) -> None:
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for tensors in draws:
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        actual = output_and_gradients(run, tensors, backend)
        reference = output_and_gradients(run, tensors, "reference")
        exact = output_and_gradients(run, wide, "reference")
        for name in exact:
            results.setdefault(name, []).append((actual[name], reference[name], exact[name]))
    for name, kinds in results.items():
        together = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*kinds, strict=True))
        assert_close_enough(*together, name)


def output_and_gradients(
    run: Run, tensors: Mapping[str, Tensor], backend: Any, gradients: bool = True
) -> dict[str, Tensor]:
    """The output, and the gradient of each tensor for a fixed pseudo-random gradient of the output."""
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in tensors.items()}
    out = run(backend=backend, **leaves)
    results = {"output": out.detach()}
    if gradients:
        # Representable in every dtype, so that each run gets the same.
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(out)
        for name, value in zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True):
            results[f"gradient of {name}"] = value
    return results


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
