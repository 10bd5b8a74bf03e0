"""Faults planted in a kernel's source, for tests of the tests."""

from __future__ import annotations

import importlib
import inspect
import linecache
from typing import Any

import pytest


def mutate(monkeypatch: pytest.MonkeyPatch, module: str, name: str, old: str, new: str) -> None:
    """Give a module of `anyup.kernels` a changed copy of a kernel, or of a function that its kernels call."""
    user = importlib.import_module(f"anyup.kernels.{module}")
    function: Any = getattr(user, name).fn
    source = inspect.getsource(function)
    assert old in source, (name, old)
    changed, file = source.replace(old, new), f"{name}_mutated.py"
    linecache.cache[file] = (len(changed), None, changed.splitlines(True), file)  # where Triton reads it
    scope = dict(function.__globals__)
    exec(compile(changed, file, "exec"), scope)
    monkeypatch.setattr(user, name, scope[name])
