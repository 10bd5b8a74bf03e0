"""`anyup upsample` in pieces: files larger than the memory, regions, heads, interruptions and what completes them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.patience import PATIENCE, wait_until
from torch import Tensor

from anyup import checkpoints, images
from anyup.cli import command as cli
from anyup.images import normalize_imagenet, read_features, read_photo, save_array, save_picture
from anyup.limited_memory import destinations, executor, prediction
from anyup.model import AnyUp

pytest.importorskip("PIL")

PHOTO_SIZE = (24, 32)
CHANNELS, GRID = 5, (6, 8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with photo.png, features.npy and weights.pth; pieces are four rows."""
    generator = torch.Generator().manual_seed(1)
    save_picture(tmp_path / "photo.png", torch.rand(3, *PHOTO_SIZE, generator=generator))
    save_array(tmp_path / "features.npy", torch.randn(CHANNELS, *GRID, generator=generator))
    torch.manual_seed(0)
    checkpoints.save(AnyUp(qk_dim=16, num_heads=2), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "BAND_PIXELS", 4 * PHOTO_SIZE[1])


def upsample(*arguments: object) -> int:
    fixed = ("upsample", "photo.png", "--features", "features.npy", "--weights", "weights.pth")
    return cli.main([*fixed, *map(str, arguments)])


def expected(**arguments: Any) -> Tensor:
    image, features = normalize_imagenet(read_photo("photo.png")), read_features("features.npy")
    with torch.inference_mode():
        result: Tensor = checkpoints.load("weights.pth")(image, features, **arguments)
    return result[0]


def left() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"photo.png", "features.npy", "weights.pth"}


def array(path: str) -> Tensor:
    if path.endswith(".zarr"):
        zarr = pytest.importorskip("zarr")
        return torch.from_numpy(zarr.open_array(path, mode="r")[...])[0]
    return torch.from_numpy(np.load(path))


@pytest.fixture(params=["out.npy", "out.zarr"])
def name(request: pytest.FixtureRequest) -> str:
    """Of a file that is written in pieces."""
    if request.param.endswith("zarr"):
        pytest.importorskip("zarr")
    return request.param


def test_a_file_written_in_pieces_holds_what_the_model_returns(name: str) -> None:
    assert upsample("-o", name) == 0
    torch.testing.assert_close(array(name), expected(), rtol=1e-5, atol=1e-5)
    assert left() == {name}


def test_an_older_file_is_replaced_and_until_then_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out.npy", "out.zarr"):
        if name.endswith("zarr"):
            pytest.importorskip("zarr")
        assert upsample("-o", name) == 0
        before = array(name).clone()
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            assert upsample("-o", name, "--dtype", "float16") == 130
        assert torch.equal(array(name), before)
        assert upsample("-o", name, "--dtype", "float16", "--resume") == 0
        assert array(name).dtype == torch.float16


def test_a_mistyped_folder_is_told_of_before_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["upsample", "fotos", "--encoder", "dinov2_s_derived", "-o", "out"]) == 1
    assert capsys.readouterr().err == "anyup: error: fotos: No such file or directory\n"


@pytest.mark.parametrize("output", ["out.npy", "out.pt"])
def test_a_region_is_that_part_of_the_result(output: str) -> None:
    assert upsample("-o", output, "--region", "5,8,10,16", "--picture", "out.png") == 0
    result = read_features(output)[0]
    torch.testing.assert_close(result, expected()[:, 5:15, 8:24], rtol=1e-5, atol=1e-5)
    assert read_photo("out.png").shape == (1, 3, 10, 16)


@pytest.mark.parametrize(
    ("orientation", "grid", "as_stored"),
    [(6, (6, 8), True), (6, (8, 6), False), (6, (7, 7), False), (1, (8, 6), False), (3, (6, 8), False)],
)
def test_a_photograph_is_turned_unless_the_features_fit_it_only_as_stored(
    orientation: int, grid: tuple[int, int], as_stored: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open("photo.png") as opened:
        opened.save("photo.png", exif=exif)
    features = torch.randn(CHANNELS, *grid)
    save_array("features.npy", features)
    assert upsample("-o", "out.npy") == 0
    assert ("taken as it is stored, 24 x 32" in capsys.readouterr().err) == as_stored
    image = normalize_imagenet(read_photo("photo.png", turned=not as_stored))
    with torch.inference_mode():
        torch.testing.assert_close(array("out.npy"), checkpoints.load("weights.pth")(image, features[None])[0])


@pytest.mark.parametrize("content", ["mine.txt", "zarr.json", "c/0"])
def test_a_folder_that_is_no_array_is_not_replaced(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("out.zarr", content)
    kept.parent.mkdir(parents=True)
    kept.write_text('{"node_type": "group"}', encoding="utf-8")
    assert upsample("-o", "out.zarr") == 1
    assert "out.zarr: exists and is not a zarr array" in capsys.readouterr().err
    assert kept.exists()


def test_a_dtype_is_that_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert upsample("-o", "out.npy", "--dtype", "float16") == 0
    torch.testing.assert_close(array("out.npy"), expected().half(), rtol=2e-3, atol=1e-3)
    assert upsample("-o", "out.pt", "--dtype", "bfloat16") == 0
    assert read_features("out.pt").dtype == torch.bfloat16
    assert upsample("-o", "wide.npy", "--dtype", "bfloat16") == 0
    assert array("wide.npy").dtype == torch.float32
    assert "NumPy has no bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("of_a_training", [False, True])
@pytest.mark.parametrize("shape", [(3, CHANNELS), (3, CHANNELS, 1, 1)])
def test_a_head_is_applied(shape: tuple[int, ...], of_a_training: bool) -> None:
    weight, bias = torch.randn(shape), torch.randn(3)
    head = {"classifier.weight": weight, "classifier.bias": bias}
    torch.save({"state_dict": head, "epoch": 3} if of_a_training else head, "head.pt")
    assert upsample("-o", "out.npy", "--head", "head.pt") == 0
    logits = torch.einsum("kc,chw->khw", weight.view(3, CHANNELS), expected()) + bias[:, None, None]
    torch.testing.assert_close(array("out.npy"), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(3, CHANNELS + 1)}, "expected a head for 5 channels, got one for 6"),
        ({"weight": torch.ones(3, CHANNELS, 3, 3)}, r"expected a weight (K, C) or (K, C, 1, 1), got (3, 5, 3, 3)"),
        ({"weight": torch.ones(3, CHANNELS), "bias": torch.ones(4)}, "expected a bias of 3, got (4,)"),
        ({"a.weight": torch.ones(3, CHANNELS), "b.weight": torch.ones(3, 3)}, "it holds a.weight, b.weight"),
        ({}, "it holds nothing"),
        ({"weight": torch.ones(0, CHANNELS)}, "expected a weight (K, C) or (K, C, 1, 1), got (0, 5)"),
        ({"weight": torch.ones(3, CHANNELS, dtype=torch.complex64)}, "weight: expected floating-point numbers, got"),
        (
            {"weight": torch.ones(3, CHANNELS), "bias": torch.ones(3).int()},
            "bias: expected floating-point numbers, got torch.int32",
        ),
        (
            {"weight": torch.ones(3, CHANNELS), "bias": torch.tensor([0, torch.nan, 0])},
            "not finite: bias (1 of 3 numbers)",
        ),
        ({"weight": torch.full((3, CHANNELS), 1e300, dtype=torch.float64)}, "not finite: weight (15 of 15 numbers)"),
        ({"weight": torch.full((3, CHANNELS), 3e38)}, "what head.pt makes of the features: holds an infinity"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    content: dict[str, Tensor], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, "head.pt")
    assert upsample("-o", "out.npy", "--head", "head.pt") == 1
    assert message in capsys.readouterr().err
    assert left() == {"head.pt"}


@pytest.mark.parametrize("name", ["out.npy", "out.pt"])
def test_a_result_that_its_dtype_cannot_hold_is_refused_before_the_work(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_array("features.npy", torch.full((CHANNELS, *GRID), 1e5))
    torch.save({"weight": torch.full((3, CHANNELS), 2e4)}, "head.pt")
    save_array("small.npy", torch.ones(CHANNELS, *GRID))
    with monkeypatch.context() as patch:
        patch.setattr("anyup.limited_memory.stream.stream", None)
        for options in ((), ("--features", "small.npy", "--head", "head.pt"), ("--values", "features.npy")):
            assert upsample("-o", name, "--dtype", "float16", *options) == 1
            message = "--dtype float16: float16 holds numbers up to 65504, and what is upsampled reaches 1e+05"
            assert message in capsys.readouterr().err
    assert left() == {"head.pt", "small.npy"}
    assert upsample("-o", name, "--dtype", "float16", "--values", "small.npy") == 0
    assert upsample("-o", name) == 0


@pytest.mark.parametrize("name", ["out.npy", "out.pt"])
def test_a_result_that_is_not_finite_is_an_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = AnyUp(qk_dim=16, num_heads=2)
    with torch.no_grad():
        model.cross_decode.cross_attn.attention.in_proj_weight.fill_(1e30)
    checkpoints.save(model, "large.pth")
    assert upsample("-o", name, "--weights", "large.pth") == 1
    assert "the result: holds a NaN: image 0 of the batch, channel 0, row 0, column 0 (" in capsys.readouterr().err
    assert left() == {"large.pth"}


def test_features_whose_norm_overflows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save_array("features.npy", torch.full((CHANNELS, *GRID), 1e20))
    assert upsample("-o", "out.npy") == 1
    assert "the norm in float32 of features.npy: holds an infinity" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--features", "--values"])
@pytest.mark.parametrize("array", [np.ones((5, *GRID), "complex64"), np.ones((5, *GRID), "int8"), np.ones((5, 0, 8))])
def test_what_is_no_map_of_floating_point_numbers_is_refused(
    option: str, array: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("odd.npy", array)
    assert upsample("-o", "out.npy", option, "odd.npy") == 1
    assert re.search("odd.npy: expected (floating-point numbers|shape .*), got", capsys.readouterr().err)
    assert left() == {"odd.npy"}


def test_a_budget_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert upsample("-o", "out.npy", "--max-memory", "60MB") == 0
    torch.testing.assert_close(array("out.npy"), expected(), rtol=1e-5, atol=1e-5)
    assert upsample("-o", "small.npy", "--max-memory", "1kB") == 1
    assert "the smallest budget that can is" in capsys.readouterr().err
    assert left() == {"out.npy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "o.npy", "--region", "0,0,25,3"), "region: expected (top, left, height, width) inside the output"),
        (("-o", "o.npy", "--region", "1,2,3"), "TOP,LEFT,HEIGHT,WIDTH"),
        (("-o", "o.npy", "--region", "0,0,0,3"), "region: "),
        (("-o", "o.npy", "--max-memory", "much"), "bytes or a text such as"),
        (("-o", "o.npy", "--max-memory", "0"), "a positive amount"),
        (("-o", "o.pt", "--resume"), "--resume goes with an output that ends in .npy or .zarr"),
        (("-o", "o.npy", "--dtype", "int8"), "int8"),
        (("-o", "o.npy", "--values", "features.npy", "--head", "head.pt"), "not allowed with"),
    ],
)
def test_a_mistake_is_named(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert upsample(*options) == 2
    assert message in capsys.readouterr().err
    assert left() == set()


# Interruptions.


def stop_after(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException | None = None) -> None:
    """Ctrl-C, or an error, in the piece after so many."""
    piece = executor.Executor.piece
    made: list[slice] = []

    def counted(self: Any, rows: slice, *arguments: Any) -> Tensor:
        if len(made) == pieces:
            raise error or KeyboardInterrupt
        made.append(rows)
        return piece(self, rows, *arguments)

    monkeypatch.setattr(executor.Executor, "piece", counted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a broken disk")])
def test_what_was_interrupted_is_completed_to_the_same_bytes(
    name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample("-o", f"whole{name}") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3, error)
        assert upsample("-o", name) in (1, 130)
    assert left() == {f"whole{name}", f"{name}.part", f"{name}.part.json"}
    assert "3 of 6 pieces are kept; --resume goes on" in capsys.readouterr().err
    assert upsample("-o", name, "--resume") == 0
    assert "going on after 3 of 6 pieces" in capsys.readouterr().err
    assert left() == {f"whole{name}", name}
    assert torch.equal(array(name), array(f"whole{name}"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.parametrize("pieces", [0, 2])
def test_two_runs_never_write_one_file(
    name: str, pieces: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample("-o", f"whole{name}") == 0
    piece, made = executor.Executor.piece, []

    def interrupted(self: Any, rows: slice, *arguments: Any) -> Tensor:
        made.append(rows)
        if len(made) == pieces + 1:
            for options in ((), ("--resume",)):  # another run, while this one is at work
                assert upsample("-o", name, *options) == 1
        return piece(self, rows, *arguments)

    monkeypatch.setattr(executor.Executor, "piece", interrupted)
    assert upsample("-o", name) == 0
    assert "another run is writing it" in capsys.readouterr().err
    assert left() == {f"whole{name}", name}
    assert torch.equal(array(name), array(f"whole{name}"))


def test_an_interruption_before_the_first_piece_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 0)
    assert upsample("-o", "out.npy") == 130
    assert left() == set()


def test_pieces_that_are_there_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert upsample("-o", "out.npy") == 130
    stop_after(monkeypatch, 2)  # would stop it if more than the last two were made
    assert upsample("-o", "out.npy", "--resume") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--dtype", "float16"), "begun with dtype torch.float32, now torch.float16"),
        (("--size", "24x30"), "begun with"),
        (("--region", "0,0,24,30"), "begun with"),
    ],
)
def test_what_was_begun_otherwise_is_not_completed(
    change: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert upsample("-o", "out.npy") == 130
    assert upsample("-o", "out.npy", "--resume", *change) == 1
    error = capsys.readouterr().err
    assert message in error and "delete it to begin anew" in error
    assert left() == {"out.npy.part", "out.npy.part.json"}


def test_other_features_do_not_complete_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert upsample("-o", "out.npy") == 130
    save_array("features.npy", read_features("features.npy")[0] + 1)
    assert upsample("-o", "out.npy", "--resume") == 1
    assert "begun with features" in capsys.readouterr().err


def test_what_was_interrupted_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert upsample("-o", "out.npy") == 130
    before = Path("out.npy.part").read_bytes()
    assert upsample("-o", "out.npy") == 1
    assert "--resume completes it" in capsys.readouterr().err
    assert Path("out.npy.part").read_bytes() == before


def test_damaged_notes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.npy.part").touch()
    Path("out.npy.part.json").write_text("{", encoding="utf-8")
    assert upsample("-o", "out.npy", "--resume") == 1
    assert "out.npy.part.json: not what an interrupted run leaves" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_notes_without_a_file_are_of_no_account(options: tuple[str, ...]) -> None:
    """A run that was killed after its file had got its name, or between two notes."""
    Path("out.npy.part.json").write_text("{", encoding="utf-8")
    Path("out.npy.part.json.new").write_text("{", encoding="utf-8")
    assert upsample("-o", "out.npy", *options) == 0
    assert left() == {"out.npy"}


def test_nothing_to_resume_begins() -> None:
    assert upsample("-o", "out.npy", "--resume") == 0
    assert left() == {"out.npy"}


def test_what_is_there_needs_no_room_again(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert upsample("-o", name) == 130
    whole = CHANNELS * PHOTO_SIZE[0] * PHOTO_SIZE[1] * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=whole // 2))
    assert upsample("-o", f"other-{name}") == 1
    assert "15 kB, and 8 kB are free" in capsys.readouterr().err
    assert upsample("-o", name, "--resume") == 0


def test_chunks_lie_in_one_piece_each() -> None:
    zarr = pytest.importorskip("zarr")
    assert upsample("-o", "out.zarr", "--region", "3,0,19,32") == 0
    assert zarr.open_array("out.zarr", mode="r").chunks == (1, CHANNELS, 4, PHOTO_SIZE[1])


def test_a_disk_that_fills_amid_the_pieces_is_named_and_they_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zarr")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, OSError(errno.ENOSPC, "No space left on device", "c/0"))
        assert upsample("-o", "out.zarr") == 1
    error = capsys.readouterr().err
    assert re.search(r"out\.zarr: \d+ kB needed, .* free: No space", error) and "3 of 6 pieces are kept" in error
    assert upsample("-o", "out.zarr", "--resume") == 0


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_disk_that_fills_while_the_whole_is_written_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: Tensor) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(images, "save_array", full)
    assert upsample("-o", name) == 1
    assert f"{name}: 15 kB needed, 3 kB free: No space left" in capsys.readouterr().err
    assert left() == set()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_fills_leaves_nothing_and_says_what_was_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(destinations.os, "posix_fallocate", full)
    assert upsample("-o", "out.npy") == 1
    error = capsys.readouterr().err
    assert "kB needed" in error and "free" in error
    assert left() == set()


RUN = """
import signal, sys, time
# Whatever ran these tests may have had interruptions ignored, as a shell does for what it puts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
for ended in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(ended, signal.SIG_DFL)
from anyup.cli import command as cli
from anyup.limited_memory import executor
from anyup.limited_memory import prediction
prediction.BAND_PIXELS = 4 * 32
piece, begun = executor.Executor.piece, []
def halting(*arguments):
    begun.append(arguments)
    if len(begun) > 3:
        time.sleep(1e6)
    return piece(*arguments)
executor.Executor.piece = halting
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
# `test_stopping.py` has the other signals.
@pytest.mark.parametrize(("kind", "suffix"), [("SIGKILL", "npy"), ("SIGTERM", "npy"), ("SIGKILL", "zarr")])
def test_a_killed_run_is_completed_to_the_same_bytes(kind: str, suffix: str) -> None:
    if suffix == "zarr":
        pytest.importorskip("zarr")
    out, whole = Path(f"out.{suffix}"), Path(f"whole.{suffix}")
    assert upsample("-o", whole) == 0
    command = [sys.executable, "-c", RUN, "upsample", "photo.png", "--features", "features.npy"]
    command += ["--weights", "weights.pth", "-o", str(out)]
    env, number = {**os.environ, "OMP_NUM_THREADS": "1"}, getattr(signal, kind)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        wait_until(lambda: _pieces(out) >= 2, lambda: process.poll() is None)
        process.send_signal(number)
        _, told = process.communicate(timeout=PATIENCE)
    if kind != "SIGKILL":
        assert process.returncode == 128 + number
        assert "anyup: interrupted" in told and "of 6 pieces are kept; --resume goes on" in told
    assert 2 <= _pieces(out) < 6 and not out.exists()
    assert upsample("-o", out, "--resume") == 0
    assert _bytes(out) == _bytes(whole)
    assert left() == {out.name, whole.name}


def _bytes(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def _pieces(out: Path) -> int:
    path = out.with_name(f"{out.name}.part.json")
    return json.loads(path.read_text(encoding="utf-8"))["pieces"] if path.exists() else 0


@pytest.mark.parametrize(
    "option", ["-o", "--picture", "--values", "--head", "--encoder-weights", "--features", "--encoder"]
)
def test_a_variable_of_the_shell_that_is_not_set_is_a_mistake(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["upsample", "photo.png", "--features", "features.npy", "-o", "out.npy", option, ""]
    assert cli.main(arguments) == 2
    assert "expected a name or a path, got nothing" in capsys.readouterr().err
    assert left() == set()


@pytest.mark.parametrize("name", ["points.npy", "points.safetensors"])
def test_points_of_the_result_are_written_alone(name: str) -> None:
    Path("points.csv").write_text("row,column\n0,0\n23,31\n\n7, 12\n")
    assert upsample("--points", "points.csv", "-o", name) == 0
    found = array(name) if name.endswith(".npy") else images.read_tensors(name)["features"]
    torch.testing.assert_close(found, expected()[:, [0, 23, 7], [0, 31, 12]].T, rtol=1e-4, atol=1e-5)


def test_points_between_pixels_lie_on_the_size_that_was_asked_for() -> None:
    Path("points.csv").write_text("10.5,3\n47,63\n")
    assert upsample("--points", "points.csv", "--size", "48x64", "-o", "out.npy", "--dtype", "float16") == 0
    whole = expected(output_size=(48, 64))
    wanted = torch.stack([(whole[:, 10, 3] + whole[:, 11, 3]) / 2, whole[:, 47, 63]])
    assert array("out.npy").dtype == torch.float16
    torch.testing.assert_close(array("out.npy"), wanted.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "more", "status", "told"),
    [
        ("0,0\n24,0\n", (), 1, "line 2 has '24,0'"),
        ("0,0\n1;2\n", (), 1, "expected a row and a column on line 2, got '1;2'"),
        ("0,nan\n", (), 1, "line 1 has '0,nan'"),
        ("row,column\n", (), 1, "at least one line"),
        ("0,0\n", ("--region", "0,0,2,2"), 2, "--points goes without --region"),
        ("0,0\n", ("--picture", "p.png"), 2, "--points goes without --picture"),
        ("0,0\n", ("--resume",), 2, "--points goes without --resume"),
        ("0,0\n", ("-o", "out.zarr"), 2, ".npy, .pt"),
    ],
)
def test_points_that_cannot_be_are_told(
    text: str, more: tuple[str, ...], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("points.csv").write_text(text)
    assert upsample("-o", "out.npy", "--points", "points.csv", *more) == status
    assert told in capsys.readouterr().err
    assert left() == {"points.csv"}


def test_what_is_read_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("features.npy").read_bytes()
    assert upsample("-o", "./features.npy") == 2
    assert "features.npy: that is what is read" in capsys.readouterr().err
    assert Path("features.npy").read_bytes() == before
