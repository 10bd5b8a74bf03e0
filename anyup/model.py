"""AnyUp: low-resolution features of any encoder, brought to the resolution of an image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.argument_checks import OutputSize, check_image, check_inputs, integer
from anyup.budget import check_room, is_plain
from anyup.image_context import ImageContext, check_grids, weights_of
from anyup.limited_memory.request import Request
from anyup.network import OPERATIONS as OPERATIONS
from anyup.network import ModelBackend as ModelBackend
from anyup.network import ModelExplanation as ModelExplanation
from anyup.network import Network
from anyup.ops import memory
from anyup.repetition import encoding_seen_before, seen_before

if TYPE_CHECKING:
    from anyup.capture import CapturedCall
    from anyup.limited_memory.stream import Stream


class AnyUp(Network):
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

    def forward(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
        *,
        values: Tensor | None = None,
        max_memory: float | str | None = None,
        out: Any = None,
    ) -> Tensor:
        """Bring features to the image's resolution.

        Args:
            image: (B, input_dim, Hi, Wi), ImageNet-normalised, any floating dtype; or what `encode_image` made of it.
            features: (B, C, h, w), any encoder's, any C, any floating dtype.
            output_size: (H, W), or a number for both; None, for both or for one of them, means the image's size. With a
                context, None means the size that the context was made for.
            vis_attn: also show a picture of the attention (`anyup.visualization.show_attention`).
            q_chunk_size: the most output pixels the attention works on at a time, where a backend works in
                chunks; the result does not depend on it.
            values: (B, Cv, h, w), maps that are upsampled instead of the features, with the same attention weights:
                class logits, masks, depth. The weights of a pixel sum to one, so a linear head with bias gives the same
                result before the upsampling as after it.
            max_memory: bytes, or a text such as "2GB", that the call may allocate, its result included. The call
                then stores fewer maps and recomputes more, as `plan` says. None: no limit on a CPU, 90 % of the free
                memory on a GPU (no limit where a gradient is wanted, or while torch.compile traces).
            out: an array of the result's shape and any floating dtype, which the call writes the result into and
                returns: a tensor on any device, a NumPy array or memory map, or a zarr array. `max_memory` does not
                count it, and the call allocates no other map of the output.

        Returns:
            (B, C or Cv, H, W) in the dtype of the features (or values), channels last in memory; or `out`.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work. For `max_memory` the
                error names the smallest budget that suffices, for `output_size` the memory that the result needs.
            RuntimeError: `max_memory` or `out` is given, and a gradient is wanted.
            NotImplementedError: no requested backend can run the call (it lists every reason), or a forward-mode
                derivative is wanted.
        """
        compiling, seen = torch.compiler.is_compiling(), None
        if compiling and max_memory is None and out is None:
            size = self.check(image, features, output_size, q_chunk_size, values=values)
            return self.upsample_whole(
                image, features, size, values=values, vis_attn=vis_attn, q_chunk_size=integer(q_chunk_size)
            )
        if not compiling and max_memory is None and out is None and not vis_attn and type(self) is AnyUp:
            seen = seen_before(self, image, features, output_size, q_chunk_size, values)
            if seen is not None and (repeated := seen.repeat()) is not None:
                return repeated[0]
        from anyup.limited_memory.call import call

        request = Request.of(self, image, features, output_size, values=values, q_chunk_size=q_chunk_size)
        return call(request, vis_attn=vis_attn, max_memory=max_memory, out=out, seen=seen)

    def upsample(
        self,
        enc_img: Tensor,
        feats: Tensor,
        out_size: OutputSize,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        """The call's second half, by the published name and arguments.

        It stores whole maps. `encode_image` shares more of the work, and a call with its context can keep to a budget.

        Args:
            enc_img: (B, D, Hi, Wi), the image encoder's output after the rotation (`rope`).
            feats: (B, C, h, w).
            out_size: as in the call; None means the size of `enc_img`.
            vis_attn: as in the call.
            q_chunk_size: as in the call.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
        """
        device = self.rope.freqs.device
        size = check_inputs(
            enc_img, feats, None, out_size, q_chunk_size, input_dim=self.qk_dim, device=device, name="enc_img"
        )
        grid = (feats.shape[2], feats.shape[3])
        with memory.reuse():
            queries, (image_keys,) = self.queries_and_image_keys(enc_img, size, [grid], encoded=True)
            keys, copied = self.keys(image_keys, feats)
        return self.attend(queries, keys.to(queries.dtype), copied, vis_attn, integer(q_chunk_size))

    def encode_image(
        self,
        image: Tensor,
        output_size: OutputSize = None,
        *,
        grids: Sequence[Sequence[int]] = (),
    ) -> ImageContext:
        """Do the image's half of the work once, for calls with several feature maps.

        A call with the context returns exactly what the call with the image returns. For features on a grid that is
        not in `grids`, each call encodes the image once more and shares only the queries. Gradients flow through a
        context as through a call. A context belongs to this upsampler with its present weights: any other refuses it.

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
            needed = math.prod(shape) * self.compute_dtype(device).itemsize
            shown = " x ".join(map(str, shape))
            check_room(needed, f"output_size: the queries, {shown},", device, "`stream` keeps none")

        def encode() -> tuple[Tensor, ...]:
            queries, image_keys = self.queries_and_image_keys(image, size, names)
            return queries, *image_keys

        repeats = not compiling and type(self) is AnyUp
        seen = encoding_seen_before(self, image, size, names) if repeats else None
        with memory.reuse(), nullcontext() if compiling else self.threads_for(image, size):
            # The peak is three maps as large as the queries: the encoded image, and two of the encoder that runs.
            queries, *image_keys = encode() if seen is None else seen.repeat() or seen.record(3 * needed, encode)
        # A copy, because the caller may write the next frame into the image.
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
        max_memory: float | str | None = None,
        region: Sequence[int] | None = None,
        values: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Any = None,
    ) -> Stream:
        """Bring features to the image's resolution piece by piece, without a map of that resolution in memory.

        The result is exact: normalisations use the statistics of the whole image, and windows and convolutions reach
        across the borders of pieces. Maps that are not stored are recomputed: the steps before the attention take two
        to three times the arithmetic.

        Args:
            image: as in the call.
            features: as in the call.
            output_size: as in the call.
            values: as in the call.
            tile: rows, or (rows, columns), of a piece; None: as many full rows as are computed at a time.
            max_memory: bytes, or a text such as "2GB", that the stream may allocate, two pieces included (the one that
                the caller holds, and the next). Maps that fit are stored instead of recomputed. None: 90 % of the free
                memory on a GPU; on a CPU no map is stored.
            region: (top, left, height, width): compute only this rectangle of the output. It costs the rectangle's
                share of the work plus the statistics of the whole image. None: the whole output.
            dtype: of the pieces; None means that of `out`, else of the features (or values).
            out: an array as in the call, of the shape (B, C or Cv, H, W) of the output or the region, which the pieces
                are also written into. It is complete when the stream ends.

        Returns:
            An iterator over (rows, columns, piece), two slices of the output and (B, C or Cv, rows, columns), from
            left to right and from top to bottom. A piece is computed when it is taken. It has a length, and a `plan`.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
            RuntimeError: a gradient is wanted; call it under `torch.no_grad()`.
            NotImplementedError: no requested backend can; lists every reason.
        """
        from anyup.limited_memory.stream import stream

        request = Request.of(self, image, features, output_size, values=values)
        return stream(request, tile=tile, max_memory=max_memory, region=region, dtype=dtype, out=out)

    def frames(
        self,
        frames: Iterable[Sequence[Tensor | ImageContext]],
        output_size: OutputSize = None,
        *,
        max_memory: float | str | None = None,
    ) -> Iterator[Tensor]:
        """Bring one frame after the other to its image's resolution: the results of calls, for less time and memory.

            for upsampled in upsampler.frames((image, encoder(image)) for image in images):
                ...

        Frames of one size and dtype share memory. On a CPU they share the maps in between. On a GPU the second frame is
        captured in a CUDA graph (see `capture`) that later frames replay, if whole maps fit and no gradient is wanted.

        Args:
            frames: an iterable of (image, features) or (image, features, values), as in the call. The next frame is
                taken from it when its result is asked for.
            output_size: as in the call.
            max_memory: as in the call.

        Returns:
            An iterator over what the calls return: (B, C or Cv, H, W), each a tensor of its own.

        Raises:
            TypeError: `frames` is not iterable. The iterator raises what a call raises, and ValueError or TypeError for
                a frame of another form.
        """
        from anyup.frames import upsampled_frames

        return upsampled_frames(self, frames, output_size, max_memory, repeats=type(self) is AnyUp)

    def at_points(
        self,
        image: Tensor | ImageContext,
        features: Tensor,
        points: Tensor,
        output_size: OutputSize = None,
        *,
        values: Tensor | None = None,
        max_memory: float | str | None = None,
    ) -> Tensor:
        """The upsampled features at some points: the whole output's values there, without computing the whole output.

        The normalisations need the statistics of the whole image, which are most of the work. Gradients flow to the
        features and the values. If the image or a weight wants a gradient too, the queries of all pixels are stored as
        in a call; so freeze an upsampler that is not trained (`requires_grad_(False)`).

        Args:
            image: as in the call.
            features: as in the call.
            output_size: as in the call.
            values: as in the call.
            points: (B, N, 2), rows and columns of the output, on any device (they are read on the CPU). Integers are
                pixels. Floating-point numbers, 0 the first pixel's centre and H - 1 the last one's, are interpolated
                bilinearly between four pixels, as `torch.nn.functional.grid_sample` would do it on the whole output.
            max_memory: as for `stream`.

        Returns:
            (B, N, C or Cv), in the dtype of the features (or values).

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; before any work.
            RuntimeError: `max_memory` is given, and the image or a weight wants a gradient.
            NotImplementedError: no requested backend can; lists every reason.
        """
        from anyup.limited_memory.points import at_points

        request = Request.of(self, image, features, output_size, values=values)
        return at_points(request, points, max_memory=max_memory)

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
            device: as of `anyup.load`.
            backend: as of `anyup.load`.
            revision: branch, tag or commit of the repository.
            **arguments: of the constructor, see `anyup.load`; and of `huggingface_hub.hf_hub_download`, such as
                `token`, `cache_dir` and `local_files_only`.

        Raises as `anyup.load`.
        """
        from anyup import stored_weights

        return stored_weights.load_pretrained(AnyUp, repository_or_folder, device, backend, revision, arguments)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder, as Hugging Face's mixin for torch modules does."""
        from anyup import stored_weights

        stored_weights.save_pretrained(self, folder)

    def push_to_hub(
        self,
        repository: str,
        *,
        commit_message: str = "Push AnyUp",
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of Hugging Face's hub; return the commit's URL."""
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
        """Do in advance what the first calls of a size do: compile kernels, and record the call for repetition.

        On a GPU the kernels compile side by side, on up to eight of the processor's cores. Call it under
        `torch.inference_mode()` and autocast as the requests will be.

        Args:
            image_size: (height, width).
            feature_size: (height, width).
            channels: of the features.
            output_size: (H, W); None means the image's size.
            values: channels of `values=`; None: the requests use no `values=`.
            batch: number of images.
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

        Each call copies its tensors into the graph's tensors on the GPU, replays the graph and returns its result. The
        result is the same tensor each time, and the next call overwrites it: `clone()` it to keep it. A context of
        `encode_image` may take the image's place, in the capture and then in every call; each call may take another
        context. Autocast and the precision of products are those of the capture. Each call reads the weights at their
        addresses, so it uses their new values. Only one thread may call it at a time.

        Args:
            image: as in the call.
            features: as in the call.
            output_size: as in the call.
            values: as in the call.

        Returns:
            A callable `(image, features, values=None)`. It holds `nbytes` of GPU memory as long as it lives.

        Raises:
            ValueError, TypeError: which argument, what was expected, what came; or whole maps do not fit (ValueError).
            RuntimeError: the upsampler is not on a GPU, or a gradient is wanted (call it under `torch.no_grad()`).
            NotImplementedError: no requested backend can run the call, or it cannot be captured.
        """
        from anyup.capture import capture

        return capture(self, image, features, output_size, values)
