"""What one process has of an image, and how its results become those of the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anyup.layers import encoded_size
from anyup.ops.pixel_encoder.statistics import Statistics


@dataclass(frozen=True)
class Share:
    """The rows of an image that a process has. This class is the share of a process that has them all.

    Attributes:
        first_row: the number of the first image row that the process has.
        image_height: the number of rows of the whole image.
        rows: the rows of the encoded image that the process takes the statistics of.
        output_rows: the rows of the output that it computes; None: any.
    """

    first_row: int
    image_height: int
    rows: slice
    output_rows: slice | None = None

    @staticmethod
    def whole(height: int, kernel_size: int) -> Share:
        """The share of a process that has the whole image, of `height` rows; `kernel_size` is the image encoder's."""
        return Share(0, height, slice(0, encoded_size((height, 1), kernel_size)[0]))

    def join(self, statistics: Statistics | None) -> Statistics:
        """The statistics of the whole image from those of `rows`; None where there are no rows."""
        assert statistics is not None
        return statistics

    def join_cells(self, pooled: Tensor, cells: range, count: int) -> Tensor:
        """The pooled map (count, w, D) from `pooled` (cells, w, D), what `rows` contribute to its rows `cells`."""
        return pooled
