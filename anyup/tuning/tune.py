"""Finding the fastest config of each kernel on a card, and writing the table that the kernels look it up in.

For each case (a kernel, a dtype, how many keys a tile sees) the search starts at the rule's config and varies one
aspect after another, keeping what is faster. A config that does not compile, does not launch or is wrong is a result
like any other. The table on the disk is complete after each case, so that an interrupted run loses one case at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from anyup._version import __version__
from anyup.bench.attention_passes import HEAD_DIM, HEADS, WINDOW, AttentionPasses
from anyup.bench.clock import require_a_living_card
from anyup.bench.parity import ParityError
from anyup.bench.workloads import Workload, find, square
from anyup.command_paths import Paths, Written
from anyup.images import complete_or_absent
from anyup.installing import pip_install
from anyup.ops.kernel_device import device_reasons
from anyup.ops.window_attention import fused
from anyup.ops.window_attention.arguments import WindowAttentionProblem
from anyup.progress import Progress
from anyup.run_lock import only_run
from anyup.tuning.candidates import ASPECTS, QUICK_ASPECTS, variations
from anyup.window import Window

if TYPE_CHECKING:
    from anyup.kernels.config_tables import Case, Entry, KernelConfig
    from anyup.kernels.launch import Launch

WORKLOADS = (square(448, 32), square(1024, 64), square(224, 16), square(2048, 128))
"""What is tuned for, what is used most first."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

QUICK_WORKLOADS = WORKLOADS[:2]
QUICK_DTYPES = ("bfloat16", "float32")

_FORMAT = 1
"""Of a report."""

# Less is within the spread of the clock.
_LEAST_GAIN = 1.02
_ROUNDS = 3

Clock = Callable[["Launch"], float]
"""Seconds of a launch."""


class Passes(Protocol):
    """What the search asks of `AttentionPasses`."""

    workload: Workload

    @property
    def heads(self) -> int: ...

    def most_keys(self, rows: int, columns: int) -> int: ...

    def case(self, kernel: str) -> Case: ...

    def rule(self, kernel: str) -> Sequence[KernelConfig]: ...

    def fitted(self, kernel: str, config: KernelConfig) -> KernelConfig | None: ...

    def launch(self, kernel: str, config: KernelConfig) -> Launch: ...

    def check(self, kernel: str, config: KernelConfig) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a config: its time, or the reason why it has none."""

    config: KernelConfig
    seconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Search:
    """What was tried for a case, in that order.

    Attributes:
        case, workload: what for, and on which sizes.
        outcomes: of every config that was tried, the rule's first.
        rule: the time of the rule's config, None where no config of the rule ran.
        best: the fastest config, None where none ran.
        apart: the time of the kernels that can be run instead, where there are such and each has a config that ran.
    """

    case: Case
    workload: str
    outcomes: tuple[Outcome, ...]
    rule: float | None
    best: Outcome | None
    apart: float | None = None

    @property
    def gives_way(self) -> bool:
        """Whether the kernels that can be run instead are faster, beyond the clock's spread."""
        if self.apart is None or self.best is None or self.best.seconds is None:
            return False
        return self.best.seconds >= _LEAST_GAIN * self.apart

    @property
    def gain(self) -> float:
        """How many times as fast as the rule's config the best way is; 1.0 where one of them did not run."""
        if self.rule is None or self.best is None or self.best.seconds is None:
            return 1.0
        return self.rule / (self.apart if self.apart is not None and self.gives_way else self.best.seconds)

    @property
    def entry(self) -> Entry | None:
        """What a table says of it; None: nothing, no config ran."""
        from anyup.kernels.config_tables import Entry

        return None if self.best is None else Entry(None if self.gives_way else self.best.config, self.gain)

    def rows(self) -> Iterator[dict[str, Any]]:
        """An object for each config, for JSON; times in microseconds; `rule` says which one the rule would choose.

        No config is the best where other kernels run instead; their time is `apart`.
        """
        rules = None if self.rule is None else next(one for one in self.outcomes if one.seconds is not None)
        for outcome in self.outcomes:
            time = None if outcome.seconds is None else round(outcome.seconds * 1e6, 2)
            best = outcome is self.best and not self.gives_way
            found = {"us": time, "reason": outcome.reason, "best": best, "rule": outcome is rules}
            apart = {"apart": round(self.apart * 1e6, 2)} if self.apart is not None and self.gives_way else {}
            yield {**asdict(self.case), "workload": self.workload, "config": asdict(outcome.config), **found, **apart}

    def __str__(self) -> str:
        c = self.case
        head = f"{c.kernel}, {c.dtype}, {c.heads} heads of {c.head_dim}, up to {c.keys} keys ({self.workload})"
        failed = sum(outcome.seconds is None for outcome in self.outcomes)
        tried = f"{len(self.outcomes)} configs tried" + f", {failed} failed" * bool(failed)
        if self.best is None or self.best.seconds is None:
            return f"{head}: no config runs; {tried}"
        rule = "the rule's do not run" if self.rule is None else f"rule {self.rule * 1e6:.1f} us"
        instead = "" if self.apart is None else f", one kernel for each gradient {self.apart * 1e6:.1f} us"
        return f"{head}: {rule}, best {self.best.seconds * 1e6:.1f} us{instead}, {self.gain:.2f}x; {tried}"


def search(passes: Passes, kernel: str, clock: Clock, *, quick: bool = False) -> Search:
    """Find the fastest config of a kernel on a workload.

    The rule's config stays the best unless another one is faster beyond the clock's spread, seen twice.
    """
    found: dict[KernelConfig, Outcome] = {}

    def seconds(config: KernelConfig, *, again: bool = False) -> float:
        if again or config not in found:
            found[config] = _measure(passes, kernel, config, clock)
        outcome = found[config]
        return float("inf") if outcome.seconds is None else outcome.seconds

    rule = next((config for config in passes.rule(kernel) if seconds(config) < float("inf")), None)
    start = passes.rule(kernel)[0] if rule is None else rule
    best = start
    for _ in range(1 if quick else _ROUNDS):
        before = best
        for aspect in QUICK_ASPECTS if quick else ASPECTS:
            for other in variations(best, aspect, heads=passes.heads, most_keys=passes.most_keys):
                config = passes.fitted(kernel, other)
                if config is not None and seconds(config) < seconds(best):
                    best = config
        if best == before:
            break
    if rule is not None and best != rule and not seconds(rule, again=True) >= _LEAST_GAIN * seconds(best, again=True):
        best = rule
    outcome = found[best] if seconds(best) < float("inf") else None
    time = None if rule is None else found[rule].seconds
    return Search(passes.case(kernel), passes.workload.name, tuple(found.values()), time, outcome)


def _measure(passes: Passes, kernel: str, config: KernelConfig, clock: Clock) -> Outcome:
    try:
        passes.check(kernel, config)
        return Outcome(config, clock(passes.launch(kernel, config)))
    except ParityError as error:
        return Outcome(config, None, f"wrong: {error}")
    except Exception as error:  # the compiler's errors are of many kinds
        require_a_living_card(error)
        text = str(error).strip()
        return Outcome(config, None, f"{type(error).__name__}: {text.splitlines()[-1] if text else ''}")


def tune(
    device: torch.device,
    name: str,
    path: Path,
    clock: Clock,
    *,
    workloads: Sequence[Workload] = WORKLOADS,
    dtypes: Sequence[str] = tuple(DTYPES),
    kernels: Sequence[str] | None = None,
    quick: bool = False,
    make: Callable[[Workload, torch.dtype, torch.device], Passes] | None = None,
    progress: Progress | None = None,
) -> Iterator[Search]:
    """Search for each case, yield what was found, and keep the table up to date.

    Args:
        device: where kernels run.
        name: of the card, as the table names it.
        path: of the table; entries of other cases that it has stay, if it is a table of this card and these kernels.
        clock: what times a launch.
        workloads, dtypes: what for; of workloads that are one case, the first counts.
        kernels: all of them by default.
        quick: fewer configs for each.
        make: what gives the launches, `AttentionPasses` by default.
        progress: reports what is going on.
    """
    from anyup.kernels import config_tables

    progress = Progress() if progress is None else progress
    entries = dict(_kept(path, name, progress))
    seen: set[Case] = set()
    for workload in workloads:
        for dtype in dtypes:
            try:
                passes = (make or AttentionPasses)(workload, DTYPES[dtype], device)
            except torch.OutOfMemoryError as error:
                progress.note(f"{workload.name}, {dtype}: left out, out of memory ({str(error).splitlines()[0]})")
                continue
            times: dict[str, float] = {}
            for kernel in kernels or config_tables.KINDS:
                case = passes.case(kernel)
                if case in seen or not passes.rule(kernel):  # some are not for every workload
                    continue
                seen.add(case)
                with progress.stage(f"{kernel}, {dtype}, {workload.name}"):
                    found = search(passes, kernel, clock, quick=quick)
                if found.best is not None and found.best.seconds is not None:
                    times[kernel] = found.best.seconds
                if kernel == config_tables.AT_ONCE and times.keys() >= set(config_tables.APART):
                    found = replace(found, apart=sum(times[one] for one in config_tables.APART))
                entries.pop(case, None)
                if found.entry is not None:
                    entries[case] = found.entry
                _store(path, name, entries)
                yield found
            del passes  # before the next one takes as much memory


def _kept(path: Path, name: str, progress: Progress) -> Mapping[Case, Entry]:
    """The entries of the table that is there, none where it is not for this card and these kernels."""
    from anyup.kernels import config_tables

    try:
        return config_tables.load(path.read_text(encoding="utf-8"), name).entries
    except FileNotFoundError:
        return {}
    except ValueError as error:
        progress.note(f"{path} is made anew: {error}")
        return {}


def _store(path: Path, name: str, entries: Mapping[Case, Entry]) -> None:
    from anyup.kernels import config_tables

    table = config_tables.Table(name, entries, _made_with())
    with complete_or_absent(path) as partial:
        partial.write_text(config_tables.dump(table), encoding="utf-8")
    config_tables.in_force.cache_clear()  # so that this process finds it too


def _made_with() -> dict[str, str]:
    versions = {"anyup": __version__, "torch": torch.__version__, "triton": metadata.version("triton")}
    return {**versions, "on": datetime.now(timezone.utc).date().isoformat()}


# The command


def card(name: str | None = None) -> torch.device:
    """The card to tune, "cuda:0" by default; raises ValueError saying why kernels cannot be timed on it."""
    if find_spec("triton") is None:
        raise ValueError(f"no kernels to tune: triton is not installed (on Linux: {pip_install('triton')})")
    try:
        device = torch.device(name or "cuda:0")
    except RuntimeError as error:
        raise ValueError(f"device: expected a card as cuda:0, got {name!r}") from error
    if device.type != "cuda":
        raise ValueError(f"device: kernels are tuned on a GPU, as cuda:0, got {name!r}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no device" if built else f"this build of torch ({torch.__version__}) has no CUDA and no ROCm"
        raise ValueError(f"no GPU to tune the kernels on: {why}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there are {torch.cuda.device_count()} cards, got {name!r}")
    if reasons := device_reasons(device):
        raise ValueError(f"the kernels do not run on {name or device}: {'; '.join(reasons)}")
    return torch.device("cuda", device.index or 0)


def require_heads(number: int, width: int, window: Window, device: torch.device) -> None:
    """Raise ValueError unless the kernels take such heads, saying why not."""
    problem = WindowAttentionProblem(
        batch=1,
        output_size=(8, 8),
        grid_size=(2, 2),
        heads=number,
        head_dim=width,
        channels=16,
        query_dtype=torch.float16,
        value_dtype=torch.float16,
        device=device,
        window=window,
        needs_gradient=True,
    )
    if number < 1:
        raise ValueError(f"heads: expected at least one, got {number}")
    if reasons := fused.unsupported(problem):
        raise ValueError(f"heads: {'; '.join(reasons)}")


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """The precision of a card's products for a while, in torch's words; None: as it is."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if precision is not None:
            matmul.fp32_precision = "ieee" if precision == "highest" else "tf32"
        yield
    finally:
        matmul.fp32_precision = before


def table_path(name: str) -> Path:
    """Where the user's table of a card is written, its folder made; raises ValueError where tables are off."""
    from anyup.kernels import config_tables

    folder = config_tables.user_folder()
    if folder is None:
        variable = config_tables.VARIABLE
        raise ValueError(f"{variable} is {config_tables.OFF!r}: unset it, or name a folder for the table")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / config_tables.file_name(name)


def run(
    device: str | None = None,
    *,
    quick: bool = False,
    workloads: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    heads: tuple[int, int] = (HEADS, HEAD_DIM),
    window: Window = WINDOW,
    precision: str | None = None,
    report: Path | None = None,
) -> Path:
    """What `anyup tune` does: a line on stdout for each case, progress on stderr; the table's path.

    Args:
        device: the card, "cuda:0" by default.
        quick: two sizes, two dtypes and fewer configs for each.
        workloads, dtypes: names of sizes and of dtypes, instead of all.
        heads: their number and width.
        window: of the attention.
        precision: torch's matmul precision for float32, "highest" or "high"; None: the one that is set.
        report: a JSON file that says what became of every config, to be read by people or by a program.

    Raises ValueError, before any work, where kernels cannot be timed here or do not take such heads, or a name is none;
    OSError where the table cannot be written.
    """
    from anyup.bench.clock import CudaClock
    from anyup.images import check_writable

    sizes = [find(name) for name in workloads] if workloads else (QUICK_WORKLOADS if quick else WORKLOADS)
    place = card(device)
    require_heads(*heads, window, place)
    name = torch.cuda.get_device_name(place)
    path = check_writable(table_path(name), (".json",), "table")
    if report:
        Paths(written=[("table", Written(str(path))), ("report", Written(str(report)))]).require_apart()
    progress = Progress()
    progress.note(f"tuning on {name}; ctrl-C ends it and keeps what is found until then in {path}")
    clock = CudaClock(place, budget=0.03 if quick else 0.1)
    rows: list[dict[str, Any]] = []

    def make(workload: Workload, dtype: torch.dtype, device: torch.device) -> Passes:
        return AttentionPasses(workload, dtype, device, heads=heads[0], head_dim=heads[1], window=window)

    try:
        with only_run(path, progress.note), torch.cuda.device(place), matmul_precision(precision):
            for found in tune(
                place,
                name,
                path,
                clock,
                workloads=sizes,
                dtypes=dtypes or (QUICK_DTYPES if quick else tuple(DTYPES)),
                quick=quick,
                make=make,
                progress=progress,
            ):
                rows += found.rows()
                print(found, flush=True)
    finally:
        if report and rows:
            write_report({"format": _FORMAT, "device": name, **_made_with(), "rows": rows}, report)
    return path


def write_report(tune: Mapping[str, Any], path: Path) -> None:
    """Write what became of every config, a line of JSON for each, complete or not at all."""
    facts = {name: value for name, value in tune.items() if name != "rows"}
    rows = ",\n".join(map(json.dumps, tune["rows"]))
    with complete_or_absent(path) as partial:
        partial.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
