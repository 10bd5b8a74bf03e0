"""The run from the settings to the weights: prepare, step, report, keep."""

from __future__ import annotations

import dataclasses
import signal
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyup
from anyup.devices import choose_device
from anyup.photographs import find_photographs
from anyup.reporting import Rate, Reporter, duration
from anyup.run_lock import folder_for, only_run
from anyup.stopping import on_request
from anyup.training import distributed, state, validation
from anyup.training.config import Settings
from anyup.training.log import Log
from anyup.training.preparation import Prepared, prepare
from anyup.training.record import Record
from anyup.training.trainer import Trainer, make_upsampler, require_backends, require_graphs

FINAL = "final.pth"


def train(
    settings: Settings, *, resume: bool = False, cache_only: bool = False, reporter: Reporter | None = None
) -> int | None:
    """Run to the last step, or to an interruption, which leaves a checkpoint of the step it came in.

    The output folder gets `latest.pth`, `final.pth` at the end, the log (a JSON object for each step) and what
    TensorBoard reads. Returns the number of the signal that interrupted it, None where all is done. Raises ValueError,
    OSError or ImportError before any work where the settings cannot be met.
    """
    if cache_only and not settings.data.cache:
        raise ValueError("--cache-only: data.cache names no folder")
    output = Path(settings.output)
    latest = output / state.LATEST
    reporter = reporter or Reporter(silent=not distributed.is_first())
    with ExitStack() as stack:
        if not cache_only:
            _claim(stack, output, latest, resume, reporter)
        if settings.data.cache:
            stack.enter_context(folder_for(settings.data.cache))
        # Weights, widths or a backend that there are not are met now, not after all features.
        upsampler = None if cache_only else make_upsampler(settings)
        found = find_photographs(settings.data.photographs)
        engine = stack.enter_context(distributed.start(choose_device(settings.run.device or None)))
        if settings.optimizer.batch < engine.world:
            raise ValueError(f"optimizer.batch: expected one sample or more for each of {engine.world} processes")
        require_graphs(settings, engine)
        if upsampler is not None:
            require_backends(upsampler.to(engine.device), settings)
        prepared = prepare(settings, found, engine, reporter)
        if upsampler is None:
            return None
        trainer = Trainer(settings, upsampler, prepared.source, prepared.paths, engine)
        if resume:
            changes = trainer.resume(latest)
            reporter.note(f"going on after step {trainer.step}" + "".join(f"\n  {change}" for change in changes))
        return _Run(trainer, prepared, output, reporter).go()


def _claim(stack: ExitStack, output: Path, latest: Path, resume: bool, reporter: Reporter) -> None:
    """Make the output folder, for this run alone, with a checkpoint in it or none as is asked for."""
    stack.enter_context(folder_for(output))
    if distributed.is_first():
        stack.enter_context(only_run(latest, reporter.note))
    if latest.exists() and not resume:
        raise ValueError(f"output: {latest} exists; --resume goes on from it, output=FOLDER starts another run")
    if resume and not latest.is_file():
        raise FileNotFoundError(f"--resume: there is no checkpoint {latest}")


class _Run:
    """The steps of a trainer, with its reports and its files."""

    def __init__(self, trainer: Trainer, prepared: Prepared, output: Path, reporter: Reporter) -> None:
        self._trainer, self._settings, self._engine = trainer, trainer.settings, trainer.engine
        self._output, self._reporter = output, reporter
        run = self._settings.run
        self._unseen = prepared.held_out_source
        self._held_out = prepared.held_out[: run.validate_views or None] if run.validate_every else []
        self._baselines: dict[str, dict[str, validation.Score]] = {}
        self._log = Log(output, trainer.step, run.tensorboard) if self._engine.first else None
        self._rate, self._start = Rate(), trainer.step
        self._done: deque[Record] = deque()
        self._recent: list[dict[str, Any]] = []

    def go(self) -> int | None:
        """To the last step or an interruption, whose signal is returned; asked a second time, it stops at once."""
        trainer, engine, steps = self._trainer, self._engine, self._settings.optimizer.steps
        self._introduce()
        asked: list[int] = []
        with on_request(asked.append):
            self._rate = Rate()
            while trainer.step < steps and not engine.any(bool(asked)):
                self._take(trainer.advance())
            self._note()
        if self._log:
            self._log.close()
        if trainer.step < steps:
            if engine.first:
                trainer.save(self._output / state.LATEST)
                self._reporter.note(f"stopped after step {trainer.step}; --resume goes on")
            return asked[0] if asked else signal.SIGTERM  # another process was asked
        if not engine.first:
            return None
        with trainer.shipped_weights() as upsampler:
            anyup.save(upsampler, self._output / FINAL)
        self._reporter.note(f"{self._output / FINAL}: step {trainer.step}, {duration(self._rate.elapsed)}")
        return None

    def _introduce(self) -> None:
        trainer, reporter = self._trainer, self._reporter
        if self._log and self._log.missing:
            reporter.note(self._log.missing)
        if self._engine.first and self._held_out:
            self._baselines = validation.baselines(self._unseen, self._held_out)
        for name, methods in self._baselines.items():
            scores = ", ".join(f"{method} {score.distance:.4f}" for method, score in methods.items())
            reporter.note(f"held out, 1 - cosine, {name}: {scores}")
        steps = self._settings.optimizer.steps
        reporter.note(f"{len(trainer.paths)} photographs, step {trainer.step} of {steps}, on {self._engine.device}")

    def _note(self, unread: int = 0) -> None:
        """Write down all steps but the last so many, whose numbers a device may not have yet."""
        while len(self._done) > unread:
            record = self._done.popleft().read()
            self._recent.append(record)
            if self._log:
                self._log.step(record)

    def _take(self, record: Record) -> None:
        """What follows a step."""
        trainer, run, first = self._trainer, self._settings.run, self._engine.first
        step, last = trainer.step, trainer.step == self._settings.optimizer.steps
        self._rate.count(step - self._start)
        self._done.append(record)
        every = (run.log_every, run.save_every, *([run.keep_every] if run.keep_every else []))
        validates = bool(self._held_out) and (step % run.validate_every == 0 or last)
        # Nothing is kept of a step that failed.
        self._note(unread=0 if last or validates or not all(step % each for each in every) else 1)
        if step % run.log_every == 0 or last:
            self._report(last)
        if validates:
            if first:
                self._validate()
            self._engine.wait()
        if first and (step % run.save_every == 0 or last):
            trainer.save(self._output / state.LATEST)
        if first and run.keep_every and step % run.keep_every == 0:
            trainer.save(self._output / f"step-{step:07d}.pth")

    def _report(self, last: bool) -> None:
        step, steps = self._trainer.step, self._settings.optimizer.steps
        speed = self._rate.per_second * self._settings.optimizer.batch
        loss = sum(record["loss"] for record in self._recent) / len(self._recent)
        left = self._rate.time_left(steps - step)
        self._reporter.tick(f"step {step} of {steps}: loss {loss:.4f}, {speed:.1f} samples/s{left}", last=last)
        if self._log:
            self._log.means(self._recent, speed)
        self._recent.clear()

    def _validate(self) -> None:
        with self._trainer.shipped_weights() as upsampler:
            scores = validation.validate(upsampler, self._unseen, self._held_out, self._engine.device)
        lines = []
        for name, score in scores.items():
            bilinear = self._baselines[name]["bilinear"].distance
            lines.append(f"{name} {score.distance:.4f} ({score.distance / bilinear - 1:+.1%} of bilinear)")
        self._reporter.note(f"step {self._trainer.step}: held out, 1 - cosine: {', '.join(lines)}")
        if self._log:
            self._log.held_out(self._trainer.step, {name: dataclasses.asdict(s) for name, s in scores.items()})
