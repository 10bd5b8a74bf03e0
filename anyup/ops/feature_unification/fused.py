"""Feature unification in Triton kernels: each program computes blocks of softmaxes, and C*M maps are never stored."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.dispatch import WITHOUT_GRADIENT
from anyup.ops.feature_unification.arguments import FeatureUnificationProblem
from anyup.ops.kernel_device import device_reasons, discouraged, dtype_reasons, installed, interprets, target
from anyup.ops.precision import float32_matmul_precision

if TYPE_CHECKING:
    from anyup.kernels.feature_unification_patches import Arranged

__all__ = ["backward", "discouraged", "forward", "unsupported"]

_MOST_TAPS = 128
_MOST_TURNED = 64
_PRECISION = "ieee"  # for float32 in the interpreter alone; on a card all products have 16-bit factors


def unsupported(problem: FeatureUnificationProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    from anyup.kernels.feature_unification_config import MOST_FILTERS
    from anyup.kernels.feature_unification_patches import runs_of

    reasons += dtype_reasons("features are", problem.dtype)
    turned = runs_of(problem.channels, problem.filters).turned
    if problem.needs_gradient and turned and problem.dtype == torch.float32 and problem.filters > _MOST_TURNED:
        reasons.append(
            f"a gradient is wanted for C = {problem.channels} and {problem.filters} filters, which have no divisor "
            f"from 16 on in common, in float32: at most {_MOST_TURNED} filters (more would spill kilobytes); "
            f"{WITHOUT_GRADIENT}"
        )
    if problem.filters > MOST_FILTERS:
        reasons.append(f"{problem.filters} filters, at most {MOST_FILTERS} (a softmax over them stays in registers)")
    if problem.kernel_size**2 > _MOST_TAPS:
        size = problem.kernel_size
        reasons.append(f"filters of {size} x {size} taps, at most {_MOST_TAPS} taps (a patch stays on the chip)")
    if problem.filters * problem.channels >= 2**31:
        reasons.append(f"{problem.filters} filters of {problem.channels} channels, together fewer than 2^31 maps")
    return reasons


def forward(features: Tensor, basis: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """(B, C, h, w), (M, 1, s, s) -> (B, M, h, w); float32 inside for half precision.

    Beside the result it allocates a copy of the features, bordered by zeros.
    """
    batch, _, height, width = features.shape
    out = features.new_empty(batch, basis.shape[0], height, width)
    _unify(_arrange(features, basis), out, _kernel("forward", features, basis))
    return out if out_dtype is None else out.to(out_dtype)


def unify_normalized(
    features: Tensor, basis: Tensor, *, copied: Tensor | None, weights: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """(B, C, h, w), (M, 1, s, s) -> (B, h, w, M) float32, of features divided by their norm over the channels.

    It computes in float32 for any dtypes. The unnormalised features are copied into `copied` (B, h, w, C). The first of
    `weights`, of a convolution (D, Cin, k, k), is copied into the second, (k, k, Cin, D). The second result holds the
    statistics of the first normalisation of the pixel encoder that follows, or is None.
    """
    batch, _, height, width = features.shape
    out = features.new_empty(batch, height, width, basis.shape[0], dtype=torch.float32)
    arranged = _arrange(features, basis, dtype=torch.float32, copied=copied, weights=weights)
    kernel = _kernel("normalized", features, basis, torch.float32)
    return out, _unify(arranged, out.permute(0, 3, 1, 2), kernel, measured=True)


def _unify(arranged: Arranged, out: Tensor, kernel: tuple[Hashable, ...], *, measured: bool = False) -> Tensor | None:
    from anyup.kernels.feature_unification_config import UnificationConfig, forward_configs
    from anyup.kernels.feature_unification_forward import measures, plan_forward
    from anyup.kernels.pixel_encoder_passes import allocate_parts

    measured = measured and measures(arranged)

    def run(config: UnificationConfig) -> Tensor | None:
        tiles = config.tiles(out.shape[2] * out.shape[3])
        parts = allocate_parts(len(out), tiles, out.device) if measured else None
        plan_forward(arranged, out, parts=parts, precision=_PRECISION, config=config)()
        return parts

    return run_first(run, forward_configs(arranged), kernel=kernel)


def backward(grad: Tensor, features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of features and basis; the forward pass is recomputed.

    Beside the gradients it allocates a copy of the features, and partial sums of both gradients: those of the features
    have about four times the size of the features.
    """
    from anyup.kernels.feature_unification_backward import allocate_parts, plan_backward, plan_fold
    from anyup.kernels.feature_unification_config import backward_configs

    filters, _, size, _ = basis.shape
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    arranged = _arrange(features, basis, transposed=True)
    cell_parts, filter_parts = allocate_parts(arranged, tuple(features.shape[2:]))

    def launch(of: str) -> None:
        run_first(
            lambda config: plan_backward(
                grad, arranged, cell_parts, filter_parts, of=of, precision=_PRECISION, config=config
            )(),
            backward_configs(arranged, target=target(features.device), of=of),
            kernel=_kernel(f"backward of {of}", features, basis),
        )

    launch("cells")
    launch("filters")
    run_first(
        lambda _: plan_fold(cell_parts, grad_features, arranged)(),
        [None],
        kernel=_kernel("fold", features, basis),
    )
    grad_basis = filter_parts.flatten(0, 2).sum(dim=0)[:filters, : size * size]
    return grad_features, grad_basis.reshape(basis.shape).to(basis.dtype)


def planes_of(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """The number and the dtype of the planes whose sum is a factor, by torch's precision of float32 products.

    Three bfloat16 planes hold a float32 exactly. Two hold 16 of its 24 bits, enough for "high"; tf32 holds 11 bits.
    """
    if dtype != torch.float32 or interprets():  # the interpreter multiplies bfloat16 wrongly
        return 1, dtype
    return (3 if float32_matmul_precision("cuda") == "highest" else 2), torch.bfloat16


def _arrange(
    features: Tensor,
    basis: Tensor,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    copied: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Arranged:
    """Arrange the features; with `dtype` they are normalised and converted to it. The rest as in `unify_normalized`."""
    from anyup.kernels.feature_unification_patches import allocate, plan_arrange

    planes, stored = planes_of(dtype or features.dtype)
    arranged = allocate(features, basis, planes=planes, dtype=stored, transposed=transposed)
    weight = None if weights is None else (weights[0].shape, weights[0].dtype)
    run_first(
        lambda _: plan_arrange(
            features, basis.contiguous(), arranged, normalizes=dtype is not None, copied=copied, weights=weights
        )(),
        [None],
        kernel=(*_kernel("arrange", features, basis, dtype), copied is None, weight),
    )
    return arranged


def _kernel(name: str, features: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> tuple[Hashable, ...]:
    """All that a kernel is compiled for, except its config; `dtype` is the dtype of normalised features."""
    from anyup.kernels.feature_unification_patches import runs_of

    runs = runs_of(features.shape[1], basis.shape[0])
    return (
        "feature_unification",
        name,
        features.device,
        features.dtype,
        dtype,
        basis.shape,
        (runs.classes, runs.turned),
        planes_of(dtype or features.dtype),
    )
