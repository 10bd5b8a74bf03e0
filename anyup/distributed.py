"""One image over several ranks of torch.distributed: each computes some rows of the output.

    torch.distributed.init_process_group()  # under torchrun
    with torch.inference_mode():
        part = anyup.distributed.upsample(upsampler, image, features, (16384, 16384))
    part.values  # (B, C, rows, W): the rows `part.rows` of the output

The passes are those of a call within a budget (`anyup.limited_memory`): each rank takes a part of the rows in bands,
and the ranks meet after each pass. They exchange

- at the start the image rows that a rank needs and does not have: its own, and those beside them that the convolutions
  reach;
- after each of the twelve passes two numbers for each group of channels, which every rank merges in the order of the
  ranks, so that all go on with the same bits;
- the rows of the pooled keys, once.

Features, keys and values are small beside the image's maps, and every rank has them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anyup.argument_checks import OutputSize, check_image, check_output_size
from anyup.budget import check_room, parse_memory
from anyup.fingerprint import module_fingerprint
from anyup.layers import encoded_size
from anyup.limited_memory.bands import reach
from anyup.limited_memory.request import Request
from anyup.limited_memory.stream import Stream
from anyup.limited_memory.stream import stream as stream_of
from anyup.network import Network
from anyup.ops.memory import empty
from anyup.ops.precision import check_dtype
from anyup.ranks import Ranks, RankShare, length_of, less, on_every_rank

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class Part:
    """A rank's part of an upsampled map.

    Attributes:
        rows: the rows of the output that the rank computed; none where there are fewer rows than ranks.
        values: (B, C or Cv, rows, W), channels last in memory.
        size: (H, W) of the whole output.
        group: the ranks' process group; None: the default one.
    """

    rows: slice
    values: Tensor
    size: tuple[int, int]
    group: dist.ProcessGroup | None

    def as_dtensor(self) -> DTensor:
        """The whole output (B, C or Cv, H, W) as a DTensor sharded over rows; nothing is copied or sent."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        batch, channels, (height, width) = *self.values.shape[:2], self.size
        return DTensor.from_local(
            self.values,
            DeviceMesh.from_group(group, self.values.device.type),
            [Shard(2)],
            run_check=False,
            shape=torch.Size((batch, channels, height, width)),
            stride=(height * width * channels, 1, width * channels, channels),
        )


def rows_of(length: int, ranks: int, rank: int, multiple: int = 1) -> slice:
    """The rows of `length` that a rank computes: those of `torch.chunk`, or as many as are a multiple."""
    step = -(-length // (ranks * multiple)) * multiple
    return slice(min(rank * step, length), min((rank + 1) * step, length))


def upsample(
    upsampler: Network,
    image: Tensor | None,
    features: Tensor | None,
    output_size: OutputSize = None,
    *,
    values: Tensor | None = None,
    max_memory: float | str | None = None,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Part:
    """Bring features to the resolution of one image, which the ranks of a process group share; every rank calls it.

    The whole output is that of the call, to the last roundings, and depends on the number of ranks as little.

    Args:
        upsampler: with the same weights on every rank, on the rank's device.
        image: this rank's rows of the image, (B, input_dim, rows, Wi); those of the ranks, in their order, make up the
            image. None: this rank has none. So rank 0 may have the whole image, and the others None; the whole image
            on each of them would be the rows of a taller one.
        features: (B, C, h, w) on rank 0, which sends them to the others; these pass None, or a tensor of this shape.
        output_size: as in the call; None means the whole image's size. The same on every rank.
        values: as in the call; on rank 0, as the features.
        max_memory: bytes, or a text such as "2GB", that this rank may allocate, its part of the result included. None:
            90 % of the free memory on a GPU; on a CPU the maps of all the rank's rows are kept.
        dtype: of the result; None means that of the features (or values). The same on every rank.
        group: the ranks; None: all of them. Its backend must be able to send tensors of the rank's device.

    Returns:
        This rank's `Part`: as many rows as `torch.chunk` gives.

    Raises:
        ValueError, TypeError: an argument of any rank, or arguments that do not fit each other; on every rank, before
            any work.
        RuntimeError: torch.distributed is not initialised, a gradient is wanted (call it under `torch.no_grad()`), or
            another rank ended or did not answer within the group's timeout.
        NotImplementedError: no requested backend can; lists every reason.
    """

    def prepare(request: Request) -> tuple[Part, Stream]:
        assert request.share is not None and request.share.output_rows is not None
        rows, (batch, channels) = request.share.output_rows, request.values.shape[:2]
        shape = batch, rows.stop - rows.start, request.size[1], channels
        like = request.values.new_empty(0, dtype=dtype)
        needed = torch.Size(shape).numel() * like.element_size()
        what = "this rank's part of the result, {} x {} x {} x {}".format(*shape)
        check_room(needed, f"output_size: {what},", request.device, "more ranks take smaller parts")
        limit = parse_memory(max_memory)
        if limit is not None and limit <= needed:
            raise ValueError(f"max_memory: expected more than the {needed} bytes of {what}, got {limit}")
        pieces = stream_of(request, max_memory=None if limit is None else limit - needed, dtype=dtype)
        return Part(rows, empty(shape, like).permute(0, 3, 1, 2), request.size, group), pieces

    part, pieces = _prepared(
        _Arguments(upsampler, image, features, values, output_size, max_memory, dtype), group, prepare
    )
    for rows, columns, piece in pieces:
        part.values[:, :, less(rows, part.rows), columns] = piece
    return part


def stream(
    upsampler: Network,
    image: Tensor | None,
    features: Tensor | None,
    output_size: OutputSize = None,
    *,
    values: Tensor | None = None,
    tile: int | Sequence[int] | None = None,
    max_memory: float | str | None = None,
    dtype: torch.dtype | None = None,
    out: Any = None,
    group: dist.ProcessGroup | None = None,
) -> Stream:
    """The pieces of this rank's rows of the output, as `AnyUp.stream` gives them; every rank must take its first piece.

    A rank without rows has no pieces, and must ask for one all the same: `for ... in` does.

    Args:
        upsampler: as of `upsample`.
        image: as of `upsample`.
        features: as of `upsample`.
        output_size: as of `upsample`.
        values: as of `upsample`.
        tile: as of `AnyUp.stream`.
        max_memory: as of `upsample`; two pieces are counted, and no other part of the result.
        dtype: of the pieces; None means that of `out`, else of the features (or values).
        out: an array (B, C or Cv, H, W) of the whole output that every rank can write into: a memory map of a file, or
            a zarr array. Each writes its rows, of which no two ranks have the same chunk of a zarr array.
        group: as of `upsample`.

    Raises as `upsample`.
    """

    def prepare(request: Request) -> Stream:
        return stream_of(request, tile=tile, max_memory=max_memory, dtype=dtype, out=out)

    arguments = _Arguments(upsampler, image, features, values, output_size, max_memory, dtype, out)
    return _prepared(arguments, group, prepare)


@dataclass(frozen=True)
class _Arguments:
    """This rank's arguments of a call; those of `stream`, or of `upsample`, that the ranks have to agree on."""

    upsampler: Network
    image: Tensor | None
    features: Tensor | None
    values: Tensor | None
    output_size: OutputSize
    max_memory: float | str | None
    dtype: torch.dtype | None
    out: Any = None


@dataclass(frozen=True)
class _Offer:
    """What a rank tells the others of its arguments; the fields of `_SAME` must be those of rank 0."""

    image: Form | None
    features: Form | None
    values: Form | None
    output_size: tuple[int | None, ...]
    dtype: torch.dtype | None
    compute_dtype: torch.dtype
    device: str
    weights: str
    settings: dict[str, Any]
    multiple: int


_SAME = {
    "output_size": "output_size",
    "dtype": "dtype",
    "compute_dtype": "upsampler: the dtype of queries and keys",
    "device": "upsampler: the type of the device",
    "weights": "upsampler: the hash of its weights",
    "settings": "upsampler: its settings",
    "multiple": "out: the rows of a chunk",
}


def _offer(given: _Arguments) -> _Offer:
    """Check this rank's arguments, as far as it can alone."""
    upsampler, image, features, values = given.upsampler, given.image, given.features, given.values
    for name, each in (("image", image), ("features", features), ("values", values)):
        if each is not None and not isinstance(each, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(each).__name__}")
    check_dtype("dtype", given.dtype)
    parse_memory(given.max_memory)
    device, channels = upsampler.rope.freqs.device, upsampler.config["input_dim"]
    if image is not None and (image.dim() != 4 or image.shape[2]):
        check_image(image, None, input_dim=channels, device=device)
    if features is not None:
        one = upsampler.rope.freqs.new_zeros(len(features) if features.dim() else 0, channels, 1, 1)
        upsampler.check(one, features, values=values)
    tensors = [each for each in (image, features, values) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*upsampler.parameters(), *tensors)):
        raise RuntimeError("upsample does not differentiate: call it under torch.no_grad() or torch.inference_mode()")
    return _Offer(
        image=_form(image),
        features=_form(features),
        values=_form(values),
        # A side is the image's, which no rank knows yet, where it differs for images of one pixel and of two a side.
        output_size=tuple(
            one if one == two else None
            for one, two in zip(*(check_output_size(given.output_size, (n, n)) for n in (1, 2)), strict=True)
        ),
        dtype=given.dtype,
        compute_dtype=upsampler.compute_dtype(device),
        device=device.type,
        weights=module_fingerprint(upsampler),
        settings=dict(upsampler.config),
        multiple=1 if given.out is None else int((getattr(given.out, "chunks", None) or (1, 1, 1))[2]),
    )


def _prepared(given: _Arguments, group: dist.ProcessGroup | None, prepare: Callable[[Request], Result]) -> Result:
    """What `prepare` makes of the request, once all ranks' arguments are checked and each has what it needs.

    `prepare` checks what is left. So it is called before too, for inputs of the same shapes that are all zero: what one
    rank cannot do is an error of all before anything large is sent.
    """
    upsampler = given.upsampler
    if not isinstance(upsampler, Network):
        raise TypeError(f"upsampler: expected an AnyUp, got {type(upsampler).__name__}")
    device = upsampler.rope.freqs.device
    ranks = Ranks(group, device)
    offers = ranks.all_of(lambda: _offer(given))
    with on_every_rank():
        (batch, channels, height, width), kind = _check_together(upsampler, offers)
    size = check_output_size(offers[0].output_size, (height, width))
    encoded = encoded_size((height, width), upsampler.config["kernel_size"])
    all_rows = [rows_of(encoded[0], ranks.count, rank) for rank in range(ranks.count)]
    output_rows = [rows_of(size[0], ranks.count, rank, offers[0].multiple) for rank in range(ranks.count)]
    needed = [
        needed_rows(rows, its, size[0], height, upsampler.config["kernel_size"])
        for rows, its in zip(all_rows, output_rows, strict=True)
    ]
    ends = accumulate((0 if offer.image is None else offer.image[0][2] for offer in offers), initial=0)
    had = [slice(*pair) for pair in pairwise(ends)]
    share = RankShare(
        first_row=needed[ranks.rank].start,
        image_height=height,
        rows=all_rows[ranks.rank],
        output_rows=output_rows[ranks.rank],
        ranks=ranks,
        all_rows=all_rows,
        size=encoded,
        device=device,
    )

    def request(image: Tensor, features: Tensor, values: Tensor | None) -> Request:
        return Request(upsampler, image, features, features if values is None else values, size, share=share)

    def zeros(form: Form) -> Tensor:
        return torch.zeros((), dtype=form[1], device=device).expand(form[0])

    of_features, of_values = offers[0].features, offers[0].values
    assert of_features is not None
    strip = (batch, channels, length_of(needed[ranks.rank]), width), kind
    ranks.each(lambda: prepare(request(zeros(strip), zeros(of_features), of_values and zeros(of_values))))
    like = torch.empty(batch, channels, 0, width, dtype=kind, device=device)
    sent = request(
        ranks.rows(given.image, had, needed, like),
        ranks.from_first(given.features, *of_features),
        of_values and ranks.from_first(given.values, *of_values),
    )
    return ranks.each(lambda: prepare(sent))


def _check_together(upsampler: Network, offers: Sequence[_Offer]) -> tuple[tuple[int, int, int, int], torch.dtype]:
    """Shape and dtype of the whole image; raises the same ValueError or TypeError on every rank."""
    first, device = offers[0], upsampler.rope.freqs.device
    if first.features is None:
        raise ValueError("features: expected (B, C, height, width) on rank 0, got None")
    for rank, offer in enumerate(offers):
        for field, name in _SAME.items():
            if getattr(offer, field) != getattr(first, field):
                expected, got = getattr(first, field), getattr(offer, field)
                raise ValueError(f"{name}: expected that of rank 0, {expected}, on every rank, rank {rank} has {got}")
        for name in ("features", "values"):
            its, firsts = getattr(offer, name), getattr(first, name)
            if its is not None and firsts is None:
                raise ValueError(f"{name}: expected None, as on rank 0, rank {rank} has {_words(its)}")
            if its is not None and its != firsts:
                raise ValueError(
                    f"{name}: expected {_words(firsts)}, as on rank 0, or None, rank {rank} has {_words(its)}"
                )
    with_rows = [
        (rank, *offer.image) for rank, offer in enumerate(offers) if offer.image is not None and offer.image[0][2]
    ]
    if not with_rows:
        raise ValueError("image: expected rows of an image, (B, C, rows, width), on some rank, got None on all")
    _, (batch, channels, _, width), kind = with_rows[0]
    for rank, shape, its in with_rows:
        if (*shape[:2], shape[3], its) != (batch, channels, width, kind):
            raise ValueError(
                f"image: expected rows of one image, {_words(((batch, channels, 'rows', width), kind))}, as on rank "
                f"{with_rows[0][0]}, rank {rank} has {_words((shape, its))}"
            )
    image, features, values = (
        torch.zeros((), dtype=form[1], device=device).expand(form[0])
        for form in (((batch, channels, 1, 1), kind), first.features, first.values or first.features)
    )
    upsampler.check(image, features, values=values)
    return (batch, channels, sum(shape[2] for _, shape, _ in with_rows), width), kind


def needed_rows(rows: slice, output_rows: slice, output_height: int, height: int, kernel_size: int) -> slice:
    """The image rows that a rank needs for these rows of the encoded image and of the output."""
    length, half = encoded_size((height, 1), kernel_size)[0], kernel_size // 2
    encoded = [rows] if length_of(rows) else []
    if length_of(output_rows):
        encoded.append(reach(output_rows, output_height, length).pixels)
    if not encoded:
        return slice(0, 0)
    first, stop = min(each.start for each in encoded), max(each.stop for each in encoded)
    # With an even kernel the last row of the encoded image lies beyond the image, and reflects one row more.
    return slice(max(first - half - (1 - kernel_size % 2), 0), min(stop + half, height))


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _words(form: tuple[tuple[Any, ...], torch.dtype]) -> str:
    return f"{form[0]} of {form[1]}"
