"""Tables of measured configs: their files, where they are looked for, and which config a kernel is launched with."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate
from support.recipe import INTERPRETED, AttentionShape, attention_tensors
from torch import Tensor

from anyup.kernels import config_tables, window_attention_config
from anyup.kernels.config_tables import Case, Entry, OtherTable, Table, TableError
from anyup.kernels.window_attention_config import BackwardGridConfig, BackwardQueryConfig, ForwardConfig, check
from anyup.ops import window_attention
from anyup.ops.window_attention import fused

FORWARD = ForwardConfig(4, 8, 16, 3, 32, 1, num_warps=2, num_stages=1, row_partials=2, load_once=False, piece=16)
QUERY = BackwardQueryConfig(4, 8, 16, 0, 16, num_warps=2, num_stages=1, heads=2, load_once=False, piece=16)
SHAPE = AttentionShape((11, 9), (5, 4), channels=20, head_dim=16)
GRID = BackwardGridConfig(4, 8, 32, 16, 2, 1, num_warps=2, num_stages=1, heads=1, load_once=False, piece=16)


def case(kernel: str = "forward", **changed: Any) -> Case:
    known = {"dtype": "float16", "precision": "", "heads": 2, "head_dim": 16, "keys": 64, **changed}
    return Case(kernel, **known)


def table(device: str = "cpu", **changed: Any) -> Table:
    """A table with an entry for each kind of config."""
    configs = {"forward": FORWARD, "backward_query": QUERY, "backward_key": GRID, "backward_value": GRID}
    entries = {case(kernel): Entry(config, 1.25) for kernel, config in configs.items()}
    return Table(device, entries, {"triton": "3.9.0"}, **changed)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The folders of the shipped tables and of the user's, empty, and nothing read so far."""
    shipped, users = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    users.mkdir()
    monkeypatch.setattr(config_tables, "_SHIPPED", shipped)
    monkeypatch.setenv(config_tables.VARIABLE, str(users))
    config_tables.in_force.cache_clear()
    yield shipped, users
    config_tables.in_force.cache_clear()


# Configs check themselves


@pytest.mark.parametrize("config", [FORWARD, QUERY, GRID])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", 3, "rows: expected a power of two, got 3"),
        ("rows", 1, r"rows \* columns: expected at least 16, got 8"),
        ("channel_slice", 8, "channel_slice: expected at least 16, got 8"),
        ("piece", 8, "piece: expected at least 16, got 8"),
        ("num_warps", 64, "num_warps: expected at most 32, got 64"),
        ("num_stages", 0, "num_stages.*: expected"),
    ],
)
def test_a_config_that_no_kernel_takes_is_refused(config: Any, name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(config, **{name: value}))


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (FORWARD, "block_keys", 24, "block_keys: expected a power of two, got 24"),
        (FORWARD, "row_partials", 16, "row_partials: expected at most half of 16 keys, got 16"),
        (FORWARD, "slices", 0, "slices.*: expected"),
        (FORWARD, "resident_blocks", -1, "resident_blocks.*: expected"),
        (QUERY, "block_keys", 8, "block_keys: expected at least 16, got 8"),
        (QUERY, "heads", -1, "heads: expected at least 0, got -1"),
        (GRID, "block_pixels", 8, "block_pixels: expected at least 16, got 8"),
        (GRID, "partials", 0, "partials: expected at least 1, got 0"),
    ],
)
def test_what_only_some_configs_have_is_checked_too(config: Any, name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(config, **{name: value}))


# Files


def test_a_table_is_read_as_it_was_written() -> None:
    written = table()
    assert config_tables.load(config_tables.dump(written), "cpu") == written
    apart = Table("cpu", {case(config_tables.AT_ONCE): Entry(None, 1.5)})
    assert config_tables.load(config_tables.dump(apart), "cpu") == apart


def test_the_file_has_a_line_for_each_entry_and_no_number_of_parts() -> None:
    text = config_tables.dump(table())
    assert sum('"config"' in line for line in text.splitlines()) == 4
    assert '"partials"' not in text
    assert config_tables.load(config_tables.dump(Table("cpu", {})), "cpu").entries == {}


def changed_row(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored["entries"][0].update(changed)


def changed_config(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored["entries"][0]["config"].update(changed)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no format": (lambda s: s.pop("format"), "format: expected an integer, got None"),
    "no device": (lambda s: s.pop("device"), "the file: device is missing"),
    "entries no list": (lambda s: s.update(entries={}), "entries: expected a list, got dict"),
    "entry no object": (lambda s: s["entries"].append(7), "entry 4: expected an object, got int"),
    "a second entry": (lambda s: s["entries"].append(s["entries"][0]), "entry 4: a second one for Case"),
    "another kernel": (changed_row(kernel="sideways"), "entry 0: kernel: expected one of forward, backward_query"),
    "another dtype": (changed_row(dtype="int8"), "entry 0: dtype: expected one of float16"),
    "keys between": (changed_row(keys=65), "entry 0: keys: expected a power of two, got 65"),
    "heads as text": (changed_row(heads="2"), "entry 0: heads: expected int, got '2'"),
    "heads as truth": (changed_row(heads=True), "entry 0: heads: expected int, got True"),
    "gain not finite": (changed_row(gain=float("inf")), "entry 0: gain: expected a positive number, got inf"),
    "no config": (changed_row(config=None), "entry 0: config: expected an object, got NoneType"),
    "a fraction": (changed_config(rows=4.0), "entry 0: config: rows: expected int, got 4.0"),
    "truth as a number": (changed_config(load_once=1), "entry 0: config: load_once: expected bool, got 1"),
    "no power of two": (changed_config(rows=6), "entry 0: config: rows: expected a power of two, got 6"),
    "unknown attribute": (changed_config(depth=1), "entry 0: config: forward has no depth; it has rows, columns"),
    "attribute missing": (lambda s: s["entries"][0]["config"].pop("rows"), "entry 0: config: rows is missing"),
    "heads that do not divide": (
        lambda s: s["entries"][1]["config"].update(heads=3),
        "entry 1: config: heads: expected a divisor of 2, got 3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_says_what_is_wrong(name: str) -> None:
    change, message = BROKEN[name]
    stored = json.loads(config_tables.dump(table()))
    change(stored)
    with pytest.raises(TableError) as raised:
        config_tables.load(json.dumps(stored), "cpu")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0", "[]", "null"])
def test_a_file_that_is_no_object_of_json_is_no_table(text: str) -> None:
    with pytest.raises(TableError, match="no JSON|the file: expected an object"):
        config_tables.load(text, "cpu")


def test_tables_of_other_kernels_cards_and_formats_are_told_apart_from_broken_ones() -> None:
    for text, message in (
        (config_tables.dump(table(kernels="0123")), r"made with other kernels \(0123\) than these"),
        (config_tables.dump(table(device="abacus")), "made for abacus"),
        (config_tables.dump(table()).replace('"format": 1', '"format": 2'), "format 2, this version of anyup reads 1"),
    ):
        with pytest.raises(OtherTable, match=message):
            config_tables.load(text, "cpu")


def test_the_digest_changes_with_the_code_of_a_kernel_and_of_the_rule_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        config_tables.kernels_digest.cache_clear()
        return config_tables.kernels_digest()

    for path in Path(config_tables.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = digest()
    monkeypatch.setattr(config_tables, "__file__", str(tmp_path / "config_tables.py"))
    try:
        assert digest() == before
        (tmp_path / "launch_pad.py").write_text("")
        assert digest() == before
        kernel = tmp_path / "window_attention_forward.py"
        kernel.write_bytes(kernel.read_bytes().replace(b"\n", b"\r\n"))  # as git may check out
        assert digest() == before
        for name in ("window_attention_forward.py", "products.py", "window_attention_config.py"):
            now, text = digest(), (tmp_path / name).read_text()
            (tmp_path / name).write_text(text + "\n# A comment.\n")
            assert digest() == now
            (tmp_path / name).write_text(text.replace('"""', '"""In other words: ', 1))
            assert digest() == now
            (tmp_path / name).write_text(text + "\nX = 1\n")
            assert digest() != now
    finally:
        config_tables.kernels_digest.cache_clear()


# Where tables are looked for


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/anyup/configs"),
        ("linux", {"XDG_CACHE_HOME": "{home}/elsewhere"}, "{home}/elsewhere/anyup/configs"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "{home}/.cache/anyup/configs"),
        ("darwin", {}, "{home}/Library/Caches/anyup/configs"),
        ("win32", {}, "{home}/AppData/Local/anyup/Cache/configs"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "{home}/local/anyup/Cache/configs"),
        ("linux", {"ANYUP_CONFIGS": "~/tables"}, "{home}/tables"),
        ("linux", {"ANYUP_CONFIGS": "  "}, "{home}/.cache/anyup/configs"),
        ("linux", {"ANYUP_CONFIGS": "Off"}, None),
    ],
)
def test_the_user_s_folder_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "ANYUP_CONFIGS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    found = config_tables.user_folder()
    assert found == (None if expected is None else Path(expected.format(home=tmp_path)))


def test_a_card_s_file_is_named_after_it() -> None:
    assert config_tables.file_name("NVIDIA GeForce RTX 3060 Laptop GPU") == "nvidia-geforce-rtx-3060-laptop-gpu.json"
    assert config_tables.file_name("../../x") == "x.json"


def test_the_user_s_table_comes_before_the_shipped_one(folders: tuple[Path, Path]) -> None:
    shipped, users = folders
    (shipped / "cpu.json").write_text(config_tables.dump(table()))
    faster = replace(FORWARD, num_warps=8)
    (users / "cpu.json").write_text(config_tables.dump(Table("cpu", {case(): Entry(faster, 2.0)})))
    found = config_tables.in_force("cpu")
    assert found.entries[case()] == Entry(faster, 2.0)
    assert found.entries[case("backward_key")] == Entry(GRID, 1.25)
    assert [line.split(" (")[0] for line in found.descriptions] == [
        "shipped: 4 entries, triton 3.9.0",
        "user's: 1 entries",
    ]
    assert config_tables.in_force("another card").entries == {}


def test_off_means_no_table_at_all(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (folders[0] / "cpu.json").write_text(config_tables.dump(table()))
    monkeypatch.setenv(config_tables.VARIABLE, "off")
    assert config_tables.in_force("cpu") == config_tables.InForce({}, ("ANYUP_CONFIGS=off: no table is read",))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", None])
def test_a_broken_table_is_named_once_and_ignored(folders: tuple[Path, Path], content: bytes | None) -> None:
    shipped, users = folders
    (shipped / "cpu.json").write_text(config_tables.dump(table()))
    path = users / "cpu.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"the table of kernel configs .*cpu\.json is ignored") as warned:
        found = [config_tables.in_force("cpu") for _ in range(3)]
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    assert len(found[0].entries) == 4
    assert found[0].descriptions[1].startswith("user's: ignored, ")


def test_a_table_of_other_kernels_is_ignored_with_a_reason_and_without_a_warning(folders: tuple[Path, Path]) -> None:
    (folders[1] / "cpu.json").write_text(config_tables.dump(table(kernels="0123")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = config_tables.in_force("cpu")
    assert found.entries == {}
    assert "ignored, made with other kernels (0123)" in found.descriptions[1]


def test_a_table_is_read_once_in_a_process(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "cpu.json"
    path.write_text(config_tables.dump(table()))
    before = config_tables.in_force("cpu")
    path.write_text("{")
    assert config_tables.in_force("cpu") is before


def test_reading_a_table_imports_nothing_that_knows_a_device() -> None:
    tree = ast.parse(Path(config_tables.__file__).read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {"." * n.level + str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name for name in imports if name.split(".")[0] not in sys.stdlib_module_names} == {
        ".window_attention_config"
    }


def test_what_is_shipped_are_tables_of_these_kernels() -> None:
    for path in (Path(config_tables.__file__).parent / "configs").glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert config_tables.load(path.read_text(), device) and path.name == config_tables.file_name(device)


# Which config a kernel gets


def test_a_config_is_fitted_to_the_sizes() -> None:
    rule = [replace(GRID, partials=7)]

    def fitted(config: Any, keys: int, channels: int = 384) -> Any:
        return config_tables.fitted(config, rule, most_keys=lambda rows, columns: keys, channels=channels)

    assert fitted(FORWARD, 48) == FORWARD  # three blocks of 16 keys
    assert fitted(FORWARD, 49) is None
    assert fitted(FORWARD, 17) == replace(FORWARD, resident_blocks=2)
    streamed = replace(FORWARD, resident_blocks=0, slices=4)
    assert fitted(streamed, 10_000) == streamed
    assert fitted(streamed, 10_000, channels=70) == replace(streamed, slices=3)
    assert fitted(GRID, 5, channels=3) == replace(GRID, partials=7, slices=1)
    assert fitted(QUERY, 5) == QUERY


def test_a_case_counts_keys_in_powers_of_two() -> None:
    counts = {1: 1, 2: 2, 3: 4, 64: 64, 65: 128}
    assert {n: config_tables.rounded_keys(lambda rows, columns, n=n: n) for n in counts} == counts


@pytest.mark.parametrize(
    ("query", "value", "dtype", "precision"),
    [
        (torch.float16, torch.float16, "float16", ""),
        (torch.float32, torch.float32, "float32", "ieee"),
        (torch.bfloat16, torch.float32, "bfloat16, float32", "ieee"),
    ],
)
def test_a_case_names_the_dtypes_and_the_precision_where_it_matters(
    query: torch.dtype, value: torch.dtype, dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "dot_precision", lambda: "ieee")
    tensors = attention_tensors(SHAPE)
    q, k, v = tensors["query"].to(query), tensors["key"].to(query), tensors["value"].to(value)
    found = fused.case("forward", q, k, v, SHAPE.window)
    assert (found.dtype, found.precision, found.heads, found.head_dim) == (dtype, precision, 2, 16)


def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
    return window_attention(query, key, value, window=SHAPE.window, backend=backend)


@pytest.fixture
def measured(folders: tuple[Path, Path]) -> dict[str, Any]:
    """A table in force, for half precision on this device, of configs that no rule has; by kernel."""
    tensors = attention_tensors(SHAPE, dtype=torch.float16)
    configs: dict[str, Any] = {
        "forward": replace(FORWARD, resident_blocks=8),
        "backward_query": QUERY,
        "backward_key": GRID,
        "backward_value": replace(GRID, columns=4),
        "backward_key_value": replace(GRID, rows=4),
    }
    entries = {
        fused.case(kernel, *tensors.values(), SHAPE.window): Entry(config)  # type: ignore[misc, arg-type]
        for kernel, config in configs.items()
    }
    (folders[1] / "cpu.json").write_text(config_tables.dump(Table("cpu", entries)))
    return configs


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The configs that launches are planned with, by kernel."""
    from anyup.kernels import window_attention_backward_grid as grid
    from anyup.kernels import window_attention_backward_key_value as both
    from anyup.kernels import window_attention_backward_query as query
    from anyup.kernels import window_attention_forward as forward

    planned: dict[str, list[Any]] = {}

    def record(module: Any, kernel: str) -> None:
        plan = getattr(module, f"plan_{kernel}")

        def recorded(*tensors: Tensor, config: Any, **others: Any) -> Any:
            planned.setdefault(kernel, []).append(config)
            return plan(*tensors, config=config, **others)

        monkeypatch.setattr(module, f"plan_{kernel}", recorded)

    for module, kernel in (
        (forward, "forward"), (query, "backward_query"), (grid, "backward_key"), (grid, "backward_value"),
        (both, "backward_key_value"),
    ):  # fmt: skip
        record(module, kernel)
    return planned


@INTERPRETED
@pytest.mark.parametrize("together", [False, True])
def test_each_kernel_is_launched_with_its_measured_config_and_right(
    together: bool, measured: dict[str, Any], launched: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr(window_attention_config, "backward_key_value_configs", lambda *_, **__: [])
    assert_backend_accurate(run, attention_tensors(SHAPE, dtype=torch.float16), backend="triton")
    apart = {"backward_key", "backward_value"}
    assert launched.keys() == measured.keys() - (apart if together else {"backward_key_value"})
    for kernel, (config, *others) in launched.items():
        assert not others
        wanted = measured[kernel]
        if kernel == "forward":  # as many blocks as hold the keys
            wanted = replace(wanted, resident_blocks=config.resident_blocks)
            assert 0 < config.resident_blocks <= 8
        assert config == wanted


@INTERPRETED
def test_one_kernel_for_each_gradient_runs_where_that_was_faster(
    measured: dict[str, Any], launched: dict[str, list[Any]], folders: tuple[Path, Path]
) -> None:
    path = folders[1] / "cpu.json"
    stored = json.loads(path.read_text())
    for row in stored["entries"]:
        row["config"] = None if row["kernel"] == config_tables.AT_ONCE else row["config"]
    path.write_text(json.dumps(stored))
    assert_backend_accurate(run, attention_tensors(SHAPE, dtype=torch.float16), backend="triton")
    assert launched.keys() == measured.keys() - {config_tables.AT_ONCE}


@INTERPRETED
def test_another_dtype_gets_the_rule_s_config(measured: dict[str, Any], launched: dict[str, list[Any]]) -> None:
    run(**attention_tensors(SHAPE), backend="triton")
    assert launched["forward"] != [measured["forward"]] and launched["forward"][0].columns == 8


@INTERPRETED
def test_where_the_measured_config_is_refused_the_rule_s_runs(
    measured: dict[str, Any], launched: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    from anyup.kernels.launch import Launch

    launch = Launch.__call__

    def refusing(self: Any) -> None:
        if self.options["num_warps"] == 2:
            raise OutOfResources(999, 99, "shared memory")
        launch(self)

    monkeypatch.setattr(Launch, "__call__", refusing)
    assert_backend_accurate(run, attention_tensors(SHAPE, dtype=torch.float16), backend="triton", gradients=False)
    assert len(launched["forward"]) == 2


@INTERPRETED
def test_a_broken_table_does_not_stop_a_call(folders: tuple[Path, Path]) -> None:
    (folders[1] / "cpu.json").write_text('{"format": 1')
    tensors = attention_tensors(SHAPE)
    with pytest.warns(UserWarning, match="is ignored: no JSON"):
        run(**tensors, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(**tensors, backend="triton")
