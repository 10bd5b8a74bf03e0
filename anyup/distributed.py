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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from anyup.limited_memory.share import Share
from anyup.limited_memory.stream import Stream
from anyup.limited_memory.stream import stream as stream_of
from anyup.network import Network
from anyup.ops.memory import empty
from anyup.ops.pixel_encoder.arguments import GROUPS
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.statistics import Statistics
from anyup.ops.precision import accumulator_dtype, check_dtype

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
    ranks, request = _begin(upsampler, image, features, values, output_size, max_memory, dtype, None, group)
    assert request.share is not None and request.share.output_rows is not None
    rows, carried = request.share.output_rows, request.values

    def prepare() -> tuple[Tensor, Stream]:
        batch, channels = carried.shape[:2]
        shape = batch, rows.stop - rows.start, request.size[1], channels
        like = carried.new_empty(0, dtype=dtype)
        needed = torch.Size(shape).numel() * like.element_size()
        what = "this rank's part of the result, {} x {} x {} x {}".format(*shape)
        check_room(needed, f"output_size: {what},", request.device, "more ranks take smaller parts")
        limit = parse_memory(max_memory)
        if limit is not None and limit <= needed:
            raise ValueError(f"max_memory: expected more than the {needed} bytes of {what}, got {limit}")
        out = empty(shape, like).permute(0, 3, 1, 2)
        return out, stream_of(request, max_memory=None if limit is None else limit - needed, dtype=dtype)

    out, pieces = ranks.each(prepare)
    for part, columns, piece in pieces:
        out[:, :, part.start - rows.start : part.stop - rows.start, columns] = piece
    return Part(rows, out, request.size, group)


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
    ranks, request = _begin(upsampler, image, features, values, output_size, max_memory, dtype, out, group)
    return ranks.each(lambda: stream_of(request, tile=tile, max_memory=max_memory, dtype=dtype, out=out))


class Ranks:
    """The processes of a group, of which this is one."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "group: torch.distributed is not initialised; start the processes with torchrun, and call "
                "torch.distributed.init_process_group() in each"
            )
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of the group's ranks")
        self._group, self._device = group, device

    def all_of(self, step: Callable[[], Result]) -> list[Result]:
        """What a step returns on each rank; it raises on every rank where it raises on one."""
        error: Exception | None = None
        result: Result | None = None
        try:
            result = step()
        except Exception as raised:
            error = raised
        told = None if error is None else (_kind(error), str(error))
        found: list[Any] = [None] * self.count
        with self._exchange("agreeing on the arguments"):
            dist.all_gather_object(found, (result, told), group=self._group)
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                raise _KINDS[failed[0]](f"rank {rank}: {failed[1]}")
        return [each for each, _ in found]

    def each(self, step: Callable[[], Result]) -> Result:
        """What a step returns here; it raises on every rank where it raises on one."""
        results: list[Result] = []
        self.all_of(lambda: results.append(step()))
        return results[0]

    def gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Each rank's tensor; all are of one shape and dtype."""
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        with self._exchange(what):
            dist.all_gather(found, tensor, group=self._group)
        return found

    def from_first(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rank 0's tensor, of this shape and dtype, on every rank."""
        if self.count > 1:
            sent = tensor.detach().contiguous() if self.rank == 0 and tensor is not None else None
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device) if sent is None else sent
            with self._exchange("sending the features"):
                dist.broadcast(tensor, self._global(0), group=self._group)
        assert tensor is not None
        return tensor

    def rows(self, image: Tensor | None, had: Sequence[slice], needed: Sequence[slice], like: Tensor) -> Tensor:
        """The rows of an image that this rank needs, from those that each rank has.

        Args:
            image: (B, C, rows, W), this rank's; None: it has none.
            had, needed: of each rank.
            like: (B, C, 0, W).
        """
        own, wanted = had[self.rank], needed[self.rank]
        batch, channels, _, width = like.shape
        complete = image is not None and own == wanted
        strip = image if image is not None and complete else like.new_empty(batch, channels, _length(wanted), width)
        transfers = []
        for peer in range(self.count):
            sent, received = _common(own, needed[peer]), _common(had[peer], wanted)
            # Plane by plane: rows of one are a run of memory, which goes without another copy.
            for plane in ((b, c) for b in range(batch) for c in range(channels)):
                mine = [] if image is None or not sent else [image.detach()[plane][_less(sent, own)].contiguous()]
                place = [strip[plane][_less(received, wanted)]] if received else []
                if peer == self.rank:
                    for source, target in () if complete else zip(mine, place, strict=True):
                        target.copy_(source)
                    continue
                for tensors, direction in ((mine, dist.isend), (place, dist.irecv)):
                    transfers += [dist.P2POp(direction, each, self._global(peer), self._group) for each in tensors]
        with self._exchange("sending rows of the image"):
            for work in dist.batch_isend_irecv(transfers) if transfers else []:
                work.wait()
        return strip

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        """Name the rank and the step where an exchange fails.

        The error is never one after which a step is repeated: the other ranks would not repeat it.
        """
        try:
            if self._device.type == "cuda":  # where the objects go
                with torch.cuda.device(self._device):
                    yield
            else:
                yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.count}: another rank ended, or did not answer within the group's timeout, "
                f"while {what}: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class RankShare(Share):
    """A rank's rows of an image.

    Attributes:
        ranks: all of them.
        all_rows: `rows` of each.
        size: (height, width) of the encoded image.
        device: of its tensors.
    """

    ranks: Ranks
    all_rows: Sequence[slice]
    size: tuple[int, int]
    device: torch.device

    def join(self, statistics: Statistics | None) -> Statistics:
        if statistics is None:
            sent = torch.zeros(2, GROUPS, dtype=accumulator_dtype(self.device), device=self.device)
        else:
            groups = statistics.as_groups()
            sent = torch.stack((groups.mean, groups.deviation))
        means, deviations = torch.stack(self.ranks.gather(sent, "merging statistics")).unbind(1)
        return Statistics.joined([_length(rows) * self.size[1] for rows in self.all_rows], means, deviations)

    def join_cells(self, part: Tensor, cells: range, count: int) -> Tensor:
        ranges = [Cells(0, count, count, self.size[0]).touching(rows) for rows in self.all_rows]
        sent = part.new_zeros(max(map(len, ranges)), *part.shape[1:])
        sent[: len(cells)] = part
        whole = part.new_zeros(count, *part.shape[1:])
        for its, each in zip(ranges, self.ranks.gather(sent, "joining the pooled keys"), strict=True):
            whole[its.start : its.stop] += each[: len(its)]  # in the order of the ranks
        return whole


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


def _offer(
    upsampler: Network,
    image: Tensor | None,
    features: Tensor | None,
    values: Tensor | None,
    output_size: OutputSize,
    max_memory: float | str | None,
    dtype: torch.dtype | None,
    out: Any,
) -> _Offer:
    """Check this rank's arguments, as far as it can alone."""
    for name, each in (("image", image), ("features", features), ("values", values)):
        if each is not None and not isinstance(each, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(each).__name__}")
    check_dtype("dtype", dtype)
    parse_memory(max_memory)
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
            for one, two in zip(*(check_output_size(output_size, (n, n)) for n in (1, 2)), strict=True)
        ),
        dtype=dtype,
        compute_dtype=upsampler.compute_dtype(device),
        device=device.type,
        weights=module_fingerprint(upsampler),
        settings=dict(upsampler.config),
        multiple=1 if out is None else int((getattr(out, "chunks", None) or (1, 1, 1))[2]),
    )


def _begin(
    upsampler: Network,
    image: Tensor | None,
    features: Tensor | None,
    values: Tensor | None,
    output_size: OutputSize,
    max_memory: float | str | None,
    dtype: torch.dtype | None,
    out: Any,
    group: dist.ProcessGroup | None,
) -> tuple[Ranks, Request]:
    """Check the arguments of all ranks, and bring to each what it needs of the image, features and values."""
    if not isinstance(upsampler, Network):
        raise TypeError(f"upsampler: expected an AnyUp, got {type(upsampler).__name__}")
    device = upsampler.rope.freqs.device
    ranks = Ranks(group, device)
    offers = ranks.all_of(lambda: _offer(upsampler, image, features, values, output_size, max_memory, dtype, out))
    (batch, channels, height, width), kind = _check_together(upsampler, offers)
    size = check_output_size(offers[0].output_size, (height, width))
    maps = [
        None if offered is None else ranks.from_first(given, *offered)
        for given, offered in ((features, offers[0].features), (values, offers[0].values))
    ]
    encoded = encoded_size((height, width), upsampler.config["kernel_size"])
    all_rows = [rows_of(encoded[0], ranks.count, rank) for rank in range(ranks.count)]
    output_rows = [rows_of(size[0], ranks.count, rank, offers[0].multiple) for rank in range(ranks.count)]
    needed = [
        needed_rows(rows, its, size[0], height, upsampler.config["kernel_size"])
        for rows, its in zip(all_rows, output_rows, strict=True)
    ]
    ends = accumulate((0 if offer.image is None else offer.image[0][2] for offer in offers), initial=0)
    had = [slice(*pair) for pair in pairwise(ends)]
    like = torch.empty(batch, channels, 0, width, dtype=kind, device=device)
    strip = ranks.rows(image, had, needed, like)
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
    carried = maps[0] if maps[1] is None else maps[1]
    assert maps[0] is not None and carried is not None
    return ranks, Request(upsampler, strip, maps[0], carried, size, share=share)


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
    parts = [rows] if _length(rows) else []
    if _length(output_rows):
        parts.append(reach(output_rows, output_height, length).pixels)
    if not parts:
        return slice(0, 0)
    first, stop = min(part.start for part in parts), max(part.stop for part in parts)
    # With an even kernel the last row of the encoded image lies beyond the image, and reflects one row more.
    return slice(max(first - half - (1 - kernel_size % 2), 0), min(stop + half, height))


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _words(form: tuple[tuple[Any, ...], torch.dtype]) -> str:
    return f"{form[0]} of {form[1]}"


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _less(rows: slice, origin: slice) -> slice:
    return slice(rows.start - origin.start, rows.stop - origin.start)


def _common(one: slice, other: slice) -> slice | None:
    first, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(first, stop) if first < stop else None


_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError, RuntimeError)}


def _kind(error: Exception) -> str:
    """The name of the class that an error of another rank is raised as."""
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
