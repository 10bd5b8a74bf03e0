"""Functions that torch.compile runs and does not trace: a traced loop over bands would give a graph for each band."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def untraced(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, at which a compiled graph breaks; a compiled caller with `fullgraph=True` raises.

    `torch.compiler.disable` is applied when first needed, because it imports the compiler, which takes a second.
    """

    made: list[Callable[Arguments, Result]] = []

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not made:
            made.append(torch.compiler.disable(function))
        return made[0](*args, **kwargs)

    return run
