"""What a command reads is never replaced by what it writes, for every such pair of options of every command."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from anyup import options
from anyup.bench.report import page as report_page
from anyup.cli import command as cli
from anyup.command_paths import Kept, Paths, Read, ReadEncoder, ReadWeights, Written
from anyup.evaluation import arguments
from anyup.training.config import RunFolder, Settings

NO_PATHS = {"device", "workload", "train_split", "test_split", "settings"}
"""Options of every command whose text names no file."""

NO_PATHS_IN_SETTINGS = {
    "draw",
    "model.frozen",
    "model.initial",
    "model.window",
    "optimizer.decay",
    "run.device",
    "run.precision",
    "run.backend",
}

OF_NUMBERS = (
    options.size, options.region, options.memory, arguments._classes, arguments._value, arguments._intrinsics,
    arguments._odd,
)  # fmt: skip

COMMANDS: dict[str, dict[str, str]] = {
    "demo": {},
    "upsample": {"PHOTO": "photo", "--features": "features"},
    "train": {"--config": "mini", "data.photographs=": "photographs", "output=": "run"},
    "evaluate features": {"--photographs": "photographs", "--encoder": "some", "-o": "results.json"},
    "evaluate pictures": {"--photographs": "photographs", "--encoder": "some", "-o": "pictures"},
    **{
        f"evaluate {what}": {"--data": "data", "--encoder": "some", "-o": "results.json"}
        for what in ("segmentation", "depth", "normals")
    },
    "export onnx": {"--size": "448", "--grid": "32", "-o": "anyup.onnx"},
    "gallery": {"PHOTO": "photographs", "-o": "gallery.html"},
    "bench": {"-o": "benchmark"},
    "tune": {},
    "encoders": {},
    "info": {},
}
"""What each command must be told."""

EXCLUDED = {
    "upsample": {"--features": "--encoder", "--encoder": "--features"},
    "export onnx": {"--encoder": "--grid"},
}
"""What an option cannot stand beside."""


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be run, by its name."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for word, inner in action.choices.items():
            yield from parsers(inner, f"{name} {word}".strip())


PARSERS = dict(parsers(cli._parser()))


def named(command: str, *kinds: type) -> list[tuple[str, Any]]:
    """The options of a command, and settings of a training, whose values are of these kinds."""
    found = [
        (action.option_strings[0] if action.option_strings else "PHOTO", action.type)
        for action in PARSERS[command]._actions
        if isinstance(action.type, type) and issubclass(action.type, kinds)
    ]
    if command == "train":
        found += [(f"{key}=", kind) for key, kind in settings() if kind and issubclass(kind, kinds)]
    return found


def settings(section: Any = None, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    """Every setting that is a text, or several, with the kind of path that it is declared to be."""
    section = section or Settings()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
        elif "str" in str(field.type):
            yield prefix + field.name, field.metadata.get("path")


def test_every_command_is_tried() -> None:
    assert PARSERS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_declares_what_its_text_is(command: str) -> None:
    """A new option with a path cannot be forgotten: its type is one of `command_paths`, or it is named above."""
    for action in PARSERS[command]._actions:
        if action.nargs == 0 or action.choices is not None:
            continue
        made_by = getattr(action.type, "__qualname__", "")
        is_number = made_by.startswith(("whole_number.", "number.")) or action.type in OF_NUMBERS
        is_path = isinstance(action.type, type) and issubclass(action.type, (Read, Written, Kept))
        is_text = action.type is options.nonempty and action.dest in NO_PATHS
        assert is_number or is_path or is_text, f"{command} {action.dest}: what is it?"


def test_every_setting_declares_what_its_text_is() -> None:
    undeclared = {key for key, kind in settings() if kind is None}
    assert undeclared == NO_PATHS_IN_SETTINGS


def typed(command: str, **replaced: str) -> list[str]:
    """What is typed for a command, with some options replaced or added."""
    given = {**COMMANDS[command], **replaced}
    for option in replaced:
        given.pop(EXCLUDED.get(command, {}).get(option, ""), None)
    words = command.split()
    for option, value in given.items():
        words += [value] if option == "PHOTO" else [f"{option}{value}"] if option.endswith("=") else [option, value]
    return words


PAIRS = [
    pytest.param(command, read, written, id=f"{command}: {read[0]} and {written[0]}")
    for command in COMMANDS
    for read, written in itertools.product(named(command, Read), named(command, Written))
]

SPELLINGS = ("itself", "relative", "link", "hard link", "link in a linked folder")


def by_turns(pairs: Sequence[Any], ways: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The first pair in all ways, and each other one in one: names are resolved in one place, whatever the option."""
    return [
        pytest.param(*pair.values, *way, id=f"{pair.id}, {', '.join(map(str, way))}")
        for number, pair in enumerate(pairs)
        for turn, way in enumerate(ways)
        if not number or number % len(ways) == turn
    ]


def spell(source: Path, spelling: str) -> str:
    """Another name of a file or folder."""
    if spelling == "relative":
        return os.path.join(".", "nested", "..", source.name)
    if spelling == "link":
        Path("link").symlink_to(source)
        return "link"
    if spelling == "hard link":
        os.link(source, "hard")
        return "hard"
    if spelling == "link in a linked folder":
        Path("elsewhere").symlink_to(source.parent)
        return f"elsewhere/{source.name}"
    return str(source)


SETTINGS = 'encoders = ["some"]'
"""Of a `--config`, which is read before the other options are known."""


def naming(path: Path, read: tuple[str, type]) -> str:
    """How an option or a setting names what lies there."""
    text = f"transformers/{path}" if issubclass(read[1], ReadEncoder) else str(path)
    return f'["{text}"]' if read[0] == "encoders=" else text


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that is read, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nested").mkdir()
    path = tmp_path / "source"
    path.write_text("", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("command", "read", "written", "spelling"), by_turns(PAIRS, [(spelling,) for spelling in SPELLINGS])
)
def test_what_is_read_is_not_replaced(
    command: str,
    read: tuple[str, type],
    written: tuple[str, type],
    spelling: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli._RUNNERS, command.split()[0], lambda _: pytest.fail("work began"))
    if read[0] == "--config":
        source.write_text(SETTINGS, encoding="utf-8")
    content = source.read_text(encoding="utf-8")
    before = sorted(Path().iterdir())
    name = spell(source, spelling)
    assert cli.main(typed(command, **{read[0]: naming(source, read), written[0]: name})) == 2
    error = capsys.readouterr().err
    assert "that is what is read" in error and error.count("\n") == 1
    assert source.read_text(encoding="utf-8") == content
    assert set(before) <= set(Path().iterdir()) and not Path("run").exists()


FOLDERS = [pair for pair in PAIRS if pair.values[2][1].holds]

HELD = {
    "train": ["latest.pth", "final.pth", "step-0000010.pth", "log.jsonl", "tensorboard"],
    "evaluate pictures": ["index.json", "photo--encoder.png"],
    "bench": ["results.json", "report.html"],
}
"""What each command that writes into a folder puts there."""


def in_folder(inside: Path, linked: bool, command: str, read: tuple[str, type], written: tuple[str, type]) -> list[str]:
    """What is typed to read what is called `inside` and to write into the folder "output"."""
    name = "output"
    if read[0] == "--config":
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.write_text(SETTINGS, encoding="utf-8")
    else:
        inside.mkdir(parents=True)
    if linked:
        Path("output link").symlink_to(name)
        Path("inside link").symlink_to(inside)
        inside, name = Path("inside link"), "output link"
    return typed(command, **{read[0]: naming(inside, read), written[0]: name})


def test_every_command_that_writes_into_a_folder_is_tried() -> None:
    assert HELD.keys() == {pair.values[0] for pair in FOLDERS}


@pytest.mark.parametrize(
    ("command", "read", "written", "deeper", "linked"),
    by_turns(FOLDERS, list(itertools.product(("", "deeper"), (False, True)))),
)
def test_what_is_read_in_a_folder_is_not_replaced_there(
    command: str,
    read: tuple[str, type],
    written: tuple[str, type],
    deeper: str,
    linked: bool,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli._RUNNERS, command.split()[0], lambda _: pytest.fail("work began"))
    for name in HELD[command]:
        assert cli.main(in_folder(Path("output", name, deeper), linked, command, read, written)) == 2
        assert "where what is read lies" in capsys.readouterr().err
        shutil.rmtree("output")
        for link in Path().glob("* link"):
            link.unlink()


@pytest.mark.parametrize(
    ("command", "read", "written", "inside", "linked"),
    by_turns(FOLDERS, list(itertools.product(("of its own", "deeper/latest.pth"), (False, True)))),
)
def test_a_folder_that_is_written_into_may_hold_what_is_read_under_another_name(
    command: str,
    read: tuple[str, type],
    written: tuple[str, type],
    inside: str,
    linked: bool,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run's folder with its own settings; a folder for pictures with the photographs in one below."""
    begun = []
    monkeypatch.setitem(cli._RUNNERS, command.split()[0], begun.append)
    assert cli.main(in_folder(Path("output", inside), linked, command, read, written)) == 0 and begun


def test_a_link_that_would_be_replaced_is_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "weights.pth").touch()
    link = tmp_path / "output" / "latest.pth"
    link.symlink_to(tmp_path / "weights.pth")
    paths = Paths([("weights", Read(str(link)))], [("output", RunFolder(str(tmp_path / "output")))])
    with pytest.raises(options.UsageError, match="where what is read lies"):
        paths.require_apart()


@pytest.mark.parametrize("written", [["same.png", "same.png"], ["same.png", "./nested/../same.png"], ["a", "link"]])
@pytest.mark.parametrize("there", [False, True])
def test_two_results_are_two_files(written: list[str], there: bool, source: Path) -> None:
    Path("link").symlink_to("a")
    if there:
        Path(written[0]).touch()
    with pytest.raises(options.UsageError, match="that is output"):
        Paths(written=[("output", Written(written[0])), ("picture", Written(written[1]))]).require_apart()


def test_what_lies_apart_is_written() -> None:
    other = Written(str(Path(__file__).with_name("other")))
    Paths([("PHOTO", Read(__file__))], [("output", other), ("b", Written("b"))]).require_apart()


def test_names_mean_the_files_that_they_stand_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from anyup.checkpoints import NAMED, PACKAGED

    assert list(ReadWeights("anyup_mini").paths()) == [PACKAGED["anyup_mini"].path]
    assert list(ReadWeights("anyup").paths()) == [NAMED["anyup"].path]
    assert list(ReadWeights("file.pth").paths()) == [Path("file.pth")]
    (tmp_path / "model.safetensors").touch()
    assert list(ReadEncoder(f"transformers/{tmp_path}").paths()) == [tmp_path, tmp_path / "model.safetensors"]
    assert list(ReadEncoder("torchvision/resnet50:layer4").paths()) == []


@pytest.mark.parametrize("end", [".part", ".part.json"])
def test_a_photograph_is_not_taken_for_what_an_interrupted_run_left(
    end: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = f"out.npy{end}"
    source.rename(photo)
    assert cli.main(["upsample", photo, "--features", "f.npy", "-o", "out.npy", "--resume"]) == 2
    assert "that is what is read" in capsys.readouterr().err and Path(photo).exists()


def test_weights_are_not_taken_for_the_state_of_probes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.rename("results.probes.pt")
    words = typed("evaluate segmentation", **{"--weights": "results.probes.pt"})
    assert cli.main(words) == 2
    assert "checkpoint results.probes.pt: that is what is read" in capsys.readouterr().err


def test_the_demonstration_does_not_replace_its_photograph(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from anyup import assets

    Path("demo.png").symlink_to(assets.demo_photo_path())
    assert cli.main(["demo", "-o", "demo.png"]) == 2
    assert "that is what is read" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["results", "--codegen"])
def test_the_page_of_a_benchmark_does_not_replace_its_results(
    option: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["results", *([option, "source"] if option.startswith("-") else [])]
    if option == "results":
        shutil.copy(source, "results")
    assert report_page.main([*words, "-o", "source" if option.startswith("-") else "results"]) == 2
    assert "that is what is read" in capsys.readouterr().err
