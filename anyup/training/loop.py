"""The run: photographs, cached features, steps of the optimizer, checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import anyup
from anyup.encoders import load_encoder
from anyup.images import complete_or_absent
from anyup.model import AnyUp
from anyup.training import distributed, samples, state, validation
from anyup.training.config import Optimizer, Settings
from anyup.training.feature_cache import FeatureCache, Recipe
from anyup.training.objective import Objective
from anyup.training.photographs import find_photographs, split
from anyup.training.randomness import number
from anyup.training.reporting import Rate, Reporter, duration
from anyup.training.samples import FeatureSource

LOG = "log.jsonl"
FINAL = "final.pth"


class Trainer:
    """A run in progress: the upsampler, its optimizer and its place in the data."""

    def __init__(
        self, settings: Settings, source: FeatureSource, paths: Sequence[Path], engine: distributed.Engine
    ) -> None:
        self.settings = settings
        self.source = source
        self.paths = list(paths)
        self.engine = engine
        self.step = 0
        self.samples = 0
        self.upsampler = make_upsampler(settings).to(engine.device).train()
        self._objective = engine.wrap(Objective(self.upsampler, settings.loss))
        self._parameters = [p for p in self.upsampler.parameters() if p.requires_grad]
        optimizer = settings.optimizer
        self._optimizer = torch.optim.AdamW(
            self._parameters, optimizer.learning_rate, optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self._average = {name: t.detach().clone() for name, t in self.upsampler.state_dict().items()}

    def advance(self) -> dict[str, Any]:
        """One step of the optimizer; what to log of it."""
        optimizer = self.settings.optimizer
        rate = learning_rate(optimizer, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        record = self.backward()
        if optimizer.clip:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, optimizer.clip)
            record["norm"] = norm.item()
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"step {self.step}: the loss is {record['loss']}; the last checkpoint is whole")
        self._optimizer.step()
        self.step += 1
        self.samples += optimizer.batch
        self._keep_average()
        return {"step": self.step, **record, "learning_rate": rate}

    def backward(self) -> dict[str, Any]:
        """The gradients of the next step's loss, in the parameters; its terms as this process saw them."""
        settings, engine = self.settings, self.engine
        step = samples.plan(settings, self.source, len(self.paths), self.step, self.samples)
        mine = step.samples[engine.rank :: engine.world]
        whole = len(step.samples) / engine.world
        augmented = sum(sample.augmented for sample in step.samples) / engine.world
        size = settings.optimizer.micro_batch or len(mine)
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for first in range(0, len(mine), size):
            part = mine[first : first + size]
            batch = samples.assemble(step, part, self.source, self.paths, settings.seed).to(engine.device)
            with self._autocast():
                terms = self._objective(batch, whole, augmented)
            terms["loss"].backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return {"encoder": step.encoder, "guidance": step.guidance_size, "input": step.input_size, **sums}

    @property
    def shipped(self) -> dict[str, Tensor]:
        """The weights to use: the average, where there is one."""
        return self._average if self.settings.optimizer.average else self.upsampler.state_dict()

    @contextmanager
    def shipped_weights(self) -> Iterator[AnyUp]:
        """The upsampler with the weights to use, until the block ends."""
        kept = {name: tensor.clone() for name, tensor in self.upsampler.state_dict().items()}
        self.upsampler.load_state_dict(self.shipped)
        try:
            yield self.upsampler
        finally:
            self.upsampler.load_state_dict(kept)

    def save(self, path: Path) -> None:
        settings = self.settings
        current = state.State(
            self.step,
            self.samples,
            {name: tensor.detach().cpu() for name, tensor in self.upsampler.state_dict().items()},
            self._optimizer.state_dict(),
            settings.flat(),
            self._photographs(),
        )
        state.save(path, current, self.shipped, self.upsampler)

    def resume(self, path: Path) -> list[str]:
        """Go on from a checkpoint; what has changed since, in words."""
        stored, shipped = state.load(path)
        if stored.settings["model.qk_dim"] != self.settings.model.qk_dim or stored.weights.keys() != shipped.keys():
            raise ValueError(f"{path}: holds another model; --resume goes on with the same one")
        self.upsampler.load_state_dict(stored.weights)
        self._optimizer.load_state_dict(stored.optimizer)
        self._average = {name: tensor.to(self.engine.device) for name, tensor in shipped.items()}
        self.step, self.samples = stored.step, stored.samples
        now = json.loads(json.dumps(self.settings.flat()))
        before = json.loads(json.dumps(stored.settings))
        changes = [
            f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if stored.photographs != self._photographs():
            changes.append("the photographs are others: the order of the samples changes")
        return changes

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.run.precision == "float32":
            return nullcontext()
        return torch.autocast(self.engine.device.type, torch.bfloat16)

    def _keep_average(self) -> None:
        decay = self.settings.optimizer.average
        if not decay:
            return
        # Early on a shorter memory: the first weights are noise.
        decay = min(decay, self.step / (self.step + 9))
        current = self.upsampler.state_dict()
        average = [self._average[name] for name in current]
        torch._foreach_lerp_(average, [t.detach() for t in current.values()], 1 - decay)

    def _photographs(self) -> str:
        names = "\n".join(path.name for path in self.paths)
        return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def make_upsampler(settings: Settings) -> AnyUp:
    """A new upsampler with weights drawn for the seed, or those to start from; what has no influence is frozen."""
    arguments = dataclasses.asdict(settings.model)
    weights = arguments.pop("weights")
    backend = settings.run.backend or None
    if weights:
        upsampler = anyup.load(weights, backend=backend, **arguments)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(settings.seed, "weights"))
            upsampler = AnyUp(**arguments, backend=backend)
    upsampler.cross_decode.cross_attn.attention.out_proj.requires_grad_(False)
    return upsampler


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Of a step, counted from 0: a linear warm-up, then constant or along half a cosine to the final fraction."""
    if step < optimizer.warmup:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup
    if optimizer.decay == "constant":
        return optimizer.learning_rate
    progress = min(1.0, (step - optimizer.warmup) / max(1, optimizer.steps - optimizer.warmup))
    fraction = optimizer.final_fraction + (1 - optimizer.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.learning_rate * fraction


def train(
    settings: Settings, *, resume: bool = False, cache_only: bool = False, reporter: Reporter | None = None
) -> None:
    """Run to the last step, or to an interruption, which leaves a checkpoint of the step it came in.

    The output folder gets `latest.pth`, `final.pth` at the end, the log (a JSON object for each step) and what
    TensorBoard reads. Raises ValueError, OSError or ImportError before any work where the settings cannot be met.
    """
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    output = Path(settings.output)
    latest = output / state.LATEST
    if not cache_only and latest.exists() and not resume:
        raise ValueError(f"output: {latest} exists; --resume goes on from it, output=FOLDER starts another run")
    if resume and not latest.is_file():
        raise FileNotFoundError(f"--resume: there is no checkpoint {latest}")
    found = find_photographs(settings.data.photographs)
    engine = distributed.start(_device(settings.run.device))
    try:
        reporter = reporter or Reporter(silent=not engine.first)
        source, held_out, paths, unseen = _prepare(settings, found, engine, reporter)
        if cache_only:
            return
        if settings.optimizer.batch < engine.world:
            raise ValueError(f"optimizer.batch: expected one sample for each of {engine.world} processes or more")
        trainer = Trainer(settings, source, paths, engine)
        if resume:
            changes = trainer.resume(latest)
            reporter.note(f"going on after step {trainer.step}" + "".join(f"\n  {change}" for change in changes))
        output.mkdir(parents=True, exist_ok=True)
        _loop(trainer, output, held_out, unseen, reporter)
    finally:
        engine.close()


def _prepare(
    settings: Settings, found: Sequence[Path], engine: distributed.Engine, reporter: Reporter
) -> tuple[FeatureCache, FeatureCache, list[Path], list[Path]]:
    """Caches that are full, for training and for validation, and the photographs of each."""
    data = settings.data
    learned, held_out = split(found, data.held_out_every)
    recipe = Recipe.of(data, max(settings.guidance.largest, data.crop_size), settings.seed)
    source = FeatureCache(data.cache, data.photographs, recipe)
    unseen = FeatureCache(data.cache, data.photographs, dataclasses.replace(recipe, views=1))
    reported: set[Path] = set()

    def broken(path: Path, error: Exception) -> None:
        if path not in reported:
            reported.add(path)
            reporter.note(f"left out: {error}")

    for name in settings.encoders:
        encoder = load_encoder(name, device=engine.device)
        for cache, paths, what in ((source, learned, "photographs"), (unseen, held_out, "held out")):
            mine = paths[engine.rank :: engine.world]
            rate = Rate()

            def done(count: int, total: int = len(mine), what: str = what, name: str = name, rate: Rate = rate) -> None:
                rate.count(count)
                left = f", {rate.left(total - count)} left" if count < total else ""
                reporter.tick(f"features of {name}: {count} of {total} {what}{left}", last=count == total)

            cache.fill(encoder, mine, done=done, broken=broken)
        del encoder
    engine.wait()
    usable = [path for path in learned if source.complete(path)]
    if not usable:
        raise ValueError(f"data.photographs: none of {len(learned)} in {data.photographs!r} can be used")
    return source, unseen, usable, [path for path in held_out if unseen.complete(path)]


def _loop(trainer: Trainer, output: Path, unseen: FeatureCache, held_out: Sequence[Path], reporter: Reporter) -> None:
    settings, engine = trainer.settings, trainer.engine
    run, steps = settings.run, settings.optimizer.steps
    held_out = list(held_out)[: run.validate_views or None]
    log = _Log(output / LOG, trainer.step) if engine.first else None
    scores = validation.baselines(unseen, held_out) if engine.first and held_out and run.validate_every else {}
    for name, methods in scores.items():
        told = ", ".join(f"{method} {score.distance:.4f}" for method, score in methods.items())
        reporter.note(f"held out, 1 - cosine, {name}: {told}")
    reporter.note(f"{len(trainer.paths)} photographs, step {trainer.step} of {steps}, on {engine.device}")
    rate, start = Rate(), trainer.step
    recent: list[dict[str, Any]] = []
    with _interruption(engine.world == 1) as interrupted:
        while trainer.step < steps and not interrupted.is_set():
            record = trainer.advance()
            rate.count(trainer.step - start)
            recent.append(record)
            if log:
                log.add(record)
            last = trainer.step == steps
            if trainer.step % run.log_every == 0 or last:
                reporter.tick(_progress(trainer, recent, rate, steps), last=last)
                recent.clear()
            if run.validate_every and held_out and (trainer.step % run.validate_every == 0 or last):
                if engine.first:
                    with trainer.shipped_weights() as upsampler:
                        found = validation.validate(upsampler, unseen, held_out, engine.device)
                    reporter.note(f"step {trainer.step}: held out, 1 - cosine: {_against(found, scores)}")
                    assert log
                    log.add({"step": trainer.step, "held_out": {n: dataclasses.asdict(s) for n, s in found.items()}})
                engine.wait()
            if engine.first and (trainer.step % run.save_every == 0 or last):
                trainer.save(output / state.LATEST)
            if engine.first and run.keep_every and trainer.step % run.keep_every == 0:
                trainer.save(output / f"step-{trainer.step:07d}.pth")
    if not engine.first:
        return
    if trainer.step < steps:
        trainer.save(output / state.LATEST)
        reporter.note(f"stopped after step {trainer.step}; --resume goes on")
    else:
        with trainer.shipped_weights() as upsampler:
            anyup.save(upsampler, output / FINAL)
        reporter.note(f"{output / FINAL}: step {trainer.step}, {duration(rate.elapsed)}")


def _progress(trainer: Trainer, recent: Sequence[dict[str, Any]], rate: Rate, steps: int) -> str:
    loss = sum(record["loss"] for record in recent) / len(recent)
    batch = trainer.settings.optimizer.batch
    return (
        f"step {trainer.step} of {steps}: loss {loss:.4f}, {rate.per_second * batch:.1f} samples/s, "
        f"{rate.left(steps - trainer.step)} left"
    )


def _against(found: dict[str, validation.Score], baselines: dict[str, dict[str, validation.Score]]) -> str:
    parts = []
    for name, score in found.items():
        bilinear = baselines[name]["bilinear"].distance
        parts.append(f"{name} {score.distance:.4f} ({score.distance / bilinear - 1:+.1%} of bilinear)")
    return ", ".join(parts)


class _Log:
    """A file with a JSON object on each line; what a resumed run does again is taken out of it."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        with complete_or_absent(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a killed run did not finish


def _device(name: str) -> torch.device:
    from anyup.demo import choose_device

    return choose_device(name or None)


@contextmanager
def _interruption(catches: bool) -> Iterator[threading.Event]:
    """Set when the process is asked to stop (SIGINT, SIGTERM); asked a second time, it stops at once."""
    event = threading.Event()
    if not catches or threading.current_thread() is not threading.main_thread():
        yield event
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def ask(kind: int, frame: FrameType | None) -> None:
        event.set()
        for other in kinds:
            signal.signal(other, before[other])

    for kind in kinds:
        signal.signal(kind, ask)
    try:
        yield event
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
