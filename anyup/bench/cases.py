"""What can be timed, and measured in a child process: calls by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyup
from anyup import AnyUp
from anyup.bench.published import Published
from anyup.bench.workloads import Workload
from anyup.layers import Encoder
from anyup.ops import window_attention
from anyup.ops.feature_unification import unify_features
from anyup.ops.pixel_encoder import encode_pixels
from anyup.ops.query_projection import project_queries

Call = Callable[[], Tensor]

CLASSES = 21
"""Outputs of the linear head."""

OPERATIONS = (
    "window_attention",
    "window_attention_of_classes",
    "image_encoder",
    "query_encoder",
    "key_encoder",
    "feature_unification",
    "query_projection",
)
"""Operations alone; "query_projection/reference" names one and its backend."""

WHOLE = ("anyup", "published", "head_before", "head_after", "classes_as_values")
"""Whole calls."""

REFERENCE_CHUNK = 4096


def model() -> AnyUp:
    """An untrained model in eval mode, the same in each process.

    Neither time nor memory depends on the weights.
    """
    torch.manual_seed(0)
    return AnyUp().eval()


def build(case: str, workload: Workload, *, chunk: int | None = None) -> Call:
    """Everything a case needs, loaded and filled; the call is what is measured, in inference mode.

    Args:
        case: one of `WHOLE`, or one of `OPERATIONS` with "/" and a backend's name.
        workload: the sizes.
        chunk: the baseline's queries at a time.

    Raises ValueError for an unknown case.
    """
    operation, _, backend = case.partition("/")
    if case in WHOLE:
        call = _whole(case, workload, chunk)
    elif operation in OPERATIONS and backend:
        call = _operation(operation, backend, workload)
    else:
        raise ValueError(f"case: expected one of {WHOLE} or one of {OPERATIONS} with /backend, got {case!r}")
    return torch.inference_mode()(call)


def _whole(case: str, workload: Workload, chunk: int | None) -> Call:
    upsampler = model()
    image, features = workload.inputs()
    if case == "anyup":
        return lambda: upsampler(image, features)
    if case == "published":
        baseline = Published(upsampler)
        return lambda: baseline(image, features, chunk)
    head = nn.Conv2d(workload.channels, CLASSES, 1)
    if case == "head_before":
        with_head = anyup.with_head(upsampler, head)
        return lambda: with_head(image, features)
    if case == "head_after":
        return lambda: head(upsampler(image, features))
    logits = head(features).detach()
    return lambda: upsampler(image, features, values=logits)


def _operation(operation: str, backend: str, workload: Workload) -> Call:
    upsampler = model()
    generator = torch.Generator().manual_seed(0)
    batch, size, grid = workload.batch, workload.size, workload.grid
    dim, heads = upsampler.config["qk_dim"], upsampler.config["num_heads"]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if operation.startswith("window_attention"):
        channels = CLASSES if operation.endswith("of_classes") else workload.channels
        query, key = noise(batch, *size, heads, dim // heads), noise(batch, *grid, heads, dim // heads)
        value, window = noise(batch, *grid, channels), upsampler.window
        most = REFERENCE_CHUNK if backend == "reference" else None
        return lambda: window_attention(query, key, value, window=window, backend=backend, max_queries=most)
    if operation == "feature_unification":
        features = F.normalize(noise(batch, workload.channels, *grid), dim=1)
        basis = dict(upsampler.named_parameters())["key_features_encoder.0.basis"].detach()
        return lambda: unify_features(features, basis, backend=backend)
    if operation == "query_projection":
        encoded, projection = noise(batch, *size, dim), upsampler.cross_decode.query_parameters(torch.float32)
        return lambda: project_queries(encoded, projection, backend=backend)
    encoder: Encoder = getattr(upsampler, operation)
    width = upsampler.config["input_dim"] if operation == "image_encoder" else dim
    pixels, parameters = encoder.prepare(noise(batch, *size, width).permute(0, 3, 1, 2))
    frequencies = upsampler.rope.freqs.detach() if operation == "image_encoder" else None
    output_size = grid if operation == "key_encoder" else size
    return lambda: encode_pixels(pixels, parameters, frequencies=frequencies, output_size=output_size, backend=backend)
