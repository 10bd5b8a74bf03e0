"""Tables of configs measured on a card, which come before the rule: one JSON file for each kind of card.

`anyup tune` writes them. The user's table, in the cache folder, comes before the one that is shipped in `configs/`.
If neither has an entry, or the entry does not fit the sizes, the rule of `window_attention_config.py`
decides. The environment variable `ANYUP_CONFIGS` names another folder in place of the user's, or is "off": then no
table is read.

A table belongs to one kind of card and to the sources of the kernels it was measured with. A file is read once in a
process, and no look-up waits for the device.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from .window_attention_config import BackwardGridConfig, BackwardQueryConfig, ForwardConfig, MostKeys

KernelConfig = ForwardConfig | BackwardQueryConfig | BackwardGridConfig

KINDS: Mapping[str, type[KernelConfig]] = {
    "forward": ForwardConfig,
    "backward_query": BackwardQueryConfig,
    "backward_key": BackwardGridConfig,
    "backward_value": BackwardGridConfig,
    "backward_key_value": BackwardGridConfig,
}
"""The kernels of the window attention, and what configs each."""

AT_ONCE, APART = "backward_key_value", ("backward_key", "backward_value")
"""The kernel of two gradients, and the kernels of one each that can be run instead."""

DTYPES = ("float16", "bfloat16", "float32")
VARIABLE = "ANYUP_CONFIGS"
OFF = "off"
FORMAT = 1
"""The version of the file format; a file of another version is not read."""

# The number of partial sums of a gradient is not stored: it changes the result, which would depend on the card.
_NOT_STORED = ("partials",)
_SHIPPED = Path(__file__).parent / "configs"


class TableError(ValueError):
    """A file is not a table of configs; the message says what is wrong, without the file's name."""


class OtherTable(ValueError):
    """A valid table for other kernels or another card."""


@dataclass(frozen=True)
class Case:
    """The case that a config was measured for.

    Attributes:
        kernel: one of `KINDS`.
        dtype: of queries and keys, and of values where theirs differs: "bfloat16", "float16, float32".
        precision: of products of float32, Triton's `input_precision`; "" where all operands are of two bytes.
        heads, head_dim: the number and the width of the heads.
        keys: the most keys that a tile of 8 x 8 pixels sees, rounded up to a power of two.
    """

    kernel: str
    dtype: str
    precision: str
    heads: int
    head_dim: int
    keys: int

    def __post_init__(self) -> None:
        if self.kernel not in KINDS:
            raise ValueError(f"kernel: expected one of {', '.join(KINDS)}, got {self.kernel!r}")
        if not all(name in DTYPES for name in self.dtype.split(", ")):
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, or two, got {self.dtype!r}")
        for name in ("heads", "head_dim", "keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.keys & (self.keys - 1):
            raise ValueError(f"keys: expected a power of two, got {self.keys}")


def rounded_keys(most_keys: MostKeys) -> int:
    """The `keys` of a case."""
    return 1 << (most_keys(8, 8) - 1).bit_length()


@dataclass(frozen=True)
class Entry:
    """The fastest config, and the time of the rule's config divided by its time (1.0 for the rule's config itself).

    `config` None, for the kernel of keys and values at once: a kernel for each was faster.
    """

    config: KernelConfig | None
    gain: float = 1.0


@dataclass(frozen=True)
class Table:
    """Entries measured on one kind of card with one state of the kernels.

    Attributes:
        device: the card's name in torch.
        entries: by case.
        made_with: versions and date, for the reader of the file.
        kernels: digest of the kernels' sources.
    """

    device: str
    entries: Mapping[Case, Entry]
    made_with: Mapping[str, str] = field(default_factory=dict)
    kernels: str = field(default_factory=lambda: kernels_digest())


@cache
def kernels_digest() -> str:
    """A digest of the sources of the attention's kernels and of their rule, but for comments and docstrings."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted(folder.glob("window_*.py")), folder / "products.py"):
        digest.update(f"{path.name}\n{_without_comments(path.read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()[:16]


def _without_comments(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        # A docstring, and the text below a constant.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def file_name(device: str) -> str:
    """The name of a card's file."""
    return (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device") + ".json"


def user_folder() -> Path | None:
    """Where the user's tables are, whether or not there are any; None where `ANYUP_CONFIGS` is "off"."""
    named = os.environ.get(VARIABLE, "").strip()
    if named:
        return None if named.lower() == OFF else Path(os.path.expanduser(named))
    home = Path(os.path.expanduser("~"))  # unlike Path.home(), no error where there is none
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "anyup" / "configs"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "anyup" / "Cache" / "configs"
    # The specification wants a path that is not absolute to be ignored.
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else home / ".cache") / "anyup" / "configs"


# Files


def dump(table: Table) -> str:
    """The text of a table's file, an entry a line."""
    head = {"format": FORMAT, "device": table.device, "kernels": table.kernels, "made_with": dict(table.made_with)}
    rows = []
    for case, entry in sorted(table.entries.items(), key=lambda item: _order(item[0])):
        config = entry.config and {
            name: value for name, value in asdict(entry.config).items() if name not in _NOT_STORED
        }
        rows.append(json.dumps({**asdict(case), "config": config, "gain": round(entry.gain, 4)}))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    return "\n".join(["{", *lines, ' "entries": [', ",\n".join(f"  {row}" for row in rows), " ]", "}"]) + "\n"


def _order(case: Case) -> tuple[Any, ...]:
    return (list(KINDS).index(case.kernel), *asdict(case).values())


def load(text: str, device: str) -> Table:
    """The table of a card in the text of a file.

    Raises TableError for what is no table, OtherTable for one of another card, another format or other kernels.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"no JSON: {error}") from error
    stored = _object(stored, "the file")
    number = stored.get("format")
    if type(number) is not int:
        raise TableError(f"format: expected an integer, got {number!r}")
    if number != FORMAT:
        raise OtherTable(f"format {number}, this version of anyup reads {FORMAT}")
    kernels, owner = (_typed(stored, name, str, "the file") for name in ("kernels", "device"))
    if owner != device:
        raise OtherTable(f"made for {owner}")
    if kernels != kernels_digest():
        raise OtherTable(f"made with other kernels ({kernels}) than these ({kernels_digest()})")
    made_with = {str(name): str(value) for name, value in _object(stored.get("made_with", {}), "made_with").items()}
    rows = stored.get("entries")
    if not isinstance(rows, list):
        raise TableError(f"entries: expected a list, got {type(rows).__name__}")
    entries: dict[Case, Entry] = {}
    for number, row in enumerate(rows):
        case, entry = _entry(row, f"entry {number}")
        if case in entries:
            raise TableError(f"entry {number}: a second one for {case}")
        entries[case] = entry
    return Table(device, entries, made_with, kernels)


def _entry(row: object, where: str) -> tuple[Case, Entry]:
    stored = _object(row, where)
    known = {name.name: _typed(stored, name.name, str if name.type == "str" else int, where) for name in fields(Case)}
    try:
        case = Case(**known)
    except ValueError as error:
        raise TableError(f"{where}: {error}") from error
    gain = stored.get("gain", 1.0)
    if type(gain) not in (int, float) or not 0 < gain < float("inf"):
        raise TableError(f"{where}: gain: expected a positive number, got {gain!r}")
    config = stored.get("config")
    if config is None and "config" in stored and case.kernel == AT_ONCE:
        return case, Entry(None, float(gain))
    return case, Entry(_config_of(case, _object(config, f"{where}: config"), f"{where}: config"), float(gain))


def _config_of(case: Case, stored: Mapping[str, Any], where: str) -> KernelConfig:
    kind = KINDS[case.kernel]
    wanted = {f.name: bool if f.type == "bool" else int for f in fields(kind) if f.name not in _NOT_STORED}
    if unknown := set(stored) - set(wanted):
        raise TableError(f"{where}: {case.kernel} has no {', '.join(sorted(unknown))}; it has {', '.join(wanted)}")
    values: dict[str, Any] = {name: _typed(stored, name, kind, where) for name, kind in wanted.items()}
    if kind is BackwardGridConfig:
        values["partials"] = 1
    try:
        config = kind(**values)
    except ValueError as error:
        raise TableError(f"{where}: {error}") from error
    if (heads := getattr(config, "heads", 0)) and case.heads % heads:
        raise TableError(f"{where}: heads: expected a divisor of {case.heads}, got {heads}")
    return config


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TableError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _typed(stored: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A value of exactly this type: to Python True is an integer too."""
    if name not in stored:
        raise TableError(f"{where}: {name} is missing")
    if type(stored[name]) is not kind:
        raise TableError(f"{where}: {name}: expected {kind.__name__}, got {stored[name]!r}")
    return stored[name]


# What is in force


@dataclass(frozen=True)
class InForce:
    """The entries that hold for a card, the user's before the shipped ones, and a line about each file looked for."""

    entries: Mapping[Case, Entry]
    descriptions: tuple[str, ...]


@cache
def in_force(device: str) -> InForce:
    """The tables of a card by its name, read once in a process.

    A file that is no table gives one warning that names it, and is ignored; one for other kernels is ignored.
    """
    folder = user_folder()
    if folder is None:
        return InForce({}, (f"{VARIABLE}={OFF}: no table is read",))
    entries: dict[Case, Entry] = {}
    descriptions = []
    for whose, place in (("shipped", _SHIPPED), ("user's", folder)):
        path = place / file_name(device)
        try:
            table = load(path.read_text(encoding="utf-8"), device)
        except (FileNotFoundError, NotADirectoryError):
            descriptions.append(f"{whose}: none ({path})")
        except OtherTable as other:
            descriptions.append(f"{whose}: ignored, {other} ({path})")
        except (OSError, ValueError) as error:
            descriptions.append(f"{whose}: ignored, {error} ({path})")
            warnings.warn(f"anyup: the table of kernel configs {path} is ignored: {error}", stacklevel=2)
        else:
            entries.update(table.entries)
            made = ", ".join(f"{name} {value}" for name, value in table.made_with.items())
            descriptions.append(f"{whose}: {len(table.entries)} entries{f', {made}' * bool(made)} ({path})")
    return InForce(entries, tuple(descriptions))


def before_the_rule(
    rule: Sequence[KernelConfig], case: Case, *, device: str, most_keys: MostKeys, channels: int
) -> Sequence[KernelConfig]:
    """The configs to try in order: a card's measured one for the case, where there is one that fits, then the rule's.

    There is none where other kernels were faster.
    """
    entry = in_force(device).entries.get(case)
    if entry is None:
        return rule
    if entry.config is None:
        return []
    config = fitted(entry.config, rule, most_keys=most_keys, channels=channels)
    return rule if config is None else [config, *(other for other in rule if other != config)]


def held(config: Any, most_keys: MostKeys) -> dict[str, int]:
    """The number of resident blocks that hold the keys of every tile, by attribute.

    A config may end with a smaller block, `tail_keys`, which is left out where it is of no use.
    """
    blocks, left = divmod(most_keys(config.rows, config.columns), config.block_keys)
    tail = getattr(config, "tail_keys", None)
    if tail is None:
        return {"resident_blocks": blocks + (left > 0)}
    if blocks and 0 < left <= tail:
        return {"resident_blocks": blocks}
    return {"resident_blocks": blocks + (left > 0), "tail_keys": 0}


def fitted(
    config: KernelConfig, rule: Sequence[KernelConfig], *, most_keys: MostKeys, channels: int
) -> KernelConfig | None:
    """A config for these sizes; None where its resident blocks do not hold the keys of every tile.

    Blocks and channel slices that would be empty are left out, and sums are made in the rule's number of parts.
    """
    changed: dict[str, int] = {}
    if resident := getattr(config, "resident_blocks", 0):
        changed = held(config, most_keys)
        if changed["resident_blocks"] > resident:
            return None
    if slices := getattr(config, "slices", 0):
        changed["slices"] = min(slices, -(-channels // config.channel_slice))
    if isinstance(config, BackwardGridConfig):
        changed["partials"] = rule[0].partials
    return replace(config, **changed)
