"""The settings of a run: frozen dataclasses, read from TOML and `key=value`, checked before any work."""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from anyup.command_paths import Kept, Read, ReadEncoder, ReadWeights, Written
from anyup.installing import pip_install
from anyup.options import MOST_THREADS
from anyup.suggestions import did_you_mean

CONFIGS = Path(__file__).parent / "configs"

DECAYS = ("constant", "cosine")
DRAWS = ("stride", "encoder")
INITIALS = ("random", "bilateral")
PRECISIONS = ("float32", "bfloat16", "float16")

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that is unknown, of another type, or makes no sense; the message names it."""


_PATH = "path"


def _path(kind: type[Read | Written | Kept]) -> Any:
    """A text that names a path of this kind; "": none."""
    return field(default="", metadata={_PATH: kind})


class RunFolder(Written):
    """The folder of a training's checkpoints and log."""

    holds = ("latest.pth", "final.pth", "step-*.pth", "log.jsonl", "tensorboard")


@dataclass(frozen=True)
class Data:
    """Where the photographs are, and what is taken of them; sizes in pixels."""

    photographs: str = _path(Read)
    cache: str = _path(Kept)  # folder of the stored views and features; "": none, the encoders run in each step
    held_out_every: int = 10  # for validation, by name; 0: none
    min_side: int = 448  # smaller photographs are left out
    image_size: int = 448  # side of the view whose crops give the true features
    crop_size: int = 224
    input_sizes: tuple[int, ...] = (224,)  # what the view is resized to for the features to upsample
    views: int = 1  # squares per photograph: the central one, then drawn ones
    view_scales: tuple[float, float] = (0.6, 1.0)  # sides of the drawn ones, as fractions of the short side
    crops: int = 8  # the pool of each view
    crops_per_sample: int = 4


@dataclass(frozen=True)
class Model:
    """Arguments of `anyup.AnyUp`, and weights to start from."""

    weights: str = _path(ReadWeights)
    initial: str = "random"  # without weights: torch's, or "bilateral"; see `anyup.training.initial`
    frozen: tuple[str, ...] = ()  # modules of it, whose weights stay as they are
    qk_dim: int = 128
    kernel_size: int = 1
    kernel_size_lfu: int = 5
    window_ratio: float = 0.1
    num_heads: int = 4
    init_gaussian_derivatives: bool = False
    lfu_dim: int = 128
    window: str = "ratio"


@dataclass(frozen=True)
class Optimizer:
    """AdamW, its schedule, and the average of the weights that is shipped."""

    steps: int = 100_000
    batch: int = 4  # of all processes together
    micro_batch: int = 0  # samples a process works on at a time; 0: all of its share
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-5
    warmup: int = 0  # steps
    decay: str = "constant"
    final_fraction: float = 0.0  # of the learning rate, where it decays to
    clip: float = 0.0  # largest norm of the gradient; 0: any
    average: float = 0.0  # decay of the exponential moving average of the weights; 0: none


@dataclass(frozen=True)
class Guidance:
    """The side of the guidance image: (first step, pixels), in the order of the steps."""

    schedule: tuple[tuple[int, int], ...] = ((0, 224),)

    def size(self, step: int) -> int:
        """Pixels at a step."""
        return max((first, side) for first, side in self.schedule if first <= step)[1]

    @property
    def largest(self) -> int:
        return max(side for _, side in self.schedule)


@dataclass(frozen=True)
class Loss:
    """Weights of the terms; 0 leaves a term out."""

    cosine: float = 1.0
    mse: float = 1.0
    input_consistency: float = 0.1
    self_consistency: float = 0.1
    place: float = 0.0  # maps known at every pixel; see `anyup.training.position_targets`
    # Side of the maps compared; 0: those of the reconstruction, whose clean half is there already.
    self_consistency_size: int = 224
    self_consistency_share: float = 1.0  # of the batch


@dataclass(frozen=True)
class Variation:
    """Changes to samples that make more of few photographs; see `anyup.training.feature_augmentations`."""

    turns: bool = False  # views are turned by quarters and mirrored, their features with them
    recolour: float = 0.0  # share of the samples whose guidance has other colours
    channels: float = 1.0  # smallest share of the channels that a step takes, in a drawn order; 1: all as they are
    synthetic: float = 0.0  # share of the steps whose features are made of the photographs themselves


@dataclass(frozen=True)
class Run:
    """How it runs, what it reports and which files it writes."""

    device: str = ""  # "": cuda where there is one, else cpu
    threads: int = 0  # of a CPU; 0: torch's choice
    precision: str = "bfloat16"
    backend: str = ""  # of the upsampler; "": the fastest that can
    graphs: bool = False  # whether steps whose shapes repeat run as CUDA graphs
    log_every: int = 10  # steps
    save_every: int = 500
    keep_every: int = 0  # steps between checkpoints that stay; 0: only the latest stays
    validate_every: int = 1000  # 0: never
    validate_views: int = 0  # held-out photographs that are looked at; 0: all
    tensorboard: bool = True


@dataclass(frozen=True)
class Settings:
    """All settings of `anyup train`."""

    output: str = _path(RunFolder)  # folder of the checkpoints and the log
    seed: int = 0
    encoders: tuple[str, ...] = field(default=(), metadata={_PATH: ReadEncoder})
    draw: str = "stride"  # what a step draws first: a stride, then an encoder of it; or any encoder alike
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    guidance: Guidance = field(default_factory=Guidance)
    loss: Loss = field(default_factory=Loss)
    variation: Variation = field(default_factory=Variation)
    run: Run = field(default_factory=Run)

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted name."""
        return dict(_flatten(dataclasses.asdict(self)))

    def paths(self) -> Iterator[tuple[str, Read | Written | Kept]]:
        """The settings that name something to read or to write, under their dotted names."""
        return _paths(self)


def read(config: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings in a file (or a shipped one: `mini`, `published`), changed by `key=value` texts.

    A value is written as in TOML; what is no TOML value is a string. Raises ConfigError or FileNotFoundError.
    """
    table = _parse(_find(config))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, as optimizer.steps=2000, got {override!r}")
        _put(table, key.strip(), _value(text))
    settings: Settings = _build(Settings, table, "")
    _check(settings)
    return settings


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.toml"))}


def _find(config: str) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    known = shipped()
    if config in known:
        return known[config]
    expected = f"config: expected a TOML file or one of {', '.join(known)}"
    raise FileNotFoundError(f"{expected}; there is no {config!r}{did_you_mean(config, known)}")


def _toml() -> Any:
    """The standard library's reader, or its forerunner on Python 3.10."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    raise ImportError(f"reading TOML on Python 3.10 needs tomli: {pip_install('tomli')}")


def _parse(path: Path) -> dict[str, Any]:
    toml = _toml()
    try:
        return dict(toml.loads(path.read_text(encoding="utf-8-sig")))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _value(text: str) -> Any:
    toml = _toml()
    try:
        return toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner: Any = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section} is no section")
        table = inner
    table[name] = value


def _build(kind: type[T], table: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in hints:
            raise ConfigError(f"{key}: there is no such setting{_nearest(key)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}: expected a section, got {value!r}")
            arguments[name] = _build(typing.cast(type, hint), value, f"{key}.")
        else:
            arguments[name] = _convert(value, hint, key)
    return kind(**arguments)


def _nearest(key: str) -> str:
    names = [*Settings().flat(), *(f.name for f in dataclasses.fields(Settings))]
    # A right name under no section or a wrong one.
    last = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in names if name.rsplit(".", 1)[-1] == last]
    return did_you_mean(elsewhere[0] if elsewhere else key, names, cutoff=0.5) or f"; there are {', '.join(names)}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the hint wants it: numbers, texts, truth values and tuples of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: expected a list of {_words(inner[0])}, got {value!r}")
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(value) != len(inner):
            raise ConfigError(f"{key}: expected {len(inner)} values, got {len(value)}: {value!r}")
        return tuple(_convert(v, i, f"{key}[{n}]") for n, (v, i) in enumerate(zip(value, inner, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{key}: expected {_words(hint)}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")
    return value


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {_words(typing.get_args(hint)[0])}"
    return {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[hint]


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _paths(section: Any, prefix: str = "") -> Iterator[tuple[str, Read | Written | Kept]]:
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{prefix}{each.name}.")
        elif kind := each.metadata.get(_PATH):
            yield from (
                (prefix + each.name, kind(path)) for path in (value if isinstance(value, tuple) else [value]) if path
            )


def _check(settings: Settings) -> None:
    """Raise ConfigError for values that no run can have."""
    flat = settings.flat()

    def need(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {flat[key]!r}")

    for key in ("output", "data.photographs"):
        need(key, bool(flat[key]), "a folder")
    need("encoders", bool(settings.encoders), "at least one name of anyup.encoders")
    need("encoders", len(set(settings.encoders)) == len(settings.encoders), "each encoder once")

    need("draw", settings.draw in DRAWS, f"one of {', '.join(DRAWS)}")
    data, optimizer, loss, run = settings.data, settings.optimizer, settings.loss, settings.run
    at_least_one = (
        "data.image_size data.crop_size data.views data.crops data.crops_per_sample optimizer.steps optimizer.batch "
        "run.log_every run.save_every"
    )
    for key in at_least_one.split():
        need(key, flat[key] >= 1, "1 or more")
    at_least_zero = (
        "data.min_side optimizer.micro_batch optimizer.weight_decay optimizer.warmup optimizer.clip loss.cosine "
        "loss.mse loss.input_consistency loss.self_consistency loss.self_consistency_size loss.place "
        "run.threads run.keep_every run.validate_every run.validate_views"
    )
    for key in at_least_zero.split():
        need(key, flat[key] >= 0, "0 or more")
    need("data.held_out_every", data.held_out_every == 0 or data.held_out_every > 1, "0, or 2 and more")
    need("data.crop_size", data.crop_size <= data.image_size, f"at most image_size, {data.image_size}")
    if data.cache:
        need("data.crops_per_sample", data.crops_per_sample <= data.crops, f"at most crops, {data.crops}")
    need("data.input_sizes", bool(data.input_sizes) and min(data.input_sizes) >= 1, "sizes of 1 or more")
    low, high = data.view_scales
    need("data.view_scales", 0 < low <= high <= 1, "two fractions, 0 < first <= second <= 1")
    need("model.initial", settings.model.initial in INITIALS, f"one of {', '.join(INITIALS)}")
    need("optimizer.learning_rate", optimizer.learning_rate > 0, "more than 0")
    need("optimizer.betas", all(0 <= beta < 1 for beta in optimizer.betas), "two numbers in [0, 1)")
    need("optimizer.decay", optimizer.decay in DECAYS, f"one of {', '.join(DECAYS)}")
    need("optimizer.final_fraction", 0 <= optimizer.final_fraction <= 1, "a number in [0, 1]")
    need("optimizer.average", 0 <= optimizer.average < 1, "a number in [0, 1)")
    steps = [first for first, _ in settings.guidance.schedule]
    need("guidance.schedule", bool(steps) and steps[0] == 0, "[first step, pixels] pairs that begin at step 0")
    need("guidance.schedule", steps == sorted(set(steps)), "steps that increase")
    need("guidance.schedule", all(side >= 1 for _, side in settings.guidance.schedule), "sides of 1 or more")
    need("loss.cosine", loss.cosine + loss.mse > 0, "loss.cosine or loss.mse more than 0")
    need("loss.self_consistency_share", 0 < loss.self_consistency_share <= 1, "a number in (0, 1]")
    need("variation.recolour", 0 <= settings.variation.recolour <= 1, "a number in [0, 1]")
    need("variation.channels", 0 < settings.variation.channels <= 1, "a number in (0, 1]")
    need("variation.synthetic", 0 <= settings.variation.synthetic <= 1, "a number in [0, 1]")
    need("run.threads", run.threads <= MOST_THREADS, f"at most {MOST_THREADS}")
    need("run.precision", run.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
