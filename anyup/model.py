"""AnyUp: low-resolution features of any encoder, brought to the resolution of an image.

The AnyUp paper (arXiv 2510.12764): each output pixel attends to the features in a window around it, with queries
from the image and keys from the image and the features. What is heavy runs in `anyup.ops`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.budget import check_room, is_plain
from anyup.caller_warning import warn
from anyup.cross_attention import CrossAttentionBlock
from anyup.image_context import ImageContext, check_grids, weights_of
from anyup.layers import Encoder, LearnedFeatureUnification, ResBlock, RoPE, encoded_size
from anyup.namesakes import refuse_a_namesake
from anyup.ops import feature_unification, memory, pixel_encoder, query_projection
from anyup.ops.dispatch import BACKEND_NAMES, Backend, Explanation, parse_backend
from anyup.ops.parallel import on_threads_for
from anyup.ops.precision import autocasts, key_dtype, without_autocast, working_dtype
from anyup.ops.window_attention import explain_backends as explain_window_attention
from anyup.problem import OutputSize, check_image, check_inputs, integer
from anyup.repetition import encoding_seen_before, seen_before
from anyup.window import WINDOW_KINDS, CellWindow, RatioWindow, check_ratio

if TYPE_CHECKING:
    from anyup.capture import CapturedCall
    from anyup.streaming import Stream

OPERATIONS = ("pixel_encoder", "feature_unification", "query_projection", "window_attention")

ModelBackend = Backend | Mapping[str, Backend]


class AnyUp(nn.Module):
    """The upsampler, with the published constructor, parameter names and call.

    Args:
        input_dim: channels of the image.
        qk_dim: width D of queries and keys, a multiple of 8 and of `num_heads`.
        kernel_size: of the image encoder's first convolution; an even one makes the encoded image one larger.
        kernel_size_lfu: of the feature unification's filters, odd.
        window_ratio: half the window's size as a fraction of the grid; 0 or less means every key.
        num_heads: attention heads, averaged.
        init_gaussian_derivatives: start the unification's filters from Gaussian derivatives, not from noise.
        use_natten: the published name of `window="cell"`; NATTEN is not needed.
        lfu_dim: number of the unification's filters, a multiple of 8; None means `qk_dim`.
        backend: which implementation runs the heavy operations. None: the best that can. A name ("torch",
            "reference", ...): binds the window attention and is a preference for the other operations. A mapping
            from operations (see `OPERATIONS`) to names: binds each.
        window: "ratio" (the published default), or "cell"; None means "ratio".

    Any other keyword is ignored with a warning, as the published class ignores it without one.
    """

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
        """The window's ratio; it is changed at `cross_decode.window_ratio`, as in the published class."""
        return self.cross_decode.window_ratio

    @window_ratio.setter
    def window_ratio(self, ratio: float) -> None:
        # The published class keeps a copy here that changes nothing.
        raise AttributeError(
            f"window_ratio: expected to be set at `upsampler.cross_decode.window_ratio`, got {ratio!r} here"
        )

    @property
    def qk_dim(self) -> int:
        """Width D of queries and keys."""
        return int(self._widths["qk_dim"])

    @property
    def lfu_dim(self) -> int:
        """Number of the unification's filters."""
        return int(self._widths["lfu_dim"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `pickle` kept, of an earlier version too, whose window was the model's."""
        super().__setstate__(state)
        if "config" in self.__dict__:
            self._widths = self.__dict__.pop("config")
            self.cross_decode.window = self.__dict__.pop("window")
            for name in ("window_ratio", "num_heads", "window"):
                del self._widths[name]

    def forward(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
        *,
        values: Tensor | None = None,
        max_memory: int | str | None = None,
        out: Any = None,
    ) -> Tensor:
        """Bring features to the image's resolution.

        Args:
            image: (B, input_dim, Hi, Wi), ImageNet-normalised, any floating dtype; or what `encode_image` made of it.
            features: (B, C, h, w), any encoder's, any C, any floating dtype.
            output_size: (H, W), or a number for both; None, or a None among the two, means the image's size, or what
                its context was made for.
            vis_attn: show a picture of the attention as well (`anyup.visualization.show_attention`).
            q_chunk_size: the most output pixels the attention works on at a time, where a backend works in
                chunks; the result does not depend on it.
            values: (B, Cv, h, w) to carry with the same attention instead of the features: class logits, masks,
                depth. A pixel's weights sum to one, so a linear head with bias may as well be applied before.
            max_memory: bytes, or a text such as "2GB", that the call may allocate, its result included; it keeps
                less, and computes more again, as `plan` says. None: no limit on a CPU, 90 % of what is free on a GPU
                (none where a gradient is wanted, or while torch.compile traces).
            out: write the result into this, of its shape and any floating dtype, and return it: a tensor on any
                device, a NumPy array or memory map, a zarr array. No other map of the output is made, and `max_memory`
                does not count it.

        Returns:
            (B, C or Cv, H, W) in the dtype of the features (or values), channels last in memory; or `out`.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work. `max_memory`: the
                smallest that can. `output_size`: what such a result takes, where that is more than is free.
            RuntimeError: a gradient is wanted within `max_memory`, or with `out`.
            NotImplementedError: no requested backend can; lists every reason. Or a forward-mode derivative is wanted.
        """
        compiling, seen = torch.compiler.is_compiling(), None
        if not compiling and max_memory is None and out is None and not vis_attn:
            seen = seen_before(self, image, features, output_size, q_chunk_size, values)
            if seen is not None and (repeated := seen.repeat()) is not None:
                return repeated[0]
        size = self.check(image, features, output_size, q_chunk_size, values=values)
        q_chunk_size = integer(q_chunk_size)
        if compiling and max_memory is None and out is None:
            return self._upsample(image, features, size, vis_attn, q_chunk_size, values)
        from anyup import streaming

        return streaming.call(self, image, features, size, vis_attn, q_chunk_size, values, max_memory, out, seen)

    def _upsample(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        size: tuple[int, int],
        vis_attn: bool,
        q_chunk_size: int | None,
        values: Tensor | None,
    ) -> Tensor:
        """The call with whole maps of the whole batch."""
        if self.backend is not None and not torch.compiler.is_compiling():
            self.explain(image, features, size, values=values).require()
        with nullcontext() if torch.compiler.is_compiling() else memory.reuse():
            query, key = self._query_and_key(image, features, size)
        return self._attend(query, key, features if values is None else values, vis_attn, q_chunk_size)

    def upsample(
        self,
        enc_img: Tensor,
        feats: Tensor,
        out_size: OutputSize,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        """The call's second half, by the published name and arguments.

        It keeps whole maps; `encode_image` shares more of the work, and a call with its context keeps to a budget.

        Args:
            enc_img: (B, D, Hi, Wi), the image encoder's output after the rotation (`rope`).
            feats: (B, C, h, w).
            out_size, vis_attn, q_chunk_size: as in the call; None means the size of `enc_img`.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
        """
        device = self.rope.freqs.device
        size = check_inputs(
            enc_img, feats, None, out_size, q_chunk_size, input_dim=self.qk_dim, device=device, name="enc_img"
        )
        grid = (feats.shape[2], feats.shape[3])
        with nullcontext() if torch.compiler.is_compiling() else memory.reuse():
            queries, (image_keys,) = self._encode_image(enc_img, size, [grid], encoded=True)
            keys = self._keys(image_keys, feats).to(queries.dtype)
        return self._attend(queries, keys, feats, vis_attn, integer(q_chunk_size))

    def encode_image(
        self,
        image: Tensor,
        output_size: OutputSize = None,
        *,
        grids: Sequence[Sequence[int]] = (),
    ) -> ImageContext:
        """Do the image's half of the work once, for calls with several feature maps.

        Calls with the context instead of the image return exactly what they return with the image. For features on
        a grid that was not named, the image is encoded again in each call, its queries alone are shared. Gradients
        flow through a context as through a call. It is for this upsampler with these weights: a copy's call refuses it.

        Args:
            image: (B, input_dim, Hi, Wi), as in the call.
            output_size: (H, W) of the calls to come; None means the image's size.
            grids: (h, w) of the feature maps to come.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
        """
        device, input_dim = self.rope.freqs.device, self.config["input_dim"]
        size = check_image(image, output_size, input_dim=input_dim, device=device)
        names = check_grids(grids)
        compiling = torch.compiler.is_compiling()
        if not compiling and is_plain(image):
            shape = (image.shape[0], *size, self.qk_dim)
            needed = math.prod(shape) * self._compute_dtype(device).itemsize
            told = " x ".join(map(str, shape))
            check_room(needed, f"output_size: the queries, {told},", device, "`stream` keeps none")

        def encode() -> tuple[Tensor, ...]:
            queries, image_keys = self._encode_image(image, size, names)
            return queries, *image_keys

        seen = None if compiling else encoding_seen_before(self, image, size, names)
        with nullcontext() if compiling else memory.reuse(), nullcontext() if compiling else self._threads(image, size):
            # Three maps like the queries: the encoded image, and an encoder's own.
            queries, *image_keys = encode() if seen is None else seen.repeat() or seen.record(3 * needed, encode)
        # The caller may write the next frame into the image.
        return ImageContext(
            image.clone(), queries, dict(zip(names, image_keys, strict=True)), weights_of(self.parameters())
        )

    def stream(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        *,
        tile: int | Sequence[int] | None = None,
        max_memory: int | str | None = None,
        region: Sequence[int] | None = None,
        values: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Any = None,
    ) -> Stream:
        """Bring features to the image's resolution piece by piece, without a map of that resolution in memory.

        Exact: normalisations take the statistics of the whole image, windows and convolutions know no seams. What
        is not kept is computed again, which costs two to three times the arithmetic before the attention.

        Args:
            image, features, output_size, values: as in the call.
            tile: rows, or (rows, columns), of a piece; None: full rows, as many as are worked on at a time.
            max_memory: bytes, or a text such as "2GB", that the stream may allocate, two pieces included (the one that
                the caller holds, and the next); what has room is kept instead of being computed again. None: 90 % of
                what is free on a GPU, and nothing that is kept on a CPU.
            region: (top, left, height, width): compute this part of the output alone, at the cost of the part plus
                the statistics. None: all of it.
            dtype: of the pieces; None means that of `out`, else of the features (or values).
            out: write the pieces into this as well, of the shape (B, C or Cv, H, W) of the output or the region, as in
                the call. It is complete when the stream ends.

        Returns:
            An iterator over (rows, columns, piece), two slices of the output and (B, C or Cv, rows, columns), from
            left to right and from top to bottom. The work is done as they are taken. It has a length, and a `plan`.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
            RuntimeError: a gradient is wanted; call it under `torch.no_grad()`.
            NotImplementedError: no requested backend can; lists every reason.
        """
        from anyup.streaming import stream

        return stream(
            self, image, features, output_size,
            tile=tile, max_memory=max_memory, region=region, values=values, dtype=dtype, out=out,
        )  # fmt: skip

    def at_points(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        points: Tensor,
        output_size: OutputSize = None,
        *,
        values: Tensor | None = None,
        max_memory: int | str | None = None,
    ) -> Tensor:
        """The upsampled features at some points: the values of the whole output there, without making it.

        The statistics of the normalisations are still those of the whole image, which is most of the work. Gradients
        flow to the features and the values; while the image or a weight wants one too, the queries of all pixels are
        kept as in a call, so freeze the upsampler (`requires_grad_(False)`) where it is not trained.

        Args:
            image, features, output_size, values: as in the call.
            points: (B, N, 2), rows and columns of the output, on any device (they are read on the CPU). Integers are
                pixels. Floating-point numbers, 0 the first pixel's centre and H - 1 the last one's, are interpolated
                bilinearly between four pixels, as `torch.nn.functional.grid_sample` would do it on the whole output.
            max_memory: as for `stream`.

        Returns:
            (B, N, C or Cv), in the dtype of the features (or values).

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
            RuntimeError: `max_memory` where the image or a weight wants a gradient.
            NotImplementedError: no requested backend can; lists every reason.
        """
        from anyup.points import at_points

        return at_points(self, image, features, points, output_size, values=values, max_memory=max_memory)

    @classmethod
    def from_pretrained(
        cls,
        repository_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        backend: ModelBackend = None,
        revision: str | None = None,
        **arguments: Any,
    ) -> AnyUp:
        """The upsampler of a folder that `save_pretrained` wrote, or of a repository of Hugging Face's hub.

        Args:
            repository_or_folder: a folder, or "owner/name".
            device, backend: as of `anyup.load`.
            revision: branch, tag or commit of the repository.
            **arguments: of the constructor, see `anyup.load`; and of `huggingface_hub.hf_hub_download`, such as
                `token`, `cache_dir` and `local_files_only`.

        Raises as `anyup.load`.
        """
        from anyup import checkpoints

        return checkpoints.load_pretrained(repository_or_folder, device, backend, revision, arguments)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder, as Hugging Face's mixin for torch modules does."""
        from anyup import checkpoints

        checkpoints.save_pretrained(self, folder)

    def push_to_hub(
        self,
        repository: str,
        *,
        commit_message: str = "Push AnyUp",
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of Hugging Face's hub; the commit's address."""
        from anyup import hugging_face

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hugging_face.upload(folder, repository, message=commit_message, private=private, token=token)

    def warm_up(
        self,
        image_size: Sequence[int],
        feature_size: Sequence[int],
        channels: int,
        *,
        output_size: OutputSize = None,
        values: int | None = None,
        batch: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Do before the first request what the first calls of a size do: compile kernels, and decide how they run.

        On a GPU the kernels compile side by side, on up to eight of the processor's cores. Call it under
        `torch.inference_mode()` and autocast as the requests will be.

        Args:
            image_size, feature_size: (height, width).
            channels: of the features.
            output_size: (H, W); None means the image's size.
            values: channels of `values=`, where that is used.
            batch: images.
            dtype: of the images and features; None means the upsampler's.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came.
            NotImplementedError: no requested backend can; lists every reason.
        """
        from anyup.warming import warm_up

        warm_up(
            self, image_size, feature_size, channels,
            output_size=output_size, values=values, batch=batch, dtype=dtype,
        )  # fmt: skip

    def capture(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        *,
        values: Tensor | None = None,
    ) -> CapturedCall:
        """Capture a call as a CUDA graph, for calls of these shapes and dtypes that cost the host one launch.

            upsample = upsampler.capture(image, features)
            out = upsample(next_image, next_features)

        Each call copies its tensors into the graph's (copies on the GPU), replays it and returns its result, the same
        tensor each time: the next call writes it again, `clone()` what is to stay. A context of `encode_image` stands
        for the image in the capture and in the calls, another one each time (video: one image's queries for several
        feature maps, or one after the other). Autocast and the precision of products stay as they were; weights are
        read where they are at each call. One thread may call it at a time.

        Args:
            image, features, output_size, values: as in the call.

        Returns:
            A callable `(image, features, values=None)`; its `nbytes` of GPU memory are kept as long as it lives.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came. Or whole maps do not fit.
            RuntimeError: on another device than a GPU; or a gradient is wanted, call it under `torch.no_grad()`.
            NotImplementedError: no requested backend can, or what runs cannot be captured.
        """
        from anyup.capture import capture

        return capture(self, image, features, output_size, values)

    def check(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        q_chunk_size: int | None = None,
        *,
        values: Tensor | None = None,
    ) -> tuple[int, int]:
        """The size of the output of this call; raises the ValueError or TypeError that the call would raise."""
        device, input_dim = self.rope.freqs.device, self.config["input_dim"]
        if isinstance(image, ImageContext):
            # A tracer cannot ask whether a tensor is one of inference mode, which has no version.
            weights = None if torch.compiler.is_compiling() else weights_of(self.parameters())
            image.check(output_size, self._compute_dtype(device), device, weights)
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
        dtype = self._compute_dtype(image.device)
        batch, _, h, w = features.shape
        carried = features if values is None else values

        def stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            """A tensor that has every property a backend asks about, but no memory."""
            tensor = torch.empty((), dtype=dtype, device=image.device).expand(shape)
            return tensor.requires_grad_() if torch.is_grad_enabled() and self.rope.freqs.requires_grad else tensor

        dim, heads = self.qk_dim, self.cross_decode.num_heads
        size = encoded_size((image.shape[2], image.shape[3]), self.config["kernel_size"])
        encoded = stand_in((batch, *size, dim), dtype)
        wide = working_dtype(dtype)
        return ModelExplanation(
            (
                pixel_encoder.explain_backends(
                    encoded,
                    self.query_encoder.prepare(encoded.permute(0, 3, 1, 2))[1],
                    output_size=(height, width),
                    backend=self._backends["pixel_encoder"],
                ),
                feature_unification.explain_backends(
                    stand_in(tuple(features.shape), wide),
                    self._basis(wide),
                    backend=self._backends["feature_unification"],
                ),
                query_projection.explain_backends(
                    stand_in((batch, height, width, dim), dtype),
                    self.cross_decode.query_parameters(dtype),
                    backend=self._backends["query_projection"],
                ),
                explain_window_attention(
                    stand_in((batch, height, width, heads, dim // heads), dtype),
                    stand_in((batch, h, w, heads, dim // heads), dtype),
                    carried.permute(0, 2, 3, 1),
                    window=self.window,
                    backend=self._backends["window_attention"],
                ),
            )
        )

    def _query_and_key(
        self, image: Tensor | ImageContext, features: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, H, W, heads, head_dim) and keys (B, h, w, heads, head_dim)."""
        grid = (features.shape[2], features.shape[3])
        if not isinstance(image, ImageContext):
            queries, (image_keys,) = self._encode_image(image, size, [grid])
        else:
            queries = image.queries
            if grid in image.image_keys:
                image_keys = image.image_keys[grid]
            else:
                image_keys = self._encode(self.key_encoder, self._guidance(image.image), grid)
        return queries, self._keys(image_keys, features).to(queries.dtype)

    def _encode_image(
        self, image: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]], *, encoded: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries (B, H, W, heads, head_dim) of the image, and its keys (B, h, w, D) pooled to each grid.

        With `encoded` the image is one that went through the image encoder and the rotation before.
        """
        guidance = image.to(self._compute_dtype(image.device)) if encoded else self._guidance(image)
        image_keys = []
        for grid in grids:  # in a comprehension the map would be a closure's, which torch.compile cannot delete
            image_keys.append(self._encode(self.key_encoder, guidance, grid))
        queries = self._encode(self.query_encoder, guidance, size)
        del guidance  # a map of D channels at full resolution
        queries = query_projection.project_queries(
            queries, self.cross_decode.query_parameters(queries.dtype), backend=self._backends["query_projection"]
        )
        return self.cross_decode.split_heads(queries), image_keys

    def _guidance(self, image: Tensor) -> Tensor:
        """The encoded image, from which queries and keys are made: D channels (B, D, ...) of `encoded_size`."""
        dtype = self._compute_dtype(image.device)
        encoded: Tensor = self.image_encoder(
            image.to(dtype), frequencies=self.rope.freqs.to(dtype), backend=self._backends["pixel_encoder"]
        )
        return encoded

    def _keys(self, image_keys: Tensor, features: Tensor) -> Tensor:
        """(B, h, w, D) of the image and the features (B, C, h, w) to keys (B, h, w, heads, head_dim).

        In float32 at least, on a CPU in float64, but for most of the unification: the grid is small, and the unified
        features' variance, small beside their mean, would be lost in half precision, and much of it in float32.
        """
        working = working_dtype(image_keys.dtype)
        wide = key_dtype(image_keys.dtype, features.device)
        with without_autocast(features.device.type):
            features = F.normalize(features.to(working), dim=1)
            unified = feature_unification.unify_features(
                features, self._basis(working), out_dtype=wide, backend=self._backends["feature_unification"]
            )
            keys = torch.cat((image_keys.to(wide), self._feature_keys(unified)), dim=3)
            return self.cross_decode.project_keys(self._encode(self.aggregation, keys.permute(0, 3, 1, 2)))

    def _feature_keys(self, unified: Tensor) -> Tensor:
        """(B, h, w, D) of the unified features (B, M, h, w)."""
        _, block1, block2 = self.key_features_encoder
        assert isinstance(block1, ResBlock) and isinstance(block2, ResBlock)
        if not block1.keeps_width:
            narrow: Tensor = block2(block1(unified))
            return narrow.permute(0, 2, 3, 1)
        pixels = unified.permute(0, 2, 3, 1)
        blocks = pixel_encoder.EncoderParameters(None, block1.parameters_for_op(), block2.parameters_for_op())
        return pixel_encoder.encode_pixels(pixels, blocks.to(pixels.dtype), backend=self._backends["pixel_encoder"])

    def _basis(self, dtype: torch.dtype) -> Tensor:
        unification = self.key_features_encoder[0]
        assert isinstance(unification, LearnedFeatureUnification)
        return unification.basis.to(dtype)

    def _encode(
        self,
        encoder: Encoder,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, in, H, W) -> (B, h, w, D)."""
        encoded: Tensor = encoder(x, output_size, backend=self._backends["pixel_encoder"])
        return encoded.permute(0, 2, 3, 1)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, vis_attn: bool, q_chunk_size: int | None
    ) -> Tensor:
        backend = self._backends["window_attention"]
        if vis_attn:
            self.cross_decode.show_attention(queries, keys, q_chunk_size, backend)
        return self.cross_decode.attend(queries, keys, values, q_chunk_size, backend)

    def _threads(
        self, image: Tensor | ImageContext, size: tuple[int, int], features: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """As many as the largest map of a call takes."""
        image = image.image if isinstance(image, ImageContext) else image
        pixels = image.shape[0] * max(math.prod(image.shape[2:]), math.prod(size))
        largest = max(pixels * self.qk_dim, 0 if features is None else features.numel())
        return on_threads_for(largest, image.device)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """What queries and keys are computed in: autocast's dtype where it is on, else the parameters'."""
        if autocasts(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.rope.freqs.dtype


@dataclass(frozen=True)
class ModelExplanation:
    """What would run each operation of a call, and why not the other backends; `print` it."""

    explanations: tuple[Explanation, ...]

    @property
    def chosen(self) -> dict[str, str | None]:
        """The backend of each operation, None where none can."""
        return {e.operation: e.chosen for e in self.explanations}

    def require(self) -> None:
        """Raise NotImplementedError, with every reason, if some operation has no backend."""
        impossible = [str(e) for e in self.explanations if e.chosen is None]
        if impossible:
            raise NotImplementedError("no backend can run this:\n" + "\n".join(impossible))

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.explanations)


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
    """The request for each operation that a model's `backend` makes; raises ValueError for unknown names."""
    if isinstance(backend, Mapping):
        unknown = set(backend) - set(OPERATIONS)
        if unknown:
            raise ValueError(f"backend: expected operations among {', '.join(OPERATIONS)}, got {sorted(unknown)}")
        requests = {name: backend.get(name) for name in OPERATIONS}
    else:
        names = parse_backend(backend)
        rest = tuple(name for name in BACKEND_NAMES if name not in names)
        requests = dict.fromkeys(OPERATIONS, (*names, *rest) if names else None)
        requests["window_attention"] = names or None
    for request in requests.values():
        parse_backend(request)
    return requests
