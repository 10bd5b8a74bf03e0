"""From a comparison to its rows: what can run, whether the results agree, times in turn, then memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyup.bench import baseline, cases, floors, graphs, high_resolution, machine, memory, parity
from anyup.bench.cases import DTYPES, Sizes, ThereAndBack
from anyup.bench.clock import require_a_living_card
from anyup.bench.floors import BOTH, FORWARD
from anyup.bench.implementations import Builder, with_chunk
from anyup.bench.results import Row
from anyup.bench.stages import STAGES, Stages, apart
from anyup.bench.suite import CODE, NATTEN, OURS, PUBLISHED, UNCHUNKED, Comparison, Implementation
from anyup.bench.timing import Clock, Time, Timing, interleave
from anyup.budget import free_memory

_TIMES_THE_FLOOR = {"reference": 12.0, OURS: 3.0, "torch": 3.0}
"""What a backend takes, roughly: to say beforehand what would take too long."""

_ONCE = 40.0
"""A call of more seconds is made once, cold: who is timed in turn with it would wait for long."""

_NOT_YET = Time(0.0)

_BASELINES = ("reference", PUBLISHED, CODE, UNCHUNKED, NATTEN)


@dataclass(frozen=True)
class Speeds:
    """How fast the machine is: operations a second of a matrix product by dtype, bytes a second of a copy."""

    rates: Mapping[str, float]
    bandwidth: float

    @staticmethod
    def measure(device: str, clock: Clock) -> Speeds:
        """On the device, now. A CPU's rate is that of float32 for all: what runs there computes in it."""
        on_card = torch.device(device).type == "cuda"
        measured = tuple(DTYPES) if on_card else ("float32",)
        rates = {d: machine.matmul_rate(dtype=DTYPES[d], device=device, clock=clock) for d in measured}
        rates = {d: rates.get(d, rates["float32"]) for d in DTYPES}
        return Speeds(rates, machine.copy_bandwidth(device=device, clock=clock))


@dataclass
class Entry:
    """An implementation on its way to a row.

    Attributes:
        call: what is timed; None where it does not run.
        first: the time of the first call, on a card of the second.
    """

    implementation: Implementation
    row: Row
    sizes: Sizes
    call: cases.Call | None = None
    first: Time = _NOT_YET

    @property
    def runs(self) -> bool:
        """Whether nothing has spoken against it so far."""
        return self.row["status"] == "ok"

    def mark(self, status: str, reason: str, **more: Any) -> None:
        """It does not run, and that is a result."""
        self.row.update(status=status, reason=reason, **more)
        self.call = None

    def mark_error(self, error: Exception) -> None:
        """An error is a result too, and others go on; raises CardLost where the card is lost by it."""
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        named = f"{type(error).__name__}: {reason}"
        if isinstance(error, parity.ParityError):
            self.mark("wrong", reason)
        elif isinstance(error, NotImplementedError):
            self.mark("unsupported", str(error))
        elif memory.is_for_want_of_memory(error):
            self.mark("out of memory", reason)
        elif self.implementation.backend in (CODE, NATTEN):
            # What others wrote may fail for reasons of its own.
            self.mark("unsupported", f"its code fails here: {named}")
        else:
            require_a_living_card(error)
            self.mark("failed", named)


@dataclass
class Engine:
    """Runs comparisons on one device.

    Attributes:
        speeds: for the floors.
        clock: seconds of a call.
        builder: of the calls.
        budget: calls that would take more seconds are left out.
        repeats: of each call, at most.
        patience: about as many seconds a comparison's calls are repeated for.
        measure_memory: of an implementation; None: the builder's way.
    """

    speeds: Speeds
    clock: Clock
    builder: Builder
    budget: float = 180.0
    repeats: int = 5
    patience: float = 40.0
    measure_memory: Callable[[Implementation, Sizes], memory.Memory] | None = None

    def run(self, comparison: Comparison) -> list[Row]:
        """The rows, one for each implementation; one whose result differs is not timed and "wrong".

        Raises CardLost where a card does not answer any more; `failed` gives the rows then.
        """
        try:
            if comparison.kind == "calls":
                entries = self._calls(comparison)
            else:
                (implementation,) = comparison.implementations
                entries = [self._entry(comparison, implementation)]
                self._foresee(entries[0])
                if entries[0].runs:
                    try:
                        (self._stages if comparison.kind == "stages" else self._high_resolution)(entries[0])
                    except Exception as error:
                        entries[0].mark_error(error)
            return [entry.row for entry in entries]
        finally:
            gc.collect()  # calls hold large tensors, some in cycles

    def failed(self, comparison: Comparison, error: Exception) -> list[Row]:
        """The rows of a comparison that an error took along."""
        entries = [self._entry(comparison, implementation) for implementation in comparison.implementations]
        for entry in entries:
            entry.mark("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return [entry.row for entry in entries]

    def prepare(self, comparison: Comparison) -> list[Entry]:
        """The implementations, those that run and agree with their calls: made once, their results compared."""
        entries = [self._entry(comparison, implementation) for implementation in comparison.implementations]
        for entry in entries:
            self._foresee(entry)
        self._ask_backends(entries)
        self._warm_and_compare(entries)
        return entries

    def _calls(self, comparison: Comparison) -> list[Entry]:
        entries = self.prepare(comparison)
        self._time([entry for entry in entries if entry.runs])
        for entry in entries:
            entry.call = None  # what it holds is gone before memory is measured
        measure_memory = self.measure_memory or self.builder.measure_memory
        for entry in entries:
            if entry.runs:
                entry.row["times_floor"] = entry.row["seconds"] / entry.row["floor_seconds"]
                if entry.implementation.has_memory:
                    try:
                        found = measure_memory(entry.implementation, entry.sizes)
                    except Exception as error:
                        entry.mark_error(error)
                        continue
                    entry.row.update(peak_bytes=found.peak_bytes, peak_is_exact=found.exact)
        _add_speed_ups(entries)
        return entries

    def _entry(self, comparison: Comparison, implementation: Implementation) -> Entry:
        sizes, workload = comparison.sizes, comparison.sizes.workload
        rate = self.speeds.rates[sizes.dtype]
        row: Row = {
            "id": comparison.identity(implementation),
            "group": comparison.group,
            "workload": workload.name,
            "size": list(workload.size),
            "grid": list(workload.grid),
            "channels": workload.channels,
            "batch": workload.batch,
            "operation": implementation.operation,
            "backend": implementation.backend,
            "dtype": sizes.dtype,
            "pass": sizes.direction,
            "status": "ok",
            "reason": None,
            "floor_seconds": self._floor(implementation, sizes),
            "matmul_rate": rate,
            "mean_window": workload.mean_window(floors.WINDOW),
        }
        return Entry(implementation, row, sizes)

    def _floor(self, implementation: Implementation, sizes: Sizes) -> float:
        rate, itemsize = self.speeds.rates[sizes.dtype], DTYPES[sizes.dtype].itemsize
        return floors.floor_seconds(
            implementation.work or implementation.operation,
            sizes.workload,
            rate,
            self.speeds.bandwidth,
            direction=sizes.direction,
            itemsize=itemsize,
        )

    def _foresee(self, entry: Entry) -> None:
        """What would take too long, or more memory than there is, is a result of its own."""
        implementation, workload = entry.implementation, entry.sizes.workload
        expected = _TIMES_THE_FLOOR.get(implementation.backend, 6.0) * entry.row["floor_seconds"]
        needed = 0
        dense = implementation.operation.startswith("window_attention") and implementation.backend == "reference"
        if dense or implementation.backend in (PUBLISHED, UNCHUNKED, CODE, NATTEN):
            expected = baseline.expected_seconds(workload, self.speeds.rates["float32"])
            expected *= 4 if entry.sizes.direction == BOTH else 1
        if implementation.backend in (PUBLISHED, UNCHUNKED, CODE):
            needed = baseline.least_bytes(workload)
            needed += baseline.unchunked_bytes(workload) if implementation.backend == UNCHUNKED else 0
        available = free_memory(torch.device(entry.sizes.device))
        if available is not None and needed > available:
            reason = f"needs more than {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
            entry.mark("out of memory", reason)
        elif expected > self.budget:
            reason = f"would take about {expected:.0f} s, the budget of a call is {self.budget:.0f} s"
            entry.mark("over budget", reason, expected_seconds=expected)

    def _ask_backends(self, entries: Sequence[Entry]) -> None:
        """Mark the backends that cannot run an operation, with their reasons."""
        alone = [entry for entry in entries if entry.implementation.operation in cases.OPERATIONS]
        for operation in dict.fromkeys(entry.implementation.operation for entry in alone):
            explained = {c.name: c for c in cases.explain(operation, alone[0].sizes).candidates}
            for entry in alone:
                candidate = explained.get(entry.implementation.backend)
                if entry.implementation.operation != operation:
                    continue
                if candidate is None:
                    entry.mark("unsupported", f"{operation} has no such backend")
                elif candidate.reasons or candidate.discouraged:
                    entry.mark("unsupported", "; ".join(candidate.reasons or candidate.discouraged))

    def _warm_and_compare(self, entries: Sequence[Entry]) -> None:
        """Build and make each call once; its result is held against the first baseline's, or against a sample."""
        expected: tuple[Implementation, cases.Call, Tensor] | None = None
        for entry in sorted(entries, key=lambda entry: _rank(entry.implementation)):
            if not entry.runs:
                continue
            try:
                result = self._first_call(entry)
                assert entry.call is not None
                size = entry.row["output_bytes"] = result.numel() * result.element_size()
                # What a head reads that comes after the upsampling is written first.
                before = entry.sizes.workload.output_bytes if entry.implementation.operation == "head_after" else 0
                entry.row["written_bytes"] = size + before
                if entry.implementation.backend == NATTEN:
                    continue  # its window is another one
                if _in_half(entry):
                    entry.row["difference"] = _half_error(entry, result)
                elif expected is None:
                    if entry.implementation.backend not in _BASELINES:
                        entry.row["difference"] = self._sampled_difference(entry, result)
                    expected = (entry.implementation, entry.call, result)
                elif _comparable(entry.implementation, expected[0]):
                    entry.row["difference"] = _difference(entry, (entry.call, result), expected[1:])
            except Exception as error:
                entry.mark_error(error)

    def _first_call(self, entry: Entry) -> Tensor:
        times = self.builder.chunk_times(entry.implementation, entry.sizes)
        entry.sizes = with_chunk(entry.sizes, times)
        if times is not None:
            entry.row["chunk"] = entry.sizes.chunk
            entry.row["chunk_times"] = {str(chunk or "all"): seconds for chunk, seconds in times.items()}
        entry.call = self.builder.build(entry.implementation, entry.sizes)
        made: list[Tensor] = []
        call = entry.call

        def run() -> None:
            made[:] = []  # a clock may call again
            made.append(call())

        if torch.device(entry.sizes.device).type == "cuda":
            run()  # kernels are compiled, which can take longer than any call
        entry.first = self.clock(run)
        return made.pop()

    def _sampled_difference(self, entry: Entry, result: Tensor) -> float | None:
        """Of ours, where no baseline ran: from the baseline at some pixels, or in half precision from float32."""
        sizes = entry.sizes
        if entry.implementation.operation.startswith("window_attention") and sizes.dtype == "float32":
            rows, exact = cases.attention_sample(entry.implementation.operation, sizes)
            return parity.check(result[:, rows], exact, entry.row["id"])
        if entry.implementation.operation != "model":
            return None
        return parity.check_sample(cases.model(device=sizes.device), sizes.workload)

    def _time(self, entries: Sequence[Entry]) -> None:
        """Those that are called once, the others in turn."""
        # Nobody runs the published forward unchunked where memory is short: its one time is to be seen, not compared.
        once = [entry for entry in entries if entry.first.wall > _ONCE or entry.implementation.backend == UNCHUNKED]
        quick = [entry for entry in entries if entry not in once]
        for entry in once:
            entry.row.update(Timing((entry.first,)).as_row())
        if not quick:
            return
        round_seconds = sum(entry.first.wall for entry in quick) * (2 if len(quick) > 1 else 1)
        repeats = max(min(self.repeats, 3), min(self.repeats, int(self.patience / max(round_seconds, 1e-9))))
        calls = {entry.row["id"]: entry.call for entry in quick if entry.call is not None}
        try:
            timings = interleave(calls, repeats, self.clock)
        except Exception as error:
            # As where each fits and together they do not: none has a time.
            for entry in quick:
                entry.mark_error(error)
            return
        for entry in quick:
            entry.row.update(timings[entry.row["id"]].as_row())

    def _stages(self, entry: Entry) -> None:
        sizes = entry.sizes
        model = cases.model(sizes.dtype, sizes.device)
        image, features = sizes.inputs()
        stages = Stages(model, image, features)
        whole = cases.build("anyup", sizes)
        tolerance = parity.TOLERANCE if sizes.dtype == "float32" else parity.HALF_TOLERANCE
        entry.row["difference"] = parity.check(stages.output(), whole(), entry.row["id"], tolerance)
        entry.row.update(self._times_of(stages, torch.device(sizes.device)))
        entry.row.update(interleave({"": whole}, self.repeats, self.clock)[""].as_row())
        entry.row["times_floor"] = entry.row["seconds"] / entry.row["floor_seconds"]

    def _times_of(self, stages: Stages, device: torch.device) -> Row:
        """The stages' times: on a card by a profile of a graph's replay, where no kernel waits for the host."""
        if device.type == "cuda":
            try:
                kernels = graphs.kernels_of(stages, device)
            except RuntimeError as error:  # NotImplementedError among them
                require_a_living_card(error)
                reason = f"each stage is timed alone, no replay could be profiled: {str(error).splitlines()[0]}"
                return {"stages": stages.seconds(self.repeats, self.clock), "reason": reason}
            seconds = dict.fromkeys(STAGES, 0.0)
            for kernel in kernels:
                seconds[kernel.stage] = seconds.get(kernel.stage, 0.0) + kernel.seconds
            seconds.pop("", None)
            return {"stages": apart(seconds), "kernels": [tuple(kernel) for kernel in kernels]}
        return {"stages": stages.seconds(self.repeats, self.clock)}

    def _high_resolution(self, entry: Entry) -> None:
        found = high_resolution.measure(entry.implementation.case, torch.get_num_threads())
        seconds = found.pop("wall_seconds")
        entry.row.update(found, **Timing((Time(seconds),)).as_row())
        entry.row["times_floor"] = seconds / entry.row["floor_seconds"]


def _rank(implementation: Implementation) -> tuple[int, str]:
    """What others are held against comes first."""
    backend = implementation.backend
    return (_BASELINES.index(backend) if backend in _BASELINES else len(_BASELINES)), backend


def _comparable(implementation: Implementation, expected: Implementation) -> bool:
    """The attention of other values has another result; a head has the same before the upsampling and after it."""
    return implementation.operation not in cases.OPERATIONS or implementation.operation == expected.operation


def _in_half(entry: Entry) -> bool:
    """Whether it is a whole forward in half precision, where the baseline's result is no measure."""
    forward = entry.implementation.operation == "model" and entry.sizes.direction == FORWARD
    return forward and entry.sizes.dtype != "float32"


def _half_error(entry: Entry, result: Tensor) -> float:
    """Of a result, against float64; a baseline's may be as large as it is."""
    sizes, name = entry.sizes, entry.row["id"]
    tolerance = math.inf if entry.implementation.backend in _BASELINES else parity.HALF_TOLERANCE
    return parity.check_half(cases.model(sizes.dtype, sizes.device), sizes.workload, result, name, tolerance)


def _difference(entry: Entry, found: tuple[cases.Call, Tensor], expected: tuple[cases.Call, Tensor]) -> float:
    name, sizes = entry.row["id"], entry.sizes
    tolerance = parity.TOLERANCE if sizes.dtype == "float32" else parity.HALF_TOLERANCE
    try:
        difference = parity.check(found[1], expected[1], name, tolerance)
    except parity.ParityError:
        if (entry.implementation.operation, sizes.dtype, sizes.direction) != ("model", "float32", FORWARD):
            raise
        model = cases.model(device=sizes.device)
        difference = parity.check_by_exact(model, sizes.workload, found[1], expected[1], name)
    if isinstance(found[0], ThereAndBack) and isinstance(expected[0], ThereAndBack):
        difference = max(difference, parity.check_gradients(found[0].leaves, expected[0].leaves, name))
    return difference


def _add_speed_ups(entries: Sequence[Entry]) -> None:
    """Of ours, beside the slower definition of the same: the published forward, or an operation's reference."""
    times = {entry.implementation.backend: entry.row["seconds"] for entry in entries if entry.runs}
    base = next((times[name] for name in (PUBLISHED, "reference") if name in times), None)
    for entry in entries:
        if base is not None and entry.runs and entry.implementation.backend not in _BASELINES:
            entry.row["speed_up"] = base / entry.row["seconds"]
