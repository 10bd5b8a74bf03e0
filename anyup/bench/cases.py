"""What can be timed, and measured in a child process: calls by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyup
from anyup import AnyUp
from anyup.bench.baseline import Published
from anyup.bench.floors import BOTH, CLASSES, FORWARD, PASSES
from anyup.bench.workloads import Workload
from anyup.layers import Encoder
from anyup.ops import window_attention
from anyup.ops.dispatch import Explanation
from anyup.ops.feature_distance import feature_distance
from anyup.ops.feature_unification import explain_backends as explain_unification
from anyup.ops.feature_unification import unify_features
from anyup.ops.pixel_encoder import encode_pixels
from anyup.ops.pixel_encoder import explain_backends as explain_encoder
from anyup.ops.query_projection import explain_backends as explain_projection
from anyup.ops.query_projection import project_queries
from anyup.ops.window_attention import explain_backends as explain_attention
from anyup.window import Part

Call = Callable[[], Tensor]

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

WHOLE = ("anyup", "published", "head_before", "head_after", "classes_as_values", "training_step")
"""Whole calls; "anyup/torch" names a backend. A training step is one whatever the pass."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

REFERENCE_CHUNK = 4096


@dataclass(frozen=True)
class Sizes:
    """What a call is built for.

    Attributes:
        workload: the sizes.
        dtype: of the model, the image and the features: one of `DTYPES`.
        direction: "forward", in inference mode, or "forward+backward".
        device: where it runs.
        chunk: the baseline's queries at a time; None: the whole output at once.
    """

    workload: Workload
    dtype: str = "float32"
    direction: str = FORWARD
    device: str = "cpu"
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", tuple(DTYPES)), ("direction", PASSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Image and features, on the device and of the dtype."""
        image, features = (t.to(self.device, DTYPES[self.dtype]) for t in self.workload.inputs())
        return image, features


def model(dtype: str = "float32", device: str = "cpu", backend: str | None = None) -> AnyUp:
    """An untrained model in eval mode, the same in each process.

    Neither time nor memory depends on the weights.
    """
    torch.manual_seed(0)
    made = AnyUp(backend=backend).eval()
    return made.to(device, DTYPES[dtype])


def build(case: str, sizes: Sizes) -> Call:
    """Everything a case needs, loaded and filled; the call is what is measured.

    Args:
        case: one of `WHOLE` ("anyup/torch": on a backend), or one of `OPERATIONS` with "/" and a backend's name.
        sizes: what it is built for. With the backward pass the call returns the output as well; the gradients go to
            all parameters of a model, or to all inputs of an operation.

    Raises ValueError for an unknown case, NotImplementedError (when called) where a backend cannot.
    """
    operation, _, backend = case.partition("/")
    if operation == "training_step":
        return _TrainingStep(backend or None, sizes)
    if operation in WHOLE:
        call, leaves = _whole(operation, backend or None, sizes)
    elif operation in OPERATIONS and backend:
        alone = _operation(operation, sizes)
        call, leaves = (lambda: alone.run(backend)), alone.leaves
    else:
        raise ValueError(f"case: expected one of {WHOLE} or one of {OPERATIONS} with /backend, got {case!r}")
    return ThereAndBack(call, leaves) if sizes.direction == BOTH else torch.inference_mode()(call)


def explain(operation: str, sizes: Sizes) -> Explanation:
    """Which backends can run an operation alone, and why not the others."""
    alone = _operation(operation, sizes)
    if sizes.direction == BOTH:
        for leaf in alone.leaves:
            leaf.requires_grad_()
    return alone.explain()


def attention_sample(operation: str, sizes: Sizes) -> tuple[slice, Tensor]:
    """Some rows of the window attention's output, and what the definition has there: (B, rows, W, C)."""
    alone = _operation(operation, sizes)
    if alone.sample is None:
        raise ValueError(f"operation: expected a window attention, got {operation!r}")
    with torch.inference_mode():
        return alone.sample()


class ThereAndBack:
    """A call with its backward pass: the output, and the gradients in the leaves' `grad`.

    Attributes:
        leaves: tensors whose gradients are wanted.
    """

    def __init__(self, call: Call, leaves: Sequence[Tensor]) -> None:
        self._call, self.leaves = call, leaves
        self._gradient: Tensor | None = None

    def __call__(self) -> Tensor:
        for leaf in self.leaves:
            leaf.requires_grad_()
            leaf.grad = None
        out = self._call()
        if self._gradient is None:
            generator = torch.Generator().manual_seed(1)
            # The same for each pixel, so that it takes no memory.
            channels = torch.randn(out.shape[1], generator=generator).to(out)
            self._gradient = channels.view(1, -1, *(1,) * (out.ndim - 2)).expand(out.shape)
        out.backward(self._gradient)
        return out.detach()


class _TrainingStep:
    """A step of the published recipe's losses and optimizer, for features of the output's size that are noise.

    The weights are float32; half precision is autocast's. A call returns the output.
    """

    def __init__(self, backend: str | None, sizes: Sizes) -> None:
        self._upsampler = model(device=sizes.device, backend=backend).train()
        self._image, self._features = (t.to(sizes.device) for t in sizes.workload.inputs())
        shape = (*self._features.shape[:2], *sizes.workload.size)
        self._target = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(sizes.device)
        self._optimizer = torch.optim.AdamW(self._upsampler.parameters(), 2e-4)
        self._autocast = (torch.device(sizes.device).type, DTYPES[sizes.dtype], sizes.dtype != "float32")

    def __call__(self) -> Tensor:
        kind, dtype, enabled = self._autocast
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype if enabled else None, enabled=enabled):
            out: Tensor = self._upsampler(self._image, self._features)
            loss = torch.stack(feature_distance(out, self._target)).sum(dim=0).mean()
        loss.backward()
        self._optimizer.step()
        return out.detach()


def _whole(case: str, backend: str | None, sizes: Sizes) -> tuple[Call, list[Tensor]]:
    upsampler = model(sizes.dtype, sizes.device, backend)
    image, features = sizes.inputs()
    leaves: list[Tensor] = list(upsampler.parameters())
    if case == "anyup":
        return lambda: upsampler(image, features), leaves
    if case == "published":
        baseline = Published(upsampler)
        return lambda: baseline(image, features, sizes.chunk), leaves
    head = nn.Conv2d(sizes.workload.channels, CLASSES, 1).to(image)
    if case == "head_before":
        with_head = anyup.with_head(upsampler, head)
        return lambda: with_head(image, features), leaves
    if case == "head_after":
        return lambda: head(upsampler(image, features)), leaves
    logits = head(features).detach()
    return lambda: upsampler(image, features, values=logits), leaves


@dataclass(frozen=True)
class _Alone:
    """An operation with its inputs: `run(backend)`, what it says of its backends, some rows by the definition."""

    run: Callable[[str], Tensor]
    explain: Callable[[], Explanation]
    leaves: list[Tensor]
    sample: Callable[[], tuple[slice, Tensor]] | None = None


def _operation(operation: str, sizes: Sizes) -> _Alone:
    upsampler = model(sizes.dtype, sizes.device)
    workload = sizes.workload
    generator = torch.Generator().manual_seed(0)
    batch, size, grid = workload.batch, workload.size, workload.grid
    dim, heads = upsampler.config["qk_dim"], upsampler.config["num_heads"]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(sizes.device, DTYPES[sizes.dtype])

    if operation.startswith("window_attention"):
        channels = CLASSES if operation.endswith("of_classes") else workload.channels
        query, key = noise(batch, *size, heads, dim // heads), noise(batch, *grid, heads, dim // heads)
        value, window = noise(batch, *grid, channels), upsampler.window

        def attend(backend: str) -> Tensor:
            most = REFERENCE_CHUNK if backend == "reference" else None
            return window_attention(query, key, value, window=window, backend=backend, max_queries=most)

        def some_rows() -> tuple[slice, Tensor]:
            rows = slice(size[0] // 2, size[0] // 2 + 2)
            strip, part = query[:, rows], Part(rows.start, 0, *size)
            return rows, window_attention(strip, key, value, window=window, backend="reference", part=part)

        return _Alone(
            attend, lambda: explain_attention(query, key, value, window=window), [query, key, value], some_rows
        )
    if operation == "feature_unification":
        features = F.normalize(noise(batch, workload.channels, *grid), dim=1)
        basis = dict(upsampler.named_parameters())["key_features_encoder.0.basis"].detach()
        return _Alone(
            lambda backend: unify_features(features, basis, backend=backend),
            lambda: explain_unification(features, basis),
            [features, basis],
        )
    if operation == "query_projection":
        encoded = noise(batch, *size, dim)
        projection = _detached(upsampler.cross_decode.query_parameters(encoded.dtype))
        return _Alone(
            lambda backend: project_queries(encoded, projection, backend=backend),
            lambda: explain_projection(encoded, projection),
            [encoded, *projection],
        )
    encoder: Encoder = getattr(upsampler, operation)
    width = upsampler.config["input_dim"] if operation == "image_encoder" else dim
    pixels, parameters = encoder.prepare(noise(batch, *size, width).permute(0, 3, 1, 2))
    pixels, parameters = pixels.detach(), _detached(parameters)
    frequencies = upsampler.rope.freqs.detach() if operation == "image_encoder" else None
    more: dict[str, Any] = {
        "frequencies": frequencies,
        "output_size": grid if operation == "key_encoder" else size,
    }
    blocks = [*parameters.block1, *parameters.block2]
    leaves = [t for t in (pixels, parameters.projection, *blocks, frequencies) if t is not None]
    return _Alone(
        lambda backend: encode_pixels(pixels, parameters, backend=backend, **more),
        lambda: explain_encoder(pixels, parameters, **more),
        leaves,
    )


def _detached(parameters: Any) -> Any:
    """A named tuple of tensors, of which some are named tuples and some absent, outside any graph."""
    return type(parameters)(
        *(t if t is None else t.detach() if isinstance(t, Tensor) else _detached(t) for t in parameters)
    )
