"""`anyup upsample --split-over-ranks`: processes of a group that write one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from support.patience import PATIENCE
from support.ranks import start
from torch import Tensor

from anyup import checkpoints
from anyup.cli import command as cli
from anyup.images import normalize_imagenet, read_features, read_photo, save_array, save_picture
from anyup.model import AnyUp

pytest.importorskip("PIL")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.usefixtures("one_thread"),
]

COMMAND = ["upsample", "photo.png", "--features", "features.npy", "--weights", "weights.pth", "--split-over-ranks"]

RUN = """
import contextlib, io, json
from anyup.limited_memory import prediction
from anyup.cli import command
prediction.BAND_PIXELS = 4 * 30
meet, ends = dist.init_process_group, []
dist.init_process_group = lambda backend: None  # it is there, and meets in a file
for number, arguments in enumerate({commands!r}):
    if number:
        meet("gloo", init_method="file://{folder}/meeting-" + str(number), rank={rank}, world_size=2)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        ends.append([command.main(arguments), out, err])
    assert not dist.is_initialized(), "its threads may not survive the interpreter's end"
print(json.dumps([[status, out.getvalue(), err.getvalue()] for status, out, err in ends]))
"""

DIES = """
from anyup.ranks import Ranks
gather, calls = Ranks.gather, []
def dying(self, tensor, what):
    calls.append(what)
    if self.rank == 1 and len(calls) == 9:
        os._exit(9)
    return gather(self, tensor, what)
Ranks.gather = dying
"""

DIES_LATE = """
from anyup.limited_memory.executor import Executor
piece, calls = Executor.piece, []
def dying(self, *arguments):
    calls.append(arguments)
    if dist.get_rank() == 1 and len(calls) == 2:
        os._exit(9)
    return piece(self, *arguments)
Executor.piece = dying
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photo.png, features.npy and weights.pth."""
    generator = torch.Generator().manual_seed(1)
    save_picture(tmp_path / "photo.png", torch.rand(3, 23, 30, generator=generator))
    save_array(tmp_path / "features.npy", torch.randn(5, 6, 8, generator=generator))
    torch.manual_seed(0)
    checkpoints.save(AnyUp(qk_dim=32, num_heads=2), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


End = tuple[int, str, str]
"""Exit status, stdout and stderr of a command."""


def run(folder: Path, *commands: Sequence[str], before: str = "") -> list[tuple[int, list[End]]]:
    """Of each of two processes, which run the commands one after the other, its exit status and the commands' ends."""
    given = [[*COMMAND, *arguments] for arguments in commands]
    processes = []
    for rank in (0, 1):
        code = "import os, sys\n" + before + RUN.format(commands=given, folder=folder, rank=rank)
        processes.append(start(code, folder, rank, 2, LOCAL_RANK=str(rank)))
    told = [process.communicate(timeout=PATIENCE) for process in processes]
    assert processes[0].returncode == 0, told[0][1]
    return [(each.returncode, json.loads(out or "[]")) for each, (out, _) in zip(processes, told, strict=True)]


def left() -> set[str]:
    meetings = {path.name for path in Path().glob("meeting*")}
    return {path.name for path in Path().iterdir()} - {"photo.png", "features.npy", "weights.pth"} - meetings


def expected(size: tuple[int, int]) -> Tensor:
    image, features = normalize_imagenet(read_photo("photo.png")), read_features("features.npy")
    with torch.inference_mode():
        result: Tensor = checkpoints.load("weights.pth")(image, features, size)
    return result[0]


def test_two_processes_write_what_the_model_returns_and_one_says_what_is_wrong(folder: Path) -> None:
    names = ["out.npy", *(["out.zarr"] if find_spec("zarr") else [])]
    (folder / "broken.npy").write_bytes(b"nothing")
    commands = [("-o", name, "--size", "47x60") for name in names]
    (_, first), (_, second) = run(folder, *commands, ("-o", "none.npy", "--features", "broken.npy"))
    for name, (status, out, err), other in zip(names, first, second, strict=False):
        assert (status, *other) == (0, 0, "", ""), (err, other)
        assert out in (f"{folder.resolve() / name}\n", f"{name}\n")
        assert "upsampling 5 x 6 x 8 to 47 x 60 on cpu, on 2 ranks" in err
        written = np.load(name) if name == "out.npy" else pytest.importorskip("zarr").open_array(name, mode="r")[...][0]
        torch.testing.assert_close(torch.from_numpy(written), expected((47, 60)), rtol=1e-5, atol=1e-5)
    (status, _, err), other = first[-1], second[-1]
    assert (status, *other) == (1, 1, "", "")
    assert err.count("anyup: error: ") == 1 and "broken.npy" in err
    assert left() == {*names, "broken.npy"}


@pytest.mark.slow
@pytest.mark.parametrize("before", [DIES, DIES_LATE], ids=["passes", "pieces"])
def test_when_a_process_dies_the_others_say_so_and_leave_no_file(folder: Path, before: str) -> None:
    (_, ((status, out, err),)), (died, _) = run(folder, ("-o", "out.npy"), before=before)
    assert (status, died) == (1, 9), err
    assert out == ""
    assert "rank 0 of 2: another rank ended, or did not answer within the group's timeout" in err
    assert left() == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.npy"], "--split-over-ranks goes with torchrun"),
        (["-o", "out.pt"], "--split-over-ranks goes with an output that ends in .npy or .zarr"),
        (["-o", "out.npy", "--picture", "out.png"], "--split-over-ranks goes without --picture"),
        (["-o", "out.npy", "--region", "0,0,2,2"], "--split-over-ranks goes without --region"),
        (["-o", "out.npy", "--resume"], "--split-over-ranks goes without --resume"),
    ],
)
def test_what_does_not_go_with_it_is_an_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_one_photograph_is_not_made_by_each_of_several_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*COMMAND[:-1], "-o", "out.npy"]) == 2
    assert "one photograph and 2 processes: --split-over-ranks splits it over them" in capsys.readouterr().err
