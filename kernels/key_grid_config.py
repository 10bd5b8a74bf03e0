"""How the keys' convolution is cut: cells and channels of a program, warps.

A `Config` changes speed and never a result.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launch import Target


@dataclass(frozen=True)
class ConvolutionConfig:
    """A config.

    Attributes:
        cells: of a program, a power of two.
        outputs: channels of the result that a program makes, a power of two.
        piece: channels that a product takes at a time, a power of two.
        num_warps, num_stages: Triton's.
    """

    cells: int
    outputs: int
    piece: int
    num_warps: int
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name, least in (("cells", 16), ("outputs", 16), ("piece", 16), ("num_warps", 1)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, at least {least}, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")

    def runs(self, cells: int) -> int:
        """Runs of cells that a grid has."""
        return -(-cells // self.cells)


def convolution_configs(target: Target) -> list[ConvolutionConfig]:
    """Configs, best first; what comes later asks less of a card. They were chosen by compiling for each target.

    A grid of 32 x 32 cells has 128 programs of 32 x 32 numbers, which ask for as many bytes of the weight as of keys.
    """
    return [
        ConvolutionConfig(32, 32, 32, num_warps=2, num_stages=3),
        ConvolutionConfig(16, 16, 16, num_warps=4, num_stages=1),
    ]
