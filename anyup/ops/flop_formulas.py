"""The operations of our operators, for `torch.utils.flop_counter`: those that the counter counts in the reference.

The attention counts only the keys in the windows, where the reference multiplies by every key. A backward operator
counts two products for each product of the forward one; recomputation is not counted.

The counter imports Triton, which takes 0.2 s. So this module does not import it, and adds the formulas when it is
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"

_FORMULAS: dict[Any, Callable[..., Any]] = {}


def count(operator: Any, formula: Callable[..., Any]) -> None:
    """Add a formula for an `OpOverloadPacket`; it takes the arguments, with shapes in place of tensors."""
    if not _FORMULAS:
        sys.meta_path.insert(0, _Finder())
    _FORMULAS[operator] = formula
    if _COUNTER in sys.modules:
        _add(sys.modules[_COUNTER], operator, formula)


def _add(counter: ModuleType, operator: Any, formula: Callable[..., Any]) -> None:
    def counted(*arguments: Any, out_shape: Any = None) -> Any:
        return formula(*arguments)

    counter.register_flop_formula(operator)(counted)


class _Finder(MetaPathFinder):
    """Finds the counter's module as Python does, and adds the formulas after it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            for operator, formula in _FORMULAS.items():
                _add(module, operator, formula)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
