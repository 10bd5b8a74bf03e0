"""Choosing the backend of an operation, and saying why not the others.

A backend is a module with `unsupported(problem) -> list[str]` (empty: it can) and the functions that run.
One body so answers both "can you?" and "why not?". A module may also have `discouraged(problem) -> list[str]`: why
it is chosen only where it is asked for by name, although it can.

Three things are tried again, the inner ones first. A config of a kernel that the device refuses gives way to the next
config (`configs.run_first`). A backend without a config left raises `BackendFailure`, and the next backend runs the
operation (`Operation.run`; `BandedImage`, which keeps maps from pass to pass, goes on with it itself). A call that runs
out of a GPU's memory goes on with half the budget, once (`limited_memory.executor.OutOfMemoryRetry`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from anyup.caller_warning import warn
from anyup.ops.precision import without_autocast
from anyup.ops.refusals import remember

logger = logging.getLogger("anyup")

BACKEND_NAMES = ("triton", "flex", "torch", "reference")
"""The names of all backends, in order of preference; an operation has some of them."""

_FOR_ANY_DEVICE = ("torch", "reference")

WITHOUT_GRADIENT = "call it under torch.no_grad() or torch.inference_mode() where none is needed"
"""Advice in a reason: how to call a backend that has no gradients."""

Backend = str | Sequence[str] | None
"""None: the first that can. A name: that one or an error. A sequence: the first of these that can."""


class BackendFailure(RuntimeError):
    """A backend whose `unsupported` was empty failed all the same: a kernel did not compile, or did not launch."""


@dataclass(frozen=True)
class Candidate:
    """One backend and the reasons why it cannot run (none: it can).

    `discouraged` are the reasons why it runs only if the caller names it, although it can.
    """

    name: str
    reasons: tuple[str, ...]
    discouraged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Which backend runs an operation, and why the others do not.

    `chosen` is None where no candidate can. `otherwise` says what is done then; None: it is an error.
    """

    operation: str
    problem: str
    candidates: tuple[Candidate, ...]
    chosen: str | None
    otherwise: str | None = None

    @property
    def outcome(self) -> str:
        """The backend's name, or what is done without one."""
        return self.chosen or self.otherwise or "no backend can"

    def __str__(self) -> str:
        lines = [f"{self.operation} ({self.problem}): {self.outcome}"]
        for candidate in self.candidates:
            if candidate.reasons:
                lines += [f"  not {candidate.name}: {reason}" for reason in candidate.reasons]
            elif candidate.discouraged:
                lines += [f"  {candidate.name}: can, only by name: {reason}" for reason in candidate.discouraged]
            elif candidate.name != self.chosen:
                lines.append(f"  {candidate.name}: can, comes after {self.chosen}")
        return "\n".join(lines)


class Operation:
    """An operation and its backends, in order of preference.

    `backends` maps a backend's name to a function that imports and returns its module. The function is called once,
    when the backend is first asked: so a backend that is never asked is never imported. `otherwise` says what is done
    where no backend can; None: that is an error.
    """

    def __init__(
        self, name: str, backends: Mapping[str, Callable[[], ModuleType]], *, otherwise: str | None = None
    ) -> None:
        self.name, self.otherwise = name, otherwise
        self._backends = {name: cache(load) for name, load in backends.items()}
        self._logged: set[str] = set()
        self._failures: dict[tuple[str, torch.device, Hashable], str] = {}
        self._warned_of_slow_path = False

    def explain(self, problem: Any, backend: Backend = None) -> Explanation:
        """Ask every candidate whether it can run `problem`."""
        asked = parse_backend(backend)
        candidates = tuple(
            Candidate(name, tuple(self._reasons(name, problem)), tuple(self._discouraged(name, problem, asked)))
            for name in asked or self._backends
        )
        chosen = next((c.name for c in candidates if not (c.reasons or c.discouraged)), None)
        return Explanation(self.name, str(problem), candidates, chosen, self.otherwise)

    def choose(self, problem: Any, backend: Backend = None) -> ModuleType:
        """The module of the first candidate that can run `problem`.

        Raises NotImplementedError listing every candidate's every reason where none can.
        """
        asked = parse_backend(backend)
        for name in asked or self._backends:
            if not (self._reasons(name, problem) or self._discouraged(name, problem, asked)):
                if name not in self._logged:
                    self._logged.add(name)
                    logger.debug("%s runs on backend %r (first for %s)", self.name, name, problem)
                if not asked:
                    self._warn_of_slow_path(name, problem)
                return self._backends[name]()
        raise NotImplementedError(f"no backend can run this:\n{self.explain(problem, backend)}")

    def run(self, function: str, problem: Any, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the chosen backend with autocast off, because a backend chooses its own dtypes.

        If a backend raises `BackendFailure` and the caller did not name it, the next backend runs, with a warning. The
        failed backend is then skipped on that device for all problems with the same `compiled_for`.
        """
        module = self.choose(problem, backend)
        try:
            return _call(getattr(module, function), problem.device.type, *args, **kwargs)
        except BackendFailure as failure:
            self.give_up(module, problem, backend, failure)
        return self.run(function, problem, backend, *args, **kwargs)

    def give_up(self, module: ModuleType, problem: Any, backend: Backend, failure: BackendFailure) -> None:
        """Skip a backend from now on, with a warning; raises its failure if the caller asked for this backend alone."""
        name = next(n for n in self._backends if self._backends[n]() is module)
        if parse_backend(backend) == (name,):
            raise failure
        self._warned_of_slow_path = True  # one warning is enough
        self._failures[_failing(name, problem)] = f"failed before on {problem.device}: {failure}"
        _report(
            f"{self.name}: backend {name!r} failed on {_device_name(problem.device)} and is not used for "
            f"this or the like any more ({problem}): {failure}"
        )

    def _warn_of_slow_path(self, name: str, problem: Any) -> None:
        """Warn once why CUDA tensors run on a slow backend although the operation has a fast one."""
        faster = [other for other in self._backends if other not in _FOR_ANY_DEVICE]
        if self._warned_of_slow_path or name not in _FOR_ANY_DEVICE or problem.device.type != "cuda" or not faster:
            return
        self._warned_of_slow_path = True
        reasons = "; ".join(f"{other}: {reason}" for other in faster for reason in self._reasons(other, problem))
        _report(f"{self.name} runs on its slow backend {name!r} ({reasons})")

    def _reasons(self, name: str, problem: Any) -> list[str]:
        if name not in self._backends:
            return [f"{self.name} has no {name!r} backend in this version; it has {', '.join(self._backends)}"]
        failure = self._failures.get(_failing(name, problem))
        if failure is not None:
            return [failure]
        return self._backends[name]().unsupported(problem)

    def _discouraged(self, name: str, problem: Any, asked: tuple[str, ...]) -> list[str]:
        if asked:
            return []
        discouraged = getattr(self._backends[name](), "discouraged", None)
        return [] if discouraged is None else discouraged(problem)


def _report(refusal: str) -> None:
    remember(refusal)
    warn(f"anyup: {refusal}")


def _failing(name: str, problem: Any) -> tuple[str, torch.device, Hashable]:
    """The key under which a failure is stored; `compiled_for`, if a problem has it, is what its kernels depend on."""
    return name, problem.device, getattr(problem, "compiled_for", None)


def _call(function: Callable[..., Any], device_type: str, *args: Any, **kwargs: Any) -> Any:
    with without_autocast(device_type):
        return function(*args, **kwargs)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors; None stands for an absent one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def parse_backend(backend: Backend) -> tuple[str, ...]:
    """The names in a backend request, () for None; raises ValueError or TypeError for anything else."""
    if backend is None:
        return ()
    if isinstance(backend, str) and backend in BACKEND_NAMES:
        return (backend,)
    if not isinstance(backend, (str, Sequence)):
        raise TypeError(
            f"backend: expected None, a name or a sequence of names, got {type(backend).__name__} {backend!r}"
        )
    names = (backend,) if isinstance(backend, str) else tuple(backend)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"backend: expected names, got {type(name).__name__}")
        if name not in BACKEND_NAMES:
            raise ValueError(f"backend: expected one of {', '.join(BACKEND_NAMES)}, got {name!r}")
    if not names:
        raise ValueError("backend: expected at least one name, got an empty sequence")
    return names


def preferring(backend: Backend) -> Backend:
    """A request that tries the given backends first, then all others in order of preference; None for None."""
    names = parse_backend(backend)
    return (*names, *(name for name in BACKEND_NAMES if name not in names)) if names else None


def to_schema(backend: Backend) -> str:
    """A backend request as the string that an operator's schema carries ("" for None)."""
    return ",".join(parse_backend(backend))


def from_schema(backend: str) -> tuple[str, ...] | None:
    """The inverse of `to_schema`."""
    return tuple(backend.split(",")) if backend else None
