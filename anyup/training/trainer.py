"""A run in progress: the upsampler, its optimizer, and its place in the data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

import anyup
from anyup.capture import DEVICES
from anyup.model import AnyUp
from anyup.training import samples, state
from anyup.training.config import ConfigError, Optimizer, Settings
from anyup.training.distributed import Engine
from anyup.training.initial import start_as_bilateral
from anyup.training.objective import Objective
from anyup.training.pass_graphs import PassGraphs
from anyup.training.randomness import number
from anyup.training.record import Record
from anyup.training.samples import Batch, FeatureSource, Step


class Trainer:
    """A run in progress: the upsampler, its optimizer and its place in the data."""

    def __init__(
        self, settings: Settings, upsampler: AnyUp, source: FeatureSource, paths: Sequence[Path], engine: Engine
    ) -> None:
        self.settings = settings
        self.source = source
        self.paths = list(paths)
        self.engine = engine
        self.step = 0
        self.samples = 0
        self.upsampler = upsampler.to(engine.device).train()
        objective = Objective(self.upsampler, settings.loss, settings.run.backend or None)
        self._terms = objective.names
        self._objective = engine.wrap(objective)
        self._parameters = [p for p in self.upsampler.parameters() if p.requires_grad]
        optimizer = settings.optimizer
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            optimizer.learning_rate,
            optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=engine.device.type in ("cpu", "cuda"),
        )
        # Gradients of half precision would vanish beside float16's smallest number.
        self._scaler = torch.amp.GradScaler(engine.device.type, enabled=settings.run.precision == "float16")
        self._graphs = PassGraphs(self._passes_alone, engine.device) if settings.run.graphs else None
        self._average = {name: t.detach().clone() for name, t in self.upsampler.state_dict().items()}
        # While a device works, the next step's tensors are made; a CPU has no hand free for that.
        self._pool = None if engine.device.type == "cpu" else ThreadPoolExecutor(1)
        self._next: tuple[int, Future[tuple[Step, list[Batch]]]] | None = None

    def advance(self) -> Record:
        """One step of the optimizer; what to log of it. Nothing waits for a GPU here."""
        optimizer = self.settings.optimizer
        rate = learning_rate(optimizer, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        step, numbers = self.backward()
        if self._scaler.is_enabled():
            numbers["scale"] = self._scaler.scale(torch.ones_like(numbers["loss"]))
        if optimizer.clip:
            self._scaler.unscale_(self._optimizer)
            numbers["norm"] = torch.nn.utils.clip_grad_norm_(self._parameters, optimizer.clip)
        self._scaler.step(self._optimizer)  # nothing where a gradient has overflowed
        self._scaler.update()
        self.step += 1
        self.samples += optimizer.batch
        self._keep_average()
        facts = {"encoder": step.encoder, "guidance_size": step.guidance_size, "input_size": step.input_size}
        return Record(self.step - 1, {"step": self.step, **facts, "learning_rate": rate}, numbers)

    def backward(self) -> tuple[Step, dict[str, Tensor]]:
        """The gradients of the next step's loss, in the parameters; the step, and its terms over all processes.

        In float16 the gradients are scaled.
        """
        engine = self.engine
        step, batches = self._take()
        # A sum over a process's samples, divided by these, has the whole step's mean as its mean over the processes.
        whole = len(step.samples) / engine.world
        augmented = sum(sample.augmented for sample in step.samples) / engine.world
        self._optimizer.zero_grad(set_to_none=True)
        # A process that has nothing to augment has the term all the same.
        sums = torch.zeros(len(self._terms), device=engine.device)
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            # Processes may have different numbers of micro-batches, and meet once: in the last one's backward pass.
            if self._graphs is not None and len(batches) == 1:
                terms, gradients = self._graphs(batch, whole, augmented)
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
            else:
                with engine.accumulating(self._objective, left > 0):
                    terms = self._passes(batch.to(engine.device), whole, augmented)
            sums += terms
        return step, dict(zip(self._terms, engine.mean(sums), strict=True))

    def _passes(self, batch: Batch, whole: float, augmented: float) -> Tensor:
        """Add a batch's gradients to those of the parameters; the terms of its loss."""
        with autocast(self.settings, self.engine.device):
            terms = self._objective(batch, whole, augmented)
        self._scaler.scale(terms["loss"]).backward()
        none = terms["loss"].detach().new_zeros(())
        return torch.stack([terms.get(name, none).detach() for name in self._terms])

    def _passes_alone(self, batch: Batch, whole: float, augmented: float) -> tuple[Tensor, list[Tensor | None]]:
        """The terms of a batch's loss, and its gradients alone."""
        self._optimizer.zero_grad(set_to_none=True)
        return self._passes(batch, whole, augmented), [parameter.grad for parameter in self._parameters]

    def _take(self) -> tuple[Step, list[Batch]]:
        """The next step and this process's part of it, in micro-batches."""
        if self._pool is None:
            return self._make(self.step, self.samples)
        ready = self._next[1].result() if self._next and self._next[0] == self.step else None
        ready = ready or self._make(self.step, self.samples)
        following = (self.step + 1, self.samples + self.settings.optimizer.batch)
        self._next = (following[0], self._pool.submit(self._make, *following))
        return ready

    def _make(self, number: int, first_sample: int) -> tuple[Step, list[Batch]]:
        settings, engine = self.settings, self.engine
        step = samples.plan(settings, self.source, len(self.paths), number, first_sample)
        mine = step.samples[engine.rank :: engine.world]
        size = settings.optimizer.micro_batch or len(mine)
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        batches = [samples.assemble(step, part, self.source, self.paths, settings.seed) for part in parts]
        return step, [batch.pinned() for batch in batches] if engine.device.type == "cuda" else batches

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
            self.engine.world,
            self._scaler.state_dict(),
        )
        state.save(path, current, self.shipped, self.upsampler)

    def resume(self, path: Path) -> list[str]:
        """Go on from a checkpoint; what has changed since, in words."""
        stored, shipped = state.load(path)
        if stored.settings["model.qk_dim"] != self.settings.model.qk_dim or stored.weights.keys() != shipped.keys():
            raise ValueError(f"{path}: holds another model; --resume goes on with the same one")
        self.upsampler.load_state_dict(stored.weights)
        self._optimizer.load_state_dict(stored.optimizer)
        if stored.scaler:
            self._scaler.load_state_dict(stored.scaler)
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
        if stored.processes not in (0, self.engine.world):
            changes.append(
                f"processes: {stored.processes} before, {self.engine.world} now; the samples stay, the sums of their "
                "gradients are rounded in another order"
            )
        return changes

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
    """A new upsampler with weights drawn for the seed, or those to start from.

    Frozen are what has no influence and what the settings name. Raises ConfigError where there is no such module, or
    none would be left to train.
    """
    arguments = dataclasses.asdict(settings.model)
    weights, initial, frozen = (arguments.pop(name) for name in ("weights", "initial", "frozen"))
    backend = settings.run.backend or None
    if weights:
        upsampler = anyup.load(weights, backend=backend, **arguments)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(settings.seed, "weights"))
            upsampler = AnyUp(**arguments, backend=backend)
            if initial == "bilateral":
                start_as_bilateral(upsampler)
    upsampler.cross_decode.cross_attn.attention.out_proj.requires_grad_(False)
    modules = dict(upsampler.named_modules())
    for name in frozen:
        if not name or name not in modules:
            there = ", ".join(child for child, _ in upsampler.named_children())
            raise ConfigError(f"model.frozen: expected modules of the upsampler ({there}, or in them), got {name!r}")
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in upsampler.parameters()):
        raise ConfigError("model.frozen: expected a module to be left that learns, got all of them")
    return upsampler


def require_backends(upsampler: AnyUp, settings: Settings) -> None:
    """Raise NotImplementedError, with every reason, where no step could run on the backend that is asked for."""
    device = upsampler.rope.freqs.device
    image = torch.zeros(1, 3, settings.guidance.largest, settings.guidance.largest, device=device)
    features = torch.zeros(1, 384, 14, 14, device=device)  # the encoders' are not known yet
    with autocast(settings, device):
        upsampler.explain(image, features).require()


def require_graphs(settings: Settings, engine: Engine) -> None:
    """Raise ConfigError where steps are to be CUDA graphs, and cannot be."""
    if settings.run.graphs and (engine.world > 1 or engine.device.type not in DEVICES):
        here = f"{engine.world} processes" if engine.world > 1 else f"a run on {engine.device}"
        raise ConfigError(f"run.graphs: expected one process on a GPU, got {here}")


def autocast(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    """What a step computes in."""
    precision = settings.run.precision
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Of a step, counted from 0: a linear warm-up, then constant or along half a cosine to the final fraction."""
    if step < optimizer.warmup:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup
    if optimizer.decay == "constant":
        return optimizer.learning_rate
    progress = min(1.0, (step - optimizer.warmup) / max(1, optimizer.steps - optimizer.warmup))
    fraction = optimizer.final_fraction + (1 - optimizer.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.learning_rate * fraction
