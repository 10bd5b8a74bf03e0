"""The processes of a group of torch.distributed: what they exchange, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anyup.limited_memory.share import Share
from anyup.ops.pixel_encoder.arguments import GROUPS
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.statistics import Statistics
from anyup.ops.precision import accumulator_dtype

Result = TypeVar("Result")


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
        with on_every_rank():
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
        strip = image if image is not None and complete else like.new_empty(batch, channels, length_of(wanted), width)
        transfers = []
        for peer in range(self.count):
            sent, received = common(own, needed[peer]), common(had[peer], wanted)
            # Plane by plane: rows of one are a run of memory, which goes without another copy.
            for plane in ((b, c) for b in range(batch) for c in range(channels)):
                mine = [] if image is None or not sent else [image.detach()[plane][less(sent, own)].contiguous()]
                place = [strip[plane][less(received, wanted)]] if received else []
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
        return Statistics.joined([length_of(rows) * self.size[1] for rows in self.all_rows], means, deviations)

    def join_cells(self, pooled: Tensor, cells: range, count: int) -> Tensor:
        ranges = [Cells(0, count, count, self.size[0]).touching(rows) for rows in self.all_rows]
        sent = pooled.new_zeros(max(map(len, ranges)), *pooled.shape[1:])
        sent[: len(cells)] = pooled
        whole = pooled.new_zeros(count, *pooled.shape[1:])
        for its, each in zip(ranges, self.ranks.gather(sent, "joining the pooled keys"), strict=True):
            whole[its.start : its.stop] += each[: len(its)]  # in the order of the ranks
        return whole


def length_of(rows: slice) -> int:
    """The number of rows."""
    return rows.stop - rows.start


def less(rows: slice, origin: slice) -> slice:
    """The rows, counted from the first of `origin`."""
    return slice(rows.start - origin.start, rows.stop - origin.start)


def common(one: slice, other: slice) -> slice | None:
    """The rows that are in both; None: there are none."""
    first, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(first, stop) if first < stop else None


def is_of_every_rank(error: BaseException) -> bool:
    """Whether every rank raises this error, in its own words or as "rank N: ...": one alone need print it."""
    return bool(vars(error).get(_OF_EVERY_RANK))


_OF_EVERY_RANK = "_of_every_rank"


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Mark what is raised here: every rank raises it."""
    try:
        yield
    except Exception as error:
        vars(error)[_OF_EVERY_RANK] = True
        raise


_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError, RuntimeError)}


def _kind(error: Exception) -> str:
    """The name of the class that an error of another rank is raised as."""
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
