"""Pixel encoders that several test files run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support.accuracy import assert_close_enough
from torch import Tensor

from anyup.ops.pixel_encoder import BlockParameters, EncoderParameters, encode_pair, encode_pixels


class Shape(NamedTuple):
    size: tuple[int, int]
    output: tuple[int, int] | None = None
    inputs: int | None = 3  # None: no first projection
    dim: int = 16
    rotates: bool = False
    batch: int = 1


SHAPES = {
    "image": Shape((20, 24), rotates=True),
    "odd image": Shape((17, 23), rotates=True),
    "several tiles": Shape((96, 113), rotates=True),
    "several tiles, stored projection": Shape((96, 113), inputs=24),
    "several tiles, no projection": Shape((113, 96), inputs=None),
    "batch 2": Shape((12, 9), batch=2, inputs=16, dim=24),
    "empty batch": Shape((12, 9), batch=0),
    "many inputs": Shape((12, 9), inputs=40),
    "sixteen inputs": Shape((12, 9), inputs=16),
    "seventeen inputs": Shape((12, 9), inputs=17),
    "one input": Shape((12, 9), inputs=1),
    "no projection": Shape((12, 9), inputs=None),
    "pooled": Shape((24, 20), (6, 5), inputs=16),
    "pooled to overlapping cells": Shape((23, 19), (7, 5), inputs=16),
    "pooled, several tiles": Shape((113, 96), (11, 9), inputs=16),
    "pooled, no projection": Shape((23, 19), (7, 5), inputs=None),
    "pooled to one": Shape((12, 9), (1, 1), inputs=16),
    "pooled to one row": Shape((12, 9), (1, 4), inputs=16),
    "enlarged": Shape((12, 9), (19, 15), inputs=16),
    "enlarged on one axis": Shape((12, 9), (6, 15), inputs=16),
    "rotated and pooled": Shape((24, 20), (6, 5), rotates=True),
    "one pixel": Shape((1, 1), rotates=True),
    "one row": Shape((1, 31), rotates=True),
    "one column": Shape((31, 1), rotates=True),
    "wide": Shape((2, 300), rotates=True),
    "one channel a group": Shape((12, 9), dim=8),
    "default width": Shape((14, 11), inputs=128, dim=128),
}

NAMES = ("projection", *(f"block{n}_{field}" for n in (1, 2) for field in BlockParameters._fields), "frequencies")


def tensors_of(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random_(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(*size, generator=generator)).to(dtype)

    dim = shape.dim
    tensors = {"pixels": random_(shape.batch, *shape.size, shape.inputs or dim)}
    if shape.inputs is not None:
        tensors["projection"] = random_(dim, shape.inputs, scale=shape.inputs**-0.5)
    for name in NAMES[1:-1]:
        if "norm" in name:
            tensors[name] = random_(dim, scale=0.2, shift=1.0 if name.endswith("weight") else 0.0)
        else:
            tensors[name] = random_(dim, dim, scale=dim**-0.5)
    if shape.rotates:
        tensors["frequencies"] = random_(2, dim, scale=3.0)
    return tensors


def parameters_of(tensors: dict[str, Tensor]) -> EncoderParameters:
    blocks = (BlockParameters(*(tensors[f"block{n}_{f}"] for f in BlockParameters._fields)) for n in (1, 2))
    return EncoderParameters(tensors.get("projection"), *blocks)


def encoder(shape: Shape) -> Any:
    """The operator for a shape, as the error rule calls it."""

    def run(*, backend: str, **tensors: Tensor) -> Tensor:
        return encode_pixels(
            tensors["pixels"],
            parameters_of(tensors),
            frequencies=tensors.get("frequencies"),
            output_size=shape.output,
            backend=backend,
        )

    return run


class PairShape(NamedTuple):
    encoders: Shape  # the second's output among it
    sizes: tuple[tuple[int, int], ...]  # to which the first's is pooled


PAIRS = {
    "batch 2": PairShape(Shape((5, 7), inputs=16, batch=2), ((3, 2),)),
    "pooled both, two grids": PairShape(Shape((5, 4), (4, 4), inputs=24, dim=24), ((3, 2), (2, 2))),
    "channels in pieces, enlarged": PairShape(Shape((3, 5), (4, 6), inputs=64, dim=64), ((2, 2),)),
}


def pair_of(shape: PairShape, dtype: torch.dtype, device: str = "cpu") -> list[dict[str, Tensor]]:
    """The tensors of the two encoders, which read the same pixels."""
    first, second = tensors_of(shape.encoders, dtype), tensors_of(shape.encoders, dtype, seed=1)
    return [{name: t.to(device) for name, t in {**own, "pixels": first["pixels"]}.items()} for own in (first, second)]


def assert_pair_accurate(shape: PairShape, dtype: torch.dtype, device: str = "cpu", backend: Any = "triton") -> None:
    """Raise an AssertionError unless kernels run both encoders, and each result obeys the error rule."""
    tensors = pair_of(shape, dtype, device)
    size = shape.encoders.output or shape.encoders.size
    weight = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        parameters = [parameters_of(own) for own in tensors]
        settings: dict[str, Any] = {"sizes": shape.sizes, "output_size": size, "backend": backend}
        made = encode_pair(tensors[0]["pixels"], *parameters, weight, **settings)
        assert made is not None
        pooled, whole, arranged = made
        assert torch.equal(arranged, weight) and arranged.permute(2, 3, 1, 0).is_contiguous()
        several = [*((tensors[0], *each) for each in zip(pooled, shape.sizes, strict=True)), (tensors[1], whole, size)]
        for own, actual, output in several:
            run = encoder(shape.encoders._replace(output=output))
            here = {name: tensor.cpu() for name, tensor in own.items()}
            wide = {name: tensor.double() for name, tensor in here.items()}
            reference, exact = (run(backend="reference", **given) for given in (here, wide))
            assert_close_enough(actual.cpu(), reference, exact)
