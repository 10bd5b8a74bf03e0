"""Keys in Triton kernels, in float32: from the features' norm to the projection nothing of it is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.dispatch import WITHOUT_GRADIENT
from anyup.ops.feature_unification import fused as unification
from anyup.ops.feature_unification.operator import OPERATION as UNIFICATION
from anyup.ops.kernel_device import dot_precision, target
from anyup.ops.key_grid.arguments import KeyGridProblem, KeyParameters
from anyup.ops.pixel_encoder.fused_passes import Encoder
from anyup.ops.pixel_encoder.operator import OPERATION as PIXEL_ENCODER
from anyup.ops.precision import dtype_name


def unsupported(problem: KeyGridProblem) -> list[str]:
    """Why the kernels are not for a problem; empty: they are, where each operation alone would run on its kernels."""
    dtype, filters, dim = problem.blocks.dtype, problem.unification.filters, problem.blocks.dim
    if dtype != torch.float32:
        return [f"keys are made in {dtype_name(dtype)}, the kernels make them in float32"]
    if filters != dim:
        return [f"keys of {dim} channels from {filters} unified ones, the kernels make as many of as many"]
    reasons = []
    if problem.blocks.needs_gradient:
        reasons.append(f"a gradient is wanted, the kernels have no backward pass: {WITHOUT_GRADIENT}")
    for operation, inner, asked in (
        (UNIFICATION, problem.unification, problem.unification_backend),
        (PIXEL_ENCODER, problem.blocks, problem.blocks_backend),
    ):
        chosen = operation.explain(inner, asked).chosen
        if chosen != "triton":
            reasons.append(f"the {operation.name} runs on {chosen}")
    return reasons


def forward(image_keys: Tensor, features: Tensor, parameters: KeyParameters, *, copies: bool) -> tuple[Tensor, Tensor]:
    """(B, h, w, D) and (B, C, h, w) to keys (B, h, w, D), and to (B, h, w, C) or an empty tensor."""
    from anyup.kernels.pixel_encoder_passes import KeyProjection

    batch, channels, *grid = features.shape
    copied = features.new_empty((batch, *grid, channels) if copies else (0,))
    weight = parameters.convolution.contiguous()
    # The map's channels before the result's, so that a product's operand is read in runs.
    arranged = weight.new_empty((3, 3, *reversed(weight.shape[:2])))
    unified, parts = unification.unify_normalized(
        features, parameters.basis, copied=copied if copies else None, weights=(weight, arranged)
    )
    feature_keys = Encoder(unified, parameters.features, parts).whole()
    convolved, parts = _convolved(image_keys.contiguous(), feature_keys, arranged)
    projection = KeyProjection(
        parameters.gain.contiguous(),
        parameters.weight.contiguous(),
        parameters.bias.contiguous(),
        torch.finfo(torch.float32).eps,
    )
    keys = torch.empty_like(image_keys, memory_format=torch.contiguous_format)
    Encoder(convolved, parameters.aggregation, parts).keys(projection, keys)
    return keys, copied


def _convolved(image_keys: Tensor, feature_keys: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution (B, h, w, D) float32 of both side by side, and the statistics of its groups.

    `weight` is (3, 3, 2 D, D).
    """
    from anyup.kernels.key_grid_config import ConvolutionConfig, convolution_configs
    from anyup.kernels.key_grid_convolution import plan_convolution
    from anyup.kernels.pixel_encoder_passes import allocate_parts

    batch, height, width, dim = image_keys.shape
    out, precision = torch.empty_like(feature_keys), dot_precision()

    def run(config: ConvolutionConfig) -> Tensor:
        parts = allocate_parts(batch, config.runs(height * width), out.device)
        plan_convolution(image_keys, feature_keys, weight, out, parts, precision=precision, config=config)()
        return parts

    kernel = ("key_grid", "convolution", out.device, image_keys.dtype, weight.dtype, dim, precision)
    return out, run_first(run, convolution_configs(target(out.device)), kernel=kernel)
