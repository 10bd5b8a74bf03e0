"""The pages' examples: Python runs, on small stand-ins; commands are what the parsers take, and run where they can."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.captured import Graph
from support.checkouts import ROOT
from support.small_video import write_video
from support.tiny_encoder import make_encoder
from torch import nn

import anyup
from anyup import capture
from anyup.checkpoints import NAMED
from anyup.cli import command as cli
from anyup.images import normalize_imagenet, save_picture
from anyup.limited_memory.request import Request
from anyup.model import AnyUp
from anyup.network import Network
from anyup.ops.dispatch import Operation

pytest.importorskip("PIL")

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = [
    "README.md",
    "examples/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *sorted(f"anyup/assets/{path.name}" for path in (ROOT / "anyup" / "assets").glob("*.md")),
]

LANGUAGES = {"python", "sh", "bibtex", "text"}

NOT_RUN = {
    'torch.hub.load(repo, "anyup_multi_backbone")': "asks GitHub",
    'upsampler.push_to_hub("owner/name")': "asks Hugging Face",
    'anyup.load("hf://owner/name")': "asks Hugging Face",
    'torch.hub.load("...", "anyup")': "asks GitHub",
    "anyup upsample photo.jpg --features low.pt --size 4096 --max-memory 2GB --dtype float16 -o features.npy": (
        "minutes"
    ),
    "anyup train --config mini data.photographs=photographs output=runs/first": "hours",
    "anyup train --config mini data.photographs=photographs run.precision=bfloat16 optimizer.batch=32 "
    "optimizer.steps=4000 guidance.schedule=[[0, 224]] loss.self_consistency=0.1": "a GPU",
    "anyup train --config mini data.photographs=photographs output=runs/on model.weights=anyup_mini "
    "guidance.schedule=[[0, 112]] optimizer.steps=400 "
    'model.frozen=["image_encoder", "key_encoder", "query_encoder", "rope"]': "minutes, and encoders",
    "torchrun --nproc-per-node 4 -m anyup train --config published data.photographs=photographs": "days",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host:29500 "
    "-m anyup train --config published data.photographs=photographs": "days, on two machines",
    "torchrun --nproc-per-node 8 -m anyup train --config published data.photographs=photographs": "days",
    "torchrun --nproc-per-node 8 -m anyup upsample photo.jpg --features low.pt --size 16384 --split-over-ranks "
    "-o features.zarr": "eight processes",
    "torchrun --nproc-per-node 8 -m anyup upsample photos --encoder timm/vit_small_patch14_dinov2 --size 448 "
    "--dtype float16 -o features": "eight processes",
    "accelerate launch --num_processes 8 -m anyup upsample photos --encoder timm/vit_small_patch14_dinov2 --size 448 "
    "-o features": "eight processes",
    "anyup bench -o benchmark": "an hour",
    "anyup bench --published ../anyup -o benchmark": "an hour, and a checkout of the published code",
    "anyup tune": "a GPU",
    "anyup tune --heads 8 64 --window cell --ratio 0.2 --precision high": "a GPU",
    "PYTHONPATH=. python -m benchmarks.first_hour -o hour": "a GPU, for half an hour",
    "PYTHONPATH=. python -m benchmarks.first_hour -o hour --cache cache": "a GPU, for half an hour",
    "PYTHONPATH=. python -m benchmarks.first_hour --make-cache cache": "minutes",
    "pytest": "that is what runs this",
    "pip install -e .[demo]": "the package index",
    "pip install -e .[train]": "the package index",
    "pip install -e .[evaluate]": "the package index",
    "pip install -e .[bench]": "the package index",
    "pip install -e .[test]": "the package index",
    "pip install -e .[docs]": "the package index",
    "mkdocs serve": "another program, until it is stopped",
}
"""Examples that are not run, and why; commands among them are parsed all the same."""

# The exporter takes a minute for the sizes of the page.
SMALLER = {
    "anyup export onnx --size 448 --grid 32 -o anyup.onnx": "anyup export onnx --size 16 --grid 2 -o anyup.onnx",
}

TORCHRUN_OPTIONS = {"--max-restarts", "--rdzv-endpoint", "--nproc-per-node", "--nnodes"}

SLOW = {"demo", "segmentation", "depth", "normals", "onnx"}


@dataclass(frozen=True)
class Rows:
    """A data set of Ray with one batch, as far as a page uses it."""

    batch: dict[str, Any]

    def map_batches(self, kind: Any, *, fn_constructor_kwargs: dict[str, Any], **_: object) -> Rows:
        return Rows(kind(**fn_constructor_kwargs)(self.batch))

    def drop_columns(self, names: list[str]) -> Rows:
        return Rows({name: column for name, column in self.batch.items() if name not in names})

    def write_parquet(self, path: str) -> None:
        assert path and not any(self.batch["error"])

    @classmethod
    def read_binary_files(cls, path: str, *, include_paths: bool) -> Rows:
        assert path and include_paths
        content = np.array([Path("photo.jpg").read_bytes()], dtype=object)
        return cls({"bytes": content, "path": np.array(["photo.jpg"])})


@dataclass(frozen=True)
class Page:
    """A page's blocks, each a language and a text, and what stands in the text as code."""

    blocks: tuple[tuple[str, str], ...]
    spans: tuple[str, ...]
    text: str

    @property
    def python(self) -> list[str]:
        """Blocks, then calls in the text that are complete."""
        calls = [span for span in self.spans if _is_call(span)]
        return [text for language, text in self.blocks if language == "python"] + calls

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of the blocks."""
        return [words for language, text in self.blocks if language == "sh" for words in commands_of(text)]


def read(name: str) -> Page:
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = tuple(re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = tuple(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))
    return Page(blocks, spans, rest)


def commands_of(text: str) -> list[list[str]]:
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&" and words:
                found.append(words)
                words = []
            elif word != "&&":
                words.append(word)
    return found


def _is_call(span: str) -> bool:
    if not re.match(r"(anyup|torch|upsampler|model|print)\b", span) or "(..." in span:
        return False
    try:
        return isinstance(ast.parse(span, mode="eval").body, ast.Call)
    except SyntaxError:
        return False


def parser_of(program: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of a command, `anyup` or `python -m MODULE`, and what it is given."""
    words = [word for word in program if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] in ("torchrun", "accelerate"):
        words = ["python", *words[words.index("-m") :]]
    if words[:3] == ["python", "-m", "anyup"]:
        words = words[2:]
    if words[0] == "anyup":
        return cli._parser(), words[1:]
    assert words[:2] == ["python", "-m"], words
    return _parser_of_module(words[2]), words[3:]


class _Parsing(Exception):
    pass


def _parser_of_module(name: str) -> argparse.ArgumentParser:
    """The one that its `main` makes."""

    def stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
        raise _Parsing(parser)

    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parsing) as parsing:
            module.main([])
    parser = parsing.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def every_option(parser: argparse.ArgumentParser) -> set[str]:
    below = [every_option(each) for each in subparsers(parser).values()]
    return set(parser._option_string_actions).union(*below)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read."""
    from PIL import Image

    path = tmp_path_factory.mktemp("stocked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(torch.hub, "_hub_dir", str(path / "hub"))
        save_picture("photo.jpg", torch.rand(3, 8, 64))
        torch.save(torch.randn(5, 2, 16), "low.pt")
        for name in ("a", "in/b"):
            _ready(f"photos/{name}.jpg")
            save_picture(f"photos/{name}.jpg", torch.rand(3, 8, 64))
        if find_spec("av"):
            write_video("video.mp4", frames=2)
        picture = torch.rand(3, 450, 448).mul_(255).byte()
        colours = Image.fromarray(picture.permute(1, 2, 0).numpy())
        for name in ("photo", "train/a", "test/b", *map(str, range(9))):  # every tenth photograph is evaluated
            colours.save(_ready(f"FOLDER/{name}.png"), compress_level=0)
        for name in ("trainannot/a", "testannot/b"):
            Image.fromarray((picture[0] % 11).numpy()).save(_ready(f"FOLDER/{name}.png"))
        for split in ("train", "val"):
            colours.save(_ready(f"rooms/images/{split}/a.png"))
            depth = (1000 + picture[0].int()).to(torch.uint16)
            Image.fromarray(depth.numpy()).save(_ready(f"rooms/depth/{split}/a.png"))
        torch.manual_seed(0)
        for checkpoint in NAMED.values():
            anyup.save(anyup.AnyUp(qk_dim=16, num_heads=2), _ready(checkpoint.path))
        anyup.save(anyup.AnyUp(qk_dim=16, num_heads=2), "ours.safetensors")
        _ready("path/to/checkout").symlink_to(ROOT)
    return path


def _ready(path: str | Path) -> Path:
    """The path, in a folder that is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


@pytest.fixture
def folder(stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the examples read; encoders, downloads, CUDA graphs and Ray are stand-ins."""
    shutil.copytree(stocked, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    torch.manual_seed(0)

    def load_encoder(name: str, device: str | torch.device = "cpu") -> nn.Module:
        return make_encoder(stride=14).to(device)

    monkeypatch.setattr(anyup.encoders, "load_encoder", load_encoder)
    ray: Any = module_from_spec(ModuleSpec("ray", None))
    ray.data = SimpleNamespace(read_binary_files=Rows.read_binary_files, ActorPoolStrategy=lambda size: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "graph_of", Graph)
    return tmp_path


def stand_ins(page: str) -> dict[str, Any]:
    """What a reader of the page has at hand; on other pages than the README also what it begins with."""
    image, features = normalize_imagenet(torch.rand(1, 3, 28, 42)), torch.randn(1, 5, 4, 6)
    given: dict[str, Any] = {
        "image": image,
        "features": features,
        "maps": [torch.randn(1, 4, 32, 32), torch.randn(1, 6, 16, 16)],
        "head": nn.Conv2d(5, 3, 1),
        "points": torch.tensor([[[0, 0], [3, 5]]]),
        "folder": "pretrained",
        "C": 5,
        "H": 56,
        "W": 84,
    }
    if page == "README.md":
        return given
    upsampler = anyup.load("anyup_multi_backbone")
    return given | {
        "anyup": anyup,
        "torch": torch,
        "upsampler": upsampler,
        "model": upsampler,
        "context": upsampler.encode_image(image),
        "output_size": (400, 200),
        "frames": [(image, features), (image * 0.5, features)],
        "requests": [(image, features), (image * 0.5, features)],
        "image_size": (64, 48),
        "feature_size": (8, 6),
        "channels": 5,
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_its_language(name: str) -> None:
    page = read(name)
    assert {language for language, _ in page.blocks} <= LANGUAGES
    # Indented after an empty line, and no list's.
    assert re.findall(r"(?:\A|\n\n)(?:    |\t)(?! *[-*\d])(.*)", page.text) == [], (
        "blocks want a fence: ```sh, ```python"
    )


def anchors(page: Path) -> set[str]:
    """What a link may name of a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", read(name).text):
        linked = (ROOT / name).parent / target if target else ROOT / name
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), anchor


@pytest.mark.parametrize("name", [name for name in PAGES if read(name).python])
def test_python_of_a_page_runs(name: str, folder: Path) -> None:
    given = stand_ins(name)
    for code in read(name).python:
        if code not in NOT_RUN:
            exec(compile(code, name, "exec"), given)


def test_python_is_found_in_blocks_and_in_the_text() -> None:
    codes = [code for name in PAGES for code in read(name).python]
    assert len(codes) > 8
    assert any("upsampler.stream(" in code for code in codes) and "anyup.load()" in codes


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_text_are_there(name: str) -> None:
    for span in read(name).spans:
        if re.fullmatch(r"anyup(\.\w+)+", span):
            module, _, attribute = span.rpartition(".")
            if not hasattr(importlib.import_module(module), attribute):
                importlib.import_module(span)


ROOMS = ("anyup", "kernels", "benchmarks", "tests", "docs", "examples", "tools")

NOT_IN_A_CHECKOUT = {"anyup/_kernels": "in a wheel", "kernels/configs": "what a tuner writes"}


def paths_in(text: str) -> Iterator[str]:
    """Files of Python, and what lies below the rooms of the repository, among a page's pieces of code."""
    for word in re.findall(r"[\w./*-]+", text):
        if word.endswith(".py") or (word.split("/")[0] in ROOMS and "/" in word):
            yield word.removeprefix("./")


@pytest.mark.parametrize("name", PAGES)
def test_paths_in_the_text_are_there(name: str) -> None:
    for span in read(name).spans:
        for path in paths_in(span):
            found = (ROOT / path).exists() or (
                "/" not in path and any(True for at in ROOMS for _ in (ROOT / at).rglob(path))
            )
            assert found or path in NOT_IN_A_CHECKOUT, f"{path}: expected a file's name, or a path from the root"


def test_methods_on_the_way_from_the_call_to_a_kernel_are_there() -> None:
    classes = {"AnyUp": AnyUp, "Network": Network, "Request": Request, "Operation": Operation}
    named = [
        span.split(".") for span in read("docs/developing.md").spans if span.split(".")[0] in classes and "." in span
    ]
    assert len(named) > 6
    for name, method in named:
        assert callable(getattr(classes[name], method)), f"{name}.{method}"


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    linked = set(re.findall(r"\]\((\w+\.md)[)#]", read("docs/index.md").text))
    listed = re.findall(r"^ +- (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert linked | {"index.md"} == pages and sorted(listed) == sorted(pages)


def test_every_room_and_every_helper_of_the_tests_is_described() -> None:
    spans = set(read("docs/developing.md").spans)
    rooms = {f"anyup/{path.parent.name}/" for path in (ROOT / "anyup").glob("*/__init__.py")}
    helpers = {path.name for path in (ROOT / "tests" / "support").glob("*.py")} - {"__init__.py"}
    assert rooms | helpers <= spans


def test_paths_are_found() -> None:
    assert list(paths_in("`cat anyup/ops/gone.py` and `setup.py`, `kernels/`, `images/SPLIT`")) == [
        "anyup/ops/gone.py", "setup.py", "kernels/",
    ]  # fmt: skip


def test_the_page_of_the_call_gives_its_signature() -> None:
    page = read("docs/call.md")
    (span,) = [span for span in page.spans if span.startswith("upsampler(image, features, output_size=None")]
    described = ast.parse(f"def {span}: ...").body[0]
    actual = ast.parse(textwrap.dedent(inspect.getsource(anyup.AnyUp.forward))).body[0]
    assert isinstance(described, ast.FunctionDef) and isinstance(actual, ast.FunctionDef)
    for argument in ast.walk(actual.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    del actual.args.args[0]  # self
    assert ast.unparse(described.args) == ast.unparse(actual.args)
    rows = re.findall(r"^\| `(\w+)` \|", page.text.split("\n## ")[0], re.MULTILINE)
    assert set(rows) == {node.arg for node in ast.walk(actual.args) if isinstance(node, ast.arg)}


def distinct(commands: Iterable[list[str]]) -> list[list[str]]:
    return [list(words) for words in dict.fromkeys(map(tuple, commands))]


COMMANDS = distinct(words for name in PAGES for words in read(name).commands)
OF_THE_HELP = commands_of("\n".join(line for line in cli._EPILOG.splitlines() if line.startswith("  anyup ")))


@pytest.mark.parametrize(
    "words",
    [words for words in distinct([*COMMANDS, *OF_THE_HELP]) if words[0] not in ("pip", "pytest", "mkdocs")],
    ids=" ".join,
)
def test_command_is_one_that_can_be_typed(words: list[str]) -> None:
    parser, arguments = parser_of(words)
    assert {word for word in arguments if word.startswith("-")} <= every_option(parser)  # which no abbreviation is
    if parser.prog == "anyup":
        cli._parse(arguments)  # which reads the settings of a training, too
    else:
        parser.parse_args(arguments)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[pytest.mark.slow] if SLOW & set(words) else [], id=" ".join(words))
        for words in COMMANDS
        if " ".join(words) not in NOT_RUN
    ],
)
def test_command_runs(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words[0] == "anyup"
    if "video.mp4" in words:
        pytest.importorskip("av")
    if "zarr" in words:
        pytest.importorskip("zarr")
    if (smaller := SMALLER.get(" ".join(words))) is not None:
        words = smaller.split()
    assert cli.main(words[1:]) == 0, capsys.readouterr().err
    for option in ("-o", "--picture"):
        assert option not in words or Path(words[words.index(option) + 1]).exists()


def test_what_is_not_run_is_still_an_example() -> None:
    examples = {" ".join(words) for words in COMMANDS}
    examples |= {code for name in PAGES for code in read(name).python}
    assert NOT_RUN.keys() | SMALLER.keys() <= examples


def test_commands_and_options_in_the_text_are_there() -> None:
    spans = {span for name in PAGES for span in read(name).spans}
    known = every_option(cli._parser()) | TORCHRUN_OPTIONS
    for span in spans:
        if not re.match(r"(anyup|python -m|[A-Z_]+=\S+ anyup) ", span):
            continue
        parser, words = parser_of(span.split())
        known |= every_option(parser)
        while words and (below := subparsers(parser)):
            assert words[0] in below, span
            parser, words = below[words[0]], words[1:]
        assert {word for word in words if word.startswith("-")} <= every_option(parser), span
    for span in spans:
        if span.startswith("--"):
            assert span.split()[0] in known, span


@pytest.mark.parametrize("path", sorted((ROOT / "anyup").rglob("*.py")), ids=lambda path: path.name)
def test_no_docstring_holds_an_example_that_nothing_runs(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = inspect.cleandoc(ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
        assert ">>>" not in text and "```" not in text
