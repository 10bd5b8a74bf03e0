"""AnyUp's network: its parameters under their published names, and the stages of its forward over whole maps.

The AnyUp paper (arXiv 2510.12764): each output pixel attends to the features in a window around it, with queries
from the image and keys from the image and the features. The heavy operations run in `anyup.ops`. `anyup.limited_memory`
decides how much memory a call takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.argument_checks import OutputSize, check_inputs
from anyup.caller_warning import warn
from anyup.cross_attention import CrossAttentionBlock
from anyup.image_context import ImageContext, weights_of
from anyup.layers import Encoder, LearnedFeatureUnification, ResBlock, RoPE, calls_are_unseen, encoded_size
from anyup.namesakes import refuse_a_namesake
from anyup.ops import feature_unification, key_grid, memory, pixel_encoder, query_projection
from anyup.ops.dispatch import Backend, Explanation, parse_backend, preferring, wants_gradient
from anyup.ops.key_grid import KeyGridProblem, KeyParameters
from anyup.ops.parallel import on_threads_for
from anyup.ops.pixel_encoder import EncoderParameters
from anyup.ops.precision import autocasts, key_dtype, without_autocast, working_dtype
from anyup.ops.window_attention import explain_backends as explain_window_attention
from anyup.window import WINDOW_KINDS, CellWindow, RatioWindow, check_ratio

OPERATIONS = ("pixel_encoder", "feature_unification", "query_projection", "window_attention")

ModelBackend = Backend | Mapping[str, Backend]


class Network(nn.Module):
    """The network of `AnyUp`, with the same constructor arguments; `upsample_whole` is the forward over whole maps."""

    def __init__(
        self,
        input_dim: int = 3,
        qk_dim: int = 128,
        kernel_size: int = 1,
        kernel_size_lfu: int = 5,
        window_ratio: float = 0.1,
        num_heads: int = 4,
        init_gaussian_derivatives: bool = False,
        use_natten: bool = False,
        lfu_dim: int | None = None,
        *,
        backend: ModelBackend = None,
        window: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if ignored:
            warn(f"AnyUp ignores unknown arguments: {', '.join(sorted(ignored))}")
        lfu_dim = qk_dim if lfu_dim is None else lfu_dim
        _check_widths(input_dim, qk_dim, kernel_size, kernel_size_lfu, num_heads, lfu_dim)
        if window not in (None, *WINDOW_KINDS):
            raise ValueError(f"window: expected one of {', '.join(WINDOW_KINDS)}, got {window!r}")
        if use_natten:
            if window not in (None, "cell"):
                raise ValueError(f"window: use_natten=True means window='cell', got {window!r} beside it")
            window = "cell"
        refuse_a_namesake()
        self._widths = {
            "input_dim": input_dim,
            "qk_dim": qk_dim,
            "kernel_size": kernel_size,
            "kernel_size_lfu": kernel_size_lfu,
            "init_gaussian_derivatives": init_gaussian_derivatives,
            "lfu_dim": lfu_dim,
        }
        self.backend = backend
        self._backends = _backends_by_operation(backend)

        self.image_encoder = Encoder(input_dim, qk_dim, kernel_size)
        self.key_encoder = Encoder(qk_dim, qk_dim)
        self.query_encoder = Encoder(qk_dim, qk_dim)
        self.key_features_encoder = nn.Sequential(
            LearnedFeatureUnification(lfu_dim, kernel_size_lfu, init_gaussian_derivatives),
            ResBlock(lfu_dim, qk_dim),
            ResBlock(qk_dim, qk_dim),
        )
        self.aggregation = Encoder(2 * qk_dim, qk_dim, kernel_size=3)
        kind = CellWindow if window == "cell" else RatioWindow
        self.cross_decode = CrossAttentionBlock(qk_dim, num_heads, kind(check_ratio(window_ratio)))
        self.rope = RoPE(qk_dim)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments for a model like this one."""
        block = self.cross_decode
        return {
            **self._widths,
            "window_ratio": block.window_ratio,
            "num_heads": block.num_heads,
            "window": block.window.kind,
        }

    @property
    def window(self) -> RatioWindow | CellWindow:
        """Which keys an output pixel attends to."""
        return self.cross_decode.window

    @property
    def window_ratio(self) -> float:
        """The window's ratio; to change it, set `cross_decode.window_ratio`, as in the published class."""
        return self.cross_decode.window_ratio

    @window_ratio.setter
    def window_ratio(self, ratio: float) -> None:
        # In the published class this attribute is a copy: to set it has no effect.
        raise AttributeError(
            f"window_ratio: expected to be set at `upsampler.cross_decode.window_ratio`, got {ratio!r} here"
        )

    @property
    def backends(self) -> Mapping[str, Backend]:
        """The requested backend of each operation (`OPERATIONS`)."""
        return self._backends

    @property
    def qk_dim(self) -> int:
        """Width D of queries and keys."""
        return int(self._widths["qk_dim"])

    @property
    def lfu_dim(self) -> int:
        """Number of the unification's filters."""
        return int(self._widths["lfu_dim"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled model; in earlier versions the model held the window, not `cross_decode`."""
        super().__setstate__(state)
        if "config" in self.__dict__:
            self._widths = self.__dict__.pop("config")
            self.cross_decode.window = self.__dict__.pop("window")
            for name in ("window_ratio", "num_heads", "window"):
                del self._widths[name]

    def check(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        q_chunk_size: int | None = None,
        *,
        values: Tensor | None = None,
    ) -> tuple[int, int]:
        """Check a call's arguments: return the output's (height, width), or raise ValueError or TypeError."""
        device, input_dim = self.rope.freqs.device, self.config["input_dim"]
        if isinstance(image, ImageContext):
            # `weights_of` asks whether a tensor was made in inference mode, which a tracer cannot.
            weights = None if torch.compiler.is_compiling() else weights_of(self.parameters())
            image.check(output_size, self.compute_dtype(device), device, weights)
            output_size = image.output_size
            image = image.image
        return check_inputs(image, features, values, output_size, q_chunk_size, input_dim=input_dim, device=device)

    def explain(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        *,
        values: Tensor | None = None,
    ) -> ModelExplanation:
        """Which backend would run each operation of this call, and why not the others; nothing is computed."""
        height, width = self.check(image, features, output_size, values=values)
        image = image.image if isinstance(image, ImageContext) else image
        dtype = self.compute_dtype(image.device)
        batch, _, h, w = features.shape
        values = features if values is None else values

        def stand_in(shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor = self.rope.freqs) -> Tensor:
            """A tensor with the properties that a backend asks about, and the memory of one number.

            It wants a gradient where the parameter does.
            """
            tensor = torch.empty((), dtype=dtype, device=image.device).expand(shape)
            return tensor.requires_grad_() if torch.is_grad_enabled() and parameter.requires_grad else tensor

        dim, heads = self.qk_dim, self.cross_decode.num_heads
        size = encoded_size((image.shape[2], image.shape[3]), self.config["kernel_size"])
        encoded = stand_in((batch, *size, dim), dtype)
        channels_first = encoded.permute(0, 3, 1, 2)
        wide, basis = working_dtype(dtype), self._basis
        return ModelExplanation(
            (
                pixel_encoder.explain_backends(
                    encoded,
                    self.query_encoder.prepare(channels_first)[1],
                    output_size=(height, width),
                    backend=self.backends["pixel_encoder"],
                ),
                pixel_encoder.PAIR.explain(
                    pixel_encoder.describe_pair(
                        encoded,
                        self.key_encoder.prepare(channels_first)[1],
                        self.query_encoder.prepare(channels_first)[1],
                        self.cross_decode.conv2d.weight,
                        sizes=[(h, w)],
                        output_size=(height, width),
                        backend=self.backends["pixel_encoder"],
                    )
                ),
                feature_unification.explain_backends(
                    stand_in(tuple(features.shape), wide),
                    stand_in(tuple(basis.shape), wide, basis),
                    backend=self.backends["feature_unification"],
                ),
                key_grid.OPERATION.explain(
                    self._key_problem(
                        stand_in((batch, h, w, dim), dtype),
                        features,
                        self._key_parameters(),
                        key_dtype(dtype, image.device),
                    )
                ),
                query_projection.explain_backends(
                    stand_in((batch, height, width, dim), dtype),
                    self.cross_decode.query_parameters(dtype),
                    backend=self.backends["query_projection"],
                ),
                explain_window_attention(
                    stand_in((batch, height, width, heads, dim // heads), dtype),
                    stand_in((batch, h, w, heads, dim // heads), dtype),
                    values.permute(0, 2, 3, 1),
                    window=self.window,
                    backend=self.backends["window_attention"],
                ),
            )
        )

    def upsample_whole(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        size: tuple[int, int],
        *,
        values: Tensor | None = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        """The result (B, C or Cv, H, W) for checked arguments, computed with whole maps of the whole batch."""
        if self.backend is not None and not torch.compiler.is_compiling():
            self.explain(image, features, size, values=values).require()
        with memory.reuse():
            query, key, copied = self.queries_and_keys(image, features, size)
        values = copied if values is None or values is features else values
        return self.attend(query, key, values, vis_attn, q_chunk_size)

    def wants_gradient(self, image: Tensor | ImageContext, *maps: Tensor) -> bool:
        """Whether autograd would record a call with these tensors."""
        images = (image.image, image.queries) if isinstance(image, ImageContext) else (image,)
        return wants_gradient(*images, *maps, *self.parameters())

    def queries_and_keys(
        self, image: Tensor | ImageContext, features: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, W, heads, head_dim), keys (B, h, w, heads, head_dim), and the features that `keys` returns."""
        grid = (features.shape[2], features.shape[3])
        if not isinstance(image, ImageContext):
            queries, (image_keys,) = self.queries_and_image_keys(image, size, [grid])
        else:
            queries = image.queries
            if grid in image.image_keys:
                image_keys = image.image_keys[grid]
            else:
                image_keys = self.encode(self.key_encoder, self.guidance(image.image), grid)
        keys, copied = self.keys(image_keys, features)
        return queries, keys.to(queries.dtype), copied

    def queries_and_image_keys(
        self, image: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]], *, encoded: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries (B, H, W, heads, head_dim) of the image, and its keys (B, h, w, D) pooled to each grid.

        With `encoded`, `image` is the encoded and rotated image (B, D, Hi, Wi).
        """
        guidance = image.to(self.compute_dtype(image.device)) if encoded else self.guidance(image)
        parameters = self.cross_decode.query_parameters(guidance.dtype)
        with _stage("key and query encoder"):
            made = self._encoded_by_a_pair(guidance, size, grids, parameters.convolution)
            if made is not None:
                image_keys, queries, convolution = made
                parameters = parameters._replace(convolution=convolution)
            else:
                image_keys = []
                with _stage("key encoder"):
                    for grid in grids:  # no comprehension: torch.compile cannot delete a variable of a closure
                        image_keys.append(self.encode(self.key_encoder, guidance, grid))
                with _stage("query encoder"):
                    queries = self.encode(self.query_encoder, guidance, size)
        del guidance  # a map of D channels at full resolution
        with _stage("query projection"):
            queries = query_projection.project_queries(queries, parameters, backend=self.backends["query_projection"])
        return self.cross_decode.split_heads(queries), image_keys

    def _encoded_by_a_pair(
        self, guidance: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]], convolution: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor] | None:
        """The image keys (B, h, w, D) of each grid and the map (B, H, W, D) of the queries, in the same launches.

        And the weight of the queries' convolution, laid out as its kernel reads it. By the operator
        `pixel_encoder_pair`; None where it cannot run, while traced, or where a hook sees an encoder's calls.
        """
        encoders = self.key_encoder, self.query_encoder
        if torch.compiler.is_compiling() or not all(calls_are_unseen(encoder) for encoder in encoders):
            return None
        (pixels, of_keys), (_, of_queries) = (encoder.prepare(guidance) for encoder in encoders)
        return pixel_encoder.encode_pair(
            pixels,
            of_keys,
            of_queries,
            convolution,
            sizes=grids,
            output_size=size,
            backend=self.backends["pixel_encoder"],
        )

    def guidance(self, image: Tensor) -> Tensor:
        """The encoded and rotated image (B, D, ...) of `encoded_size`: the input of the key and the query encoder."""
        dtype = self.compute_dtype(image.device)
        with _stage("image encoder"):
            encoded: Tensor = self.image_encoder(
                image.to(dtype), frequencies=self.rope.freqs.to(dtype), backend=self.backends["pixel_encoder"]
            )
        return encoded

    def keys(self, image_keys: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Image keys (B, h, w, D) and features (B, C, h, w) to keys (B, h, w, heads, head_dim), and the features.

        Keys are computed in float32 or wider, on a CPU in float64 (most of the unification excepted). The variance of
        the unified features is small beside their mean: half precision would lose it, and float32 much of it. The grid
        is small, so the wide dtype costs little. The second result is a copy of the features with channels last where
        the kernels make one, else the features themselves. Where the image keys are of more images than the features,
        those beyond have the features of the first ones.
        """
        with _stage("keys"):
            wide, more = key_dtype(image_keys.dtype, features.device), len(image_keys) - len(features)
            made = None if more else self.keys_by_kernels(image_keys, features, wide)
            if made is not None:
                return made
            working = working_dtype(image_keys.dtype)
            with without_autocast(features.device.type):
                unit = F.normalize(features.to(working), dim=1)
                unified = feature_unification.unify_features(
                    unit, self.unification_basis(working), out_dtype=wide, backend=self.backends["feature_unification"]
                )
                feature_keys = self.feature_keys(unified)
                if more:
                    feature_keys = torch.cat((feature_keys, feature_keys[:more]))
                keys = torch.cat((image_keys.to(wide), feature_keys), dim=3)
                return self.cross_decode.project_keys(self.encode(self.aggregation, keys.permute(0, 3, 1, 2))), features

    def keys_by_kernels(self, image_keys: Tensor, features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The result of `keys` by the operator `key_grid`, in `dtype`; None where it cannot run, or while traced."""
        if torch.compiler.is_compiling():
            return None
        parameters = self._key_parameters()
        problem = self._key_problem(image_keys, features, parameters, dtype)
        copies = not features.permute(0, 2, 3, 1).is_contiguous()
        made = key_grid.make_keys(image_keys, features, parameters, problem, copies=copies)
        if made is None:
            return None
        keys, copied = made
        return self.cross_decode.split_heads(keys), copied.permute(0, 3, 1, 2) if copies else features

    def _key_problem(
        self, image_keys: Tensor, features: Tensor, parameters: KeyParameters, dtype: torch.dtype
    ) -> KeyGridProblem:
        return key_grid.describe(
            features,
            parameters,
            dtype=dtype,
            needs_gradient=wants_gradient(image_keys, features, *parameters.flat()),
            unification_backend=self.backends["feature_unification"],
            blocks_backend=self.backends["pixel_encoder"],
        )

    def _key_parameters(self) -> KeyParameters:
        _, block1, block2 = self.key_features_encoder
        assert isinstance(block1, ResBlock) and isinstance(block2, ResBlock)
        return KeyParameters(
            self._basis,
            EncoderParameters(None, block1.parameters_for_op(), block2.parameters_for_op()),
            *self.aggregation.unprojected_parameters_for_op(),
            *self.cross_decode.key_parameters(),
        )

    def feature_keys(self, unified: Tensor) -> Tensor:
        """The features' keys (B, h, w, D) of unified features (B, M, h, w)."""
        _, block1, block2 = self.key_features_encoder
        assert isinstance(block1, ResBlock) and isinstance(block2, ResBlock)
        if not block1.keeps_width:
            narrow: Tensor = block2(block1(unified))
            return narrow.permute(0, 2, 3, 1)
        pixels = unified.permute(0, 2, 3, 1)
        blocks = EncoderParameters(None, block1.parameters_for_op(), block2.parameters_for_op())
        return pixel_encoder.encode_pixels(pixels, blocks.to(pixels.dtype), backend=self.backends["pixel_encoder"])

    def unification_basis(self, dtype: torch.dtype) -> Tensor:
        """The unification's filters (M, 1, s, s) in a dtype."""
        return self._basis.to(dtype)

    @property
    def _basis(self) -> Tensor:
        unification = self.key_features_encoder[0]
        assert isinstance(unification, LearnedFeatureUnification)
        return unification.basis

    def encode(
        self,
        encoder: Encoder,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run an encoder, pooled to `output_size`: (B, in, H, W) -> (B, h, w, D)."""
        encoded: Tensor = encoder(x, output_size, backend=self.backends["pixel_encoder"])
        return encoded.permute(0, 2, 3, 1)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, vis_attn: bool = False, q_chunk_size: int | None = None
    ) -> Tensor:
        """Queries (B, H, W, heads, head_dim), keys (B, h, w, heads, head_dim), values (B, C, h, w) -> (B, C, H, W)."""
        backend = self.backends["window_attention"]
        if vis_attn:
            self.cross_decode.show_attention(queries, keys, q_chunk_size, backend)
        with _stage("window attention"):
            return self.cross_decode.attend(queries, keys, values, q_chunk_size, backend)

    def threads_for(
        self, image: Tensor | ImageContext, size: tuple[int, int], features: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """A context with one thread where the largest map of a call is small, else with all of torch's threads."""
        image = image.image if isinstance(image, ImageContext) else image
        pixels = image.shape[0] * max(math.prod(image.shape[2:]), math.prod(size))
        largest = max(pixels * self.qk_dim, 0 if features is None else features.numel())
        return on_threads_for(largest, image.device)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of queries and keys: autocast's dtype where autocast is on, else the parameters' dtype."""
        if autocasts(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.rope.freqs.dtype


@dataclass(frozen=True)
class ModelExplanation:
    """The backend of each operation of a call, and why not the others; `print` it.

    Beside `OPERATIONS` it names `pixel_encoder_pair`, which runs the key and the query encoder together, and
    `key_grid`, which makes the keys in few launches; both have kernels alone.
    """

    explanations: tuple[Explanation, ...]

    @property
    def chosen(self) -> dict[str, str | None]:
        """The backend of each operation, None where none can (of the two others: where the steps run one by one)."""
        return {e.operation: e.chosen for e in self.explanations}

    def require(self) -> None:
        """Raise NotImplementedError, with every reason, if some operation has no backend and is needed."""
        impossible = [str(e) for e in self.explanations if e.chosen is None and e.otherwise is None]
        if impossible:
            raise NotImplementedError("no backend can run this:\n" + "\n".join(impossible))

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.explanations)


def _stage(name: str) -> AbstractContextManager[object]:
    """A range of this name in a profile that the caller makes (`torch.profiler`, `emit_nvtx`); else nothing."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.profiler.record_function(f"anyup: {name}")


def _check_widths(
    input_dim: int, qk_dim: int, kernel_size: int, kernel_size_lfu: int, num_heads: int, lfu_dim: int
) -> None:
    for name, number in (
        ("input_dim", input_dim),
        ("qk_dim", qk_dim),
        ("kernel_size", kernel_size),
        ("kernel_size_lfu", kernel_size_lfu),
        ("num_heads", num_heads),
        ("lfu_dim", lfu_dim),
    ):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected an integer, got {number!r}")
    for name, number in (("input_dim", input_dim), ("num_heads", num_heads)):
        if number < 1:
            raise ValueError(f"{name}: expected a positive integer, got {number}")
    for name, number in (("qk_dim", qk_dim), ("lfu_dim", lfu_dim)):
        if number < 8 or number % 8:
            raise ValueError(f"{name}: expected a positive multiple of 8 (the normalisations' groups), got {number}")
    if qk_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of qk_dim = {qk_dim}, got {num_heads}")
    if kernel_size < 1:
        raise ValueError(f"kernel_size: expected a positive integer, got {kernel_size}")
    if kernel_size_lfu < 1 or kernel_size_lfu % 2 == 0:
        raise ValueError(f"kernel_size_lfu: expected a positive odd integer, got {kernel_size_lfu}")


def _backends_by_operation(backend: ModelBackend) -> dict[str, Backend]:
    """The requested backend of each operation for a model's `backend=`; raises ValueError for unknown names."""
    if isinstance(backend, Mapping):
        unknown = set(backend) - set(OPERATIONS)
        if unknown:
            raise ValueError(f"backend: expected operations among {', '.join(OPERATIONS)}, got {sorted(unknown)}")
        requests = {name: backend.get(name) for name in OPERATIONS}
    else:
        requests = dict.fromkeys(OPERATIONS, preferring(backend))
        requests["window_attention"] = parse_backend(backend) or None
    for request in requests.values():
        parse_backend(request)
    return requests
