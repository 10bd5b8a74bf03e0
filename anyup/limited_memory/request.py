"""The checked arguments of a call."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyup.argument_checks import OutputSize, integer
from anyup.budget import is_plain
from anyup.image_context import ImageContext
from anyup.limited_memory.share import Share
from anyup.limited_memory.task import Size, Task, make_task
from anyup.network import ModelExplanation, Network
from anyup.untraced import untraced


@dataclass(frozen=True, eq=False)
class Request:
    """The checked arguments of a call, a stream or points.

    Attributes:
        network: the upsampler.
        image: (B, input_dim, Hi, Wi), or the context that `encode_image` made of it.
        features: (B, C, h, w).
        values: (B, Cv, h, w), the maps to upsample: the features, or the caller's `values=`.
        size: (H, W) of the output.
        q_chunk_size: the most output pixels that the attention computes at a time; None: the backend's choice.
        share: what this process has of the image, `image` being rows of it; None: all of it.
    """

    network: Network
    image: Tensor | ImageContext
    features: Tensor
    values: Tensor
    size: Size
    q_chunk_size: int | None = None
    share: Share | None = None

    @classmethod
    @untraced
    def of(
        cls,
        network: Network,
        image: Tensor | ImageContext,
        features: Tensor,
        output_size: OutputSize,
        *,
        values: Tensor | None,
        q_chunk_size: int | None = None,
    ) -> Request:
        """Check these arguments of a call; raises the ValueError or TypeError that the call raises."""
        size = network.check(image, features, output_size, q_chunk_size, values=values)
        return cls(network, image, features, features if values is None else values, size, integer(q_chunk_size))

    def __len__(self) -> int:
        """The number of images."""
        return len(self.features)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.features.device

    @property
    def grid(self) -> Size:
        """(h, w) of the features."""
        return self.features.shape[2], self.features.shape[3]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that the call reads, by the names of the arguments."""
        image = self.image.image if isinstance(self.image, ImageContext) else self.image
        return {"image": image, "features": self.features, "values": self.values}

    @property
    def wants_gradient(self) -> bool:
        """Whether autograd would record the call."""
        return self.network.wants_gradient(self.image, self.features, self.values)

    def threads(self) -> AbstractContextManager[None]:
        """As many threads as its largest map is worth."""
        return self.network.threads_for(self.image, self.size, self.features)

    def one(self, index: int) -> Request:
        """The request of one image of the batch; it shares the memory."""
        one = slice(index, index + 1)
        image = self.image.part(one) if isinstance(self.image, ImageContext) else self.image[one]
        return Request(self.network, image, self.features[one], self.values[one], self.size, self.q_chunk_size)

    def upsample_whole(self, vis_attn: bool = False) -> Tensor:
        """The result with whole maps of the whole batch: (B, Cv, H, W)."""
        return self.network.upsample_whole(
            self.image,
            self.features,
            self.size,
            values=self.values,
            vis_attn=vis_attn,
            q_chunk_size=self.q_chunk_size,
        )

    def explain(self) -> ModelExplanation:
        """Which backend runs each operation, with whole maps."""
        return self.network.explain(self.image, self.features, self.size, values=self.values)

    def task(self, *, region: tuple[int, int, int, int] | None = None, **settings: Any) -> Task:
        """The task of a call, or with a region of a stream, for a plan. `settings` are further fields of `Task`."""
        image, context = self.image, "nothing"
        if isinstance(image, ImageContext):
            context, image = "all" if self.grid in image.image_keys else "queries", image.image
        settings = {"out_dtype": self.values.dtype, **settings}
        height = image.shape[2]
        if self.share is not None:
            height, rows = self.share.image_height, self.share.rows
            settings["own_rows"] = max(rows.stop - rows.start, 1)
        return make_task(
            self.network.config,
            image=(height, image.shape[3]),
            output=self.size,
            grid=self.grid,
            batch=image.shape[0],
            channels=self.features.shape[1],
            value_channels=self.values.shape[1],
            dtype=self.network.compute_dtype(image.device),
            value_dtype=self.values.dtype,
            device_type=image.device.type,
            returned=region is None,
            region=region or (0, 0, *self.size),
            context=context,
            **settings,
        )

    def check_room(self, task: Task, *, whole: bool) -> None:
        """Raise ValueError where the result or the queries of the task do not fit the free memory of the device."""
        if is_plain(self.features):
            task.check_room(self.device, whole=whole)
