"""What the suite measures: comparisons, each of some implementations on one workload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from anyup.bench import high_resolution, published_code
from anyup.bench.cases import OPERATIONS, Sizes
from anyup.bench.floors import BOTH
from anyup.bench.workloads import CURVE, REACH, TRAINING, UNIFICATION, WORKLOADS, square

OURS = "anyup"
PUBLISHED = "published"
UNCHUNKED = "published, unchunked"
GRAPH = "anyup, CUDA graph"
CODE = "published code"
NATTEN = "published code, NATTEN"

WITH_CHUNKS = (PUBLISHED, CODE)
"""Baselines that take some queries at a time."""

BACKENDS = ("torch", "triton", "flex", "reference")


@dataclass(frozen=True)
class Implementation:
    """Something that is timed.

    Attributes:
        operation: what it computes, as rows name it.
        backend: by what, as rows name it.
        case: as `anyup.bench.cases.build` knows it, or `PublishedCode.build`.
        has_memory: whether its memory is measured too, which takes another call.
        work: whose floor it has, as `anyup.bench.floors` knows it; "" where that is the operation.
    """

    operation: str
    backend: str
    case: str
    has_memory: bool = True
    work: str = ""


@dataclass(frozen=True)
class Comparison:
    """Implementations that are timed in turn, each a row of the results.

    Attributes:
        group: one of `anyup.bench.arguments.GROUPS`.
        sizes: workload, dtype, direction and device.
        implementations: the first one is ours.
        kind: "calls"; "stages" of the first implementation; or a "high-resolution" case, whose name is `case`.
    """

    group: str
    sizes: Sizes
    implementations: tuple[Implementation, ...]
    kind: str = "calls"

    @property
    def name(self) -> str:
        """For people."""
        what = ", ".join(dict.fromkeys(c.operation for c in self.implementations))
        more = "" if self.sizes.dtype == "float32" else f", {self.sizes.dtype}"
        return f"{self.group}: {what}, {self.sizes.workload.name}{more}"

    def identity(self, implementation: Implementation) -> str:
        """The row's id, by which an interrupted run goes on."""
        sizes = self.sizes
        parts = (
            self.group,
            implementation.operation,
            sizes.workload.name,
            sizes.dtype,
            sizes.direction,
            implementation.backend,
        )
        return "/".join(parts)


def comparisons(device: str, *, quick: bool = False, published: bool = False, natten: bool = False) -> list[Comparison]:
    """All that is measured on a device.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        quick: two sizes, forward alone: in float32, on a card in bfloat16 and as CUDA graphs too.
        published: a checkout of the published code is there; `natten`: its second variant can run too.
    """
    code = (CODE,) * published + (NATTEN,) * (published and natten)
    return list(_quick(device, code) if quick else _whole(device, code))


def essential(device: str) -> dict[str, list[Comparison]]:
    """What a new card is asked first, what tells most before the rest: whole calls, then those that learn."""
    whole, learning = [], []
    for workload in (REACH[1], REACH[0], REACH[2], square(2048, 128)):
        for dtype in ("bfloat16", "float32"):
            sizes = Sizes(workload, dtype, device=device)
            whole += [_model(sizes, OURS, GRAPH, PUBLISHED, group=_group(dtype)), _stages(sizes)]
    for workload in REACH[:2]:
        learning.append(_model(Sizes(workload, direction=BOTH, device=device), OURS, PUBLISHED, group="backward"))
    for dtype in ("bfloat16", "float32"):
        sizes = Sizes(TRAINING, dtype, BOTH, device)
        step = Implementation("training_step", OURS, "training_step", work="model")
        learning.append(Comparison("backward", sizes, (step,)))
    return {"model": whole, "backward": learning}


def _group(dtype: str) -> str:
    return "model" if dtype == "float32" else "dtype"


def _quick(device: str, code: tuple[str, ...]) -> Iterator[Comparison]:
    graph, dtypes = ((GRAPH,), ("float32", "bfloat16")) if device != "cpu" else ((), ("float32",))
    for dtype in dtypes:
        for workload in REACH[:2]:
            more = (*graph, *code) if dtype == "float32" else graph
            yield _model(Sizes(workload, dtype, device=device), OURS, *more, PUBLISHED, group=_group(dtype))
        yield _stages(Sizes(REACH[1], dtype, device=device))


def _whole(device: str, code: tuple[str, ...]) -> Iterator[Comparison]:
    on_card = device != "cpu"
    graph = (GRAPH,) * on_card
    plain = ("torch",) * on_card  # on a CPU it is what runs anyway
    for workload in WORKLOADS:
        unchunked = (UNCHUNKED,) if workload in REACH else ()
        yield _model(Sizes(workload, device=device), OURS, *graph, *plain, *code, PUBLISHED, *unchunked)
    for workload in CURVE:
        if workload not in WORKLOADS:
            yield _model(Sizes(workload, device=device), OURS, group="curve")
    for dtype in ("float32", "bfloat16") if on_card else ("float32",):
        for workload in REACH:
            yield _stages(Sizes(workload, dtype, device=device))
    for workload in REACH if on_card else REACH[:2]:
        for operation in OPERATIONS:
            if operation not in ("feature_unification", "window_attention_of_classes"):
                yield _operation(operation, Sizes(workload, device=device))
    yield _operation("feature_unification", Sizes(UNIFICATION, device=device), group="unification")
    for workload in REACH[1:]:
        sizes = Sizes(workload, device=device)
        works = {"head_before": "model_of_classes", "head_after": "model"}
        whole = [Implementation(case, OURS, case, work=work) for case, work in works.items()]
        yield Comparison("head", sizes, tuple(whole))
        alone = ("window_attention_of_classes", "window_attention")
        best = "triton" if on_card else "torch"
        yield Comparison("head", sizes, tuple(Implementation(case, best, f"{case}/{best}") for case in alone))
    for dtype in ("bfloat16", "float16"):
        for workload in REACH if on_card else REACH[1:2]:
            more = (*graph, *plain, PUBLISHED) if on_card else ()
            yield _model(Sizes(workload, dtype, device=device), OURS, *more, group="dtype")
            for operation in OPERATIONS if on_card else ():
                yield _operation(operation, Sizes(workload, dtype, device=device), group="dtype")
    yield Comparison(
        "backward",
        Sizes(TRAINING, direction=BOTH, device=device),
        (Implementation("training_step", OURS, "training_step", work="model"),),
    )
    for workload in REACH[:2]:
        baseline = (PUBLISHED,) if workload == REACH[0] else ()
        yield _model(Sizes(workload, direction=BOTH, device=device), OURS, *plain, *baseline, group="backward")
    small = square(224, 16)
    for operation in ("window_attention", "query_encoder", "key_encoder", "query_projection"):
        yield _operation(operation, Sizes(small, direction=BOTH, device=device), group="backward")
    yield _operation("feature_unification", Sizes(square(448, 32), direction=BOTH, device=device), group="backward")
    if not on_card:
        for name in high_resolution.REACH:
            case = high_resolution.CASES[name]
            implementation = Implementation(case.what, OURS, name, work="model_of_classes" if case.head else "model")
            yield Comparison("high-resolution", Sizes(case.workload), (implementation,), "high-resolution")


def _model(sizes: Sizes, *backends: str, group: str = "model") -> Comparison:
    cases = {
        OURS: "anyup",
        GRAPH: "anyup",
        "torch": "anyup/torch",
        PUBLISHED: "published",
        UNCHUNKED: "published",
        CODE: published_code.DENSE,
        NATTEN: published_code.NEIGHBOURHOOD,
    }
    # A second run of a baseline for its memory is worth it where claims are made.
    measured = cases if sizes.workload in REACH else (OURS,)
    implementations = (Implementation("model", name, cases[name], has_memory=name in measured) for name in backends)
    return Comparison(group, sizes, tuple(implementations))


def _stages(sizes: Sizes) -> Comparison:
    return Comparison("stages", sizes, (Implementation("model", OURS, "anyup", has_memory=False),), "stages")


def _operation(operation: str, sizes: Sizes, group: str = "operation") -> Comparison:
    backends = [b for b in BACKENDS if b != "flex" or operation.startswith("window_attention")]
    return Comparison(group, sizes, tuple(Implementation(operation, b, f"{operation}/{b}") for b in backends))
