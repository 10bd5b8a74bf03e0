"""What a call will keep and compute again, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from anyup.banded import Bands
from anyup.planning.task import Task
from anyup.progress import human_bytes


@dataclass(frozen=True)
class Stage:
    """A part of the work: what it does, its products of D x D in all, and the most memory in it."""

    name: str
    products: float
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a call will keep and compute again; `print` it.

    Attributes:
        task: what is asked for.
        order: "whole" (maps of the whole batch), "image by image" (maps of one whole image), or "bands".
        bands: how each image is cut; None where it is not.
        stages: in their order.
        limit: the budget in bytes; None: none.
        plain_products: of the whole call without a budget.
    """

    task: Task
    order: str
    bands: Bands | None
    stages: tuple[Stage, ...]
    limit: int | None
    plain_products: float

    @property
    def peak_bytes(self) -> int:
        """The most memory that the call allocates at a time, predicted."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def products(self) -> float:
        """All products of D x D."""
        return sum(stage.products for stage in self.stages)

    @property
    def cost(self) -> float:
        """Work relative to the call without a budget."""
        return self.products / max(self.plain_products, 1)  # of an empty batch

    def kept(self) -> str:
        """What is kept between the passes, in words."""
        bands, (height, _) = self.bands, self.task.image
        if bands is None:
            return "whole maps" + (" of one image at a time" if self.order == "image by image" else "")
        if not bands.kept:
            return "nothing"
        what = "the encoded image" if bands.together else "one map"
        share = _share(bands.kept, height)
        if bands.kept_for_output < bands.kept:
            share += f", then {_share(bands.kept_for_output, height)}"
        more = f"; the encoded image beside it for {_share(bands.encoded, height)}" if bands.encoded else ""
        return f"{what} for {share}{more}"

    def __str__(self) -> str:
        task = self.task
        size = "{} x {}".format(*task.output)
        if task.region[2:] != task.output:
            size = "{} x {} at ({}, {}) of ".format(*task.region[2:], *task.region[:2]) + size
        batch = "" if task.batch == 1 else f", batch {task.batch}"
        dtype = str(task.dtype).removeprefix("torch.")
        limit = "" if self.limit is None else f" of {human_bytes(self.limit)}"
        lines = [
            f"{size} from {task.grid[0]} x {task.grid[1]}{batch}, {task.carried} channels, {dtype}, "
            f"{task.device_type}: {human_bytes(self.peak_bytes)}{limit}, {self.cost:.2f} times the work",
            f"kept: {self.kept()}" + ("" if self.bands is None else f"; bands of {self.bands.rows} rows"),
        ]
        pixels = task.batch * task.output[0] * task.output[1]
        lines += [
            f"  {stage.name:<28} {stage.products / pixels:6.1f} products a pixel   {human_bytes(stage.peak_bytes):>8}"
            for stage in self.stages
        ]
        return "\n".join(lines)


def _share(rows: int, height: int) -> str:
    return "all rows" if rows >= height else f"{100 * rows / height:.0f} % of the rows"
