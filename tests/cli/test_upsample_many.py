"""`anyup upsample` for many photographs: a result for each, a manifest, and runs that are interrupted and resumed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkouts import ROOT
from support.patience import PATIENCE
from support.tiny_encoder import make_encoder

import anyup
from anyup import images
from anyup.cli import command as cli
from anyup.cli import upsample_many
from anyup.cli.upsample_many import Work
from anyup.images import read_photo, save_picture
from anyup.manifest import Manifest
from anyup.training.distributed import Engine

pytest.importorskip("PIL")

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("a.png", "b.jpg", "in/c.png", "in/d.png")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with weights.pth and the folder photos: a broken one among photographs of several sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anyup.encoders, "load_encoder", lambda name, device: make_encoder().to(device))
    torch.manual_seed(0)
    anyup.save(anyup.AnyUp(qk_dim=16, num_heads=2), "weights.pth")
    for number, name in enumerate(NAMES):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(path, torch.rand(3, 16, 12 + 4 * number))
    Path("photos/in/broken.png").write_bytes(Path("photos/a.png").read_bytes()[:60])


def command(*arguments: str, photos: str = "photos", out: str = "out") -> list[str]:
    fixed = ("--encoder", "tiny", "--encoder-size", "16", "--weights", "weights.pth")
    return ["upsample", photos, *fixed, "-o", out, *arguments]


def upsample(*arguments: str, photos: str = "photos", out: str = "out") -> int:
    return cli.main(command(*arguments, photos=photos, out=out))


def single(name: str, *arguments: str) -> np.ndarray[Any, Any]:
    """The result of one photograph by itself."""
    assert upsample(*arguments, photos=f"photos/{name}", out="single.npy") == 0
    found: np.ndarray[Any, Any] = np.load("single.npy")
    return found


def tree(folder: str) -> dict[str, bytes]:
    """What all files in a folder hold."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def manifest(folder: str = "out") -> dict[str, dict[str, Any]]:
    """The lines of photographs, by name."""
    lines = Path(folder, "manifest.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return {entry["photograph"]: entry for entry in map(json.loads, lines)}


def test_each_photograph_gets_what_it_gets_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert upsample("--dtype", "float16", "--picture", "pictures") == 1
    told = capsys.readouterr()
    assert told.out.split() == ["out", "pictures"]
    assert told.err.count("left out: in/broken.png: ") == 1 and "1 left out; out/manifest.jsonl says why" in told.err
    assert tree("out").keys() == {"manifest.jsonl", *(f"{name}.npy" for name in NAMES)}
    assert tree("pictures").keys() == {f"{name}.png" for name in NAMES}
    for name in NAMES:
        assert np.array_equal(np.load(f"out/{name}.npy"), single(name, "--dtype", "float16"))
        assert read_photo(f"pictures/{name}.png").shape == read_photo(f"photos/{name}").shape
    entries = manifest()
    assert list(entries) == sorted([*NAMES, "in/broken.png"])
    assert "cannot be decoded" in entries["in/broken.png"]["error"]
    assert (entries["a.png"]["shape"], entries["a.png"]["dtype"]) == ([6, 16, 12], "float16")
    assert (entries["a.png"]["features"], entries["a.png"]["picture"]) == ("a.png.npy", "a.png.png")


def test_other_formats_hold_the_same() -> None:
    pytest.importorskip("zarr")
    for kind in ("zarr", "safetensors"):
        assert upsample("--format", kind, out=kind, photos="photos/**/[ac].png") == 0
    import zarr

    group = zarr.open_group("zarr/features.zarr", mode="r")
    assert [name for name, _ in group.arrays()] == ["a.png"] and [name for name, _ in group["in"].arrays()] == ["c.png"]
    for name in ("a.png", "in/c.png"):
        assert np.array_equal(group[name][0], single(name))
        assert np.array_equal(images.read_features(f"safetensors/{name}.safetensors")[0], single(name))


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_resumed_run_leaves_what_an_uninterrupted_one_leaves(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--format", kind, "--picture")
    assert upsample(*options, "whole/pictures", out="whole") == 1
    real, calls = Work._put, []

    def stopped(work: Work, made: Path, path: Path, folder: str) -> str:
        calls.append(path)
        if len(calls) == 4:  # the picture of the second, whose features have their name
            shutil.copytree("out", "now")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(work, made, path, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_put", stopped)
        assert upsample(*options, "out/pictures") == 128 + signal.SIGTERM
    assert "results that are there: 1; --resume goes on" in capsys.readouterr().err
    if how == "killed":  # nothing is tidied up, and a line is begun
        shutil.rmtree("out")
        Path("now").rename("out")
        with Path("out/manifest.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"photograph": "b.jp')
    first = Path(f"out/a.png.{kind}").stat().st_mtime_ns
    assert upsample(*options, "out/pictures", "--resume") == 1
    assert tree("out") == tree("whole")
    assert Path(f"out/a.png.{kind}").stat().st_mtime_ns == first


def test_a_resumed_run_makes_what_is_gone_what_has_changed_and_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upsample() == 1
    shutil.copy("photos/a.png", "photos/in/broken.png")
    save_picture("photos/b.jpg", torch.rand(3, 8, 8))
    save_picture("photos/new.png", torch.rand(3, 8, 8))
    Path("out/in/d.png.npy").unlink()
    made, real = [], Work.upsample
    monkeypatch.setattr(Work, "upsample", lambda work, name, photo: made.append(name) or real(work, name, photo))
    assert upsample("--resume") == 0
    assert made == ["b.jpg", "in/broken.png", "in/d.png", "new.png"]
    assert np.load("out/b.jpg.npy").shape == (6, 8, 8) and "error" not in manifest()["in/broken.png"]
    Path("photos/b.jpg").write_bytes(b"broken by now")
    Path("photos/a.png").rename("photos/gone")
    Path("photos/a.png").symlink_to("nowhere")
    assert upsample("--resume") == 1
    assert not Path("out/b.jpg.npy").exists() and Path("out/a.png.npy").exists()  # which nobody knows to be another's
    assert "error" in manifest()["a.png"] and "error" in manifest()["b.jpg"]


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (None, (), "out: holds results of an earlier run; --resume goes on"),
        (None, ("--resume", "--dtype", "float16"), "begun with dtype None, now float16"),
        (None, ("--resume", "--picture", "out/pictures"), "begun with pictures None, now pictures"),
        (lambda: Path("out/manifest.jsonl").write_text("[]\n"), ("--resume",), "manifest.jsonl: not what a run over"),
        (
            lambda: Path("out/manifest.jsonl").unlink(),
            ("--resume",),
            "expected a new or an empty folder, this one holds a.png.npy",
        ),
    ],
)
def test_a_folder_of_something_else_is_refused(
    prepare: Callable[[], object] | None,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert upsample(photos="photos/a*") == 0
    if prepare:
        prepare()
    before = tree("out")
    assert upsample(*options, photos="photos/a*") == 1
    assert message in capsys.readouterr().err
    assert tree("out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", "--features", "f.npy", "-o", "out"), "--features goes with one photograph"),
        (("photos", "--encoder", "tiny", "-o", "out", "--points", "p.csv"), "--points goes with one photograph"),
        (("photos", "--encoder", "tiny", "-o", "out.npy"), "output out.npy: expected a folder for many photographs"),
        (("photos", "--encoder", "tiny", "-o", "photos"), "that is what is read"),
        (("photos", "--encoder", "tiny", "--picture", "out", "--format", "zarr"), "--format goes with -o"),
        (
            ("photos/a.png", "--encoder", "tiny", "-o", "a.npy", "--format", "npy"),
            "--format goes with many photographs",
        ),
        (
            ("photos/a.png", "photos/in/../a.png", "other/a.png", "--encoder", "tiny", "-o", "out"),
            "would have one result",
        ),
        (("photos", "video.mp4", "--encoder", "tiny", "-o", "out"), "video.mp4: expected a video alone"),
    ],
)
def test_a_mistake_is_met_before_anything_is_written(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("photos", "other")
    assert cli.main(["upsample", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_results_are_no_photographs_of_a_later_run() -> None:
    options = ("--picture", "photos/out/pictures")
    assert upsample(*options, out="photos/out") == 1
    before = tree("photos")
    assert upsample(*options, "--resume", out="photos/out") == 1
    assert tree("photos") == before


def test_a_photograph_that_cannot_be_upsampled_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = upsample_many.write_result

    def write(*arguments: Any, **named: Any) -> Any:
        if arguments[1].photo.shape[3] == 16:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(*arguments, **named)

    monkeypatch.setattr(upsample_many, "write_result", write)
    Path("photos/gone.png").symlink_to("nowhere.png")
    assert upsample("--region", "0,0,16,16") == 1
    err = capsys.readouterr().err
    assert "left out: gone.png: No such file or directory" in err
    assert "left out: a.png: --region: expected (top, left, height, width) inside the output" in err
    assert "left out: b.jpg: there is not enough memory" in err and "4 left out" in err


def test_the_room_for_all_is_checked_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(6 * 4 * 16 * width for width in (12, 16, 20, 24, 12))  # the broken one's file tells its size
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        shutil.rmtree("out", ignore_errors=True)
        assert upsample() == 1
        assert ("5 results take 32 kB, and 32 kB are free where out is" in capsys.readouterr().err) == (free < needed)
        assert Path("out").exists() == (free == needed)


def test_a_full_disk_ends_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(images, "save_array", full)
    assert upsample("--format", "safetensors") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert tree("out").keys() == {"manifest.jsonl"} and not manifest()


# Several processes.

_PROCESS = """
import os, signal, sys
sys.path[:0] = {paths!r}
import anyup
from anyup.cli import command
from anyup.cli.upsample_many import Work
from support.tiny_encoder import make_encoder

anyup.encoders.load_encoder = lambda name, device: make_encoder().to(device)
real, calls = Work._put, []

def killed(work, made, path, folder):
    calls.append(path)
    if len(calls) == 4:  # the picture of the second, whose features have their name
        os.kill(os.getpid(), signal.SIGKILL)
    return real(work, made, path, folder)

if os.environ["RANK"] == os.environ.get("KILLED"):
    Work._put = killed
sys.exit(command.main(sys.argv[1:]))
"""


def together(processes: int, *arguments: str, killed: int | None = None) -> subprocess.CompletedProcess[str]:
    """`upsample` in several processes of torchrun, of which one may be killed at its second photograph."""
    pytest.importorskip("accelerate")
    Path("process.py").write_text(_PROCESS.format(paths=[str(ROOT), str(ROOT / "tests")]), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILLED": str(killed)}
    return subprocess.run(
        [*launch, "process.py", *command(*arguments)], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.slow
def test_processes_leave_together_what_one_leaves() -> None:
    pytest.importorskip("zarr")
    options = ("--format", "zarr", "--picture")
    assert upsample(*options, "whole/pictures", out="whole") == 1
    run = together(2, *options, "out/pictures")
    assert run.returncode == 1  # of the broken photograph
    assert run.stderr.count("left out: in/broken.png: ") == 1
    assert run.stderr.count("1 left out; out/manifest.jsonl says why") == 1
    assert run.stdout.split() == ["out", "out/pictures"]
    assert tree("out") == tree("whole")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_what_a_killed_process_leaves_is_made_by_any_number_of_processes() -> None:
    Path("photos/in/broken.png").unlink()
    assert upsample("--picture", "whole/pictures", out="whole") == 0
    run = together(2, "--picture", "out/pictures", killed=1)
    assert run.returncode != 0
    assert Path("out/manifest.jsonl.1").exists() and tree("out") != tree("whole")
    there = {name: path.stat().st_mtime_ns for name in NAMES if (path := Path(f"out/{name}.npy")).exists()}
    unfinished = {name for name in there if not Path(f"out/pictures/{name}.png").exists()}
    assert 2 <= len(there) and len(unfinished) == 1  # one more, perhaps, of the first process
    shutil.copytree("out", "alone", copy_function=shutil.copy2)
    assert upsample("--picture", "alone/pictures", "--resume", out="alone") == 0
    run = together(3, "--picture", "out/pictures", "--resume")
    assert run.returncode == 0, run.stderr
    for folder in ("alone", "out"):
        assert tree(folder) == tree("whole")
        for name in there.keys() - unfinished:  # each was made once
            assert Path(f"{folder}/{name}.npy").stat().st_mtime_ns == there[name]


@pytest.mark.slow
def test_a_run_of_several_processes_has_its_folder_for_itself() -> None:
    from anyup.run_lock import only_run

    with only_run("out", print):
        run = together(2)
    assert run.returncode == 1 and run.stderr.count("out: another run is writing it") == 1
    assert not Path("out").exists()


def test_lines_of_all_processes_are_merged_and_those_of_a_killed_run_too() -> None:
    path, asked = Path("manifest.jsonl"), {"size": 8}
    first, other = Manifest(path, asked), Manifest(path, asked, 1)
    first.add("a", {"error": "broken"})
    other.add("b", {"sha256": "old"})
    other.add("b", {"sha256": "new"})
    assert first.there() == 1
    for each in (first, other):  # and both are killed, the other one within a line
        each.close()
    with Path("manifest.jsonl.1").open("a", encoding="utf-8") as file:
        file.write('{"photograph": "c"')
    with pytest.raises(ValueError, match="begun with size 8, now 9"):
        Manifest(path, {"size": 9}, 2)
    with Manifest(path, asked) as first, Manifest(path, asked, 12) as other:
        assert other.entries == {"a": {"error": "broken"}, "b": {"sha256": "new"}}
        other.add("a", {"sha256": "a"})
        first.complete()
    asked_line, *lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"photograph": "a", "sha256": "a"},
        {"photograph": "b", "sha256": "new"},
    ]
    assert json.loads(asked_line) == {"asked": asked} and not list(Path().glob("manifest.jsonl.*"))


def test_shares_are_even_and_none_is_lost_or_doubled() -> None:
    class Shares(Engine):
        world = 3

        def share(self, items: Sequence[Any]) -> list[Any]:
            return list(items[self.rank :: self.world])

    sizes = {f"{number:02d}": (8, 8 + number) for number in range(20)}
    work = Work(argparse.Namespace(output=None, picture=None, size=None, region=None), None, None, None, 0)
    manifest = SimpleNamespace(entries={f"{number:02d}": {} for number in range(12, 20)})
    shares = []
    for rank in range(3):
        source = upsample_many.Photographs({name: Path(name) for name in sizes})
        engine = Shares(torch.device("cpu"))
        engine.rank = rank
        source.share(engine, work.order(sizes, manifest))
        shares.append(list(source._files))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    for names in (sizes.keys() - manifest.entries.keys(), manifest.entries.keys()):
        pixels = [sum(8 * (8 + int(name)) for name in share if name in names) for share in shares]
        assert max(pixels) - min(pixels) <= 8 * max(8 + int(name) for name in names)
        counts = [sum(name in names for name in share) for share in shares]
        assert max(counts) - min(counts) <= 1
