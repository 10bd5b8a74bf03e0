"""`anyup upsample --split-over-ranks`: processes of a group that write one file."""

from __future__ import annotations

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
from anyup.limited_memory import prediction
from anyup.cli import command
prediction.BAND_PIXELS = 4 * 30
dist.init_process_group = lambda backend: None  # it is there, and meets in a file
status = command.main({arguments!r})
assert not dist.is_initialized(), "its threads may not survive the interpreter's end"
sys.exit(status)
"""

DIES = """
from anyup.distributed import Ranks
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


def run(folder: Path, *arguments: str, before: str = "") -> list[tuple[int, str, str]]:
    """The exit status, stdout and stderr of each of two processes."""
    code = "import os, sys\n" + before + RUN.format(arguments=[*COMMAND, *arguments])
    processes = [start(code, folder, rank, 2, LOCAL_RANK=str(rank)) for rank in (0, 1)]
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def left() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"photo.png", "features.npy", "weights.pth", "meeting"}


def expected(size: tuple[int, int]) -> Tensor:
    image, features = normalize_imagenet(read_photo("photo.png")), read_features("features.npy")
    with torch.inference_mode():
        result: Tensor = checkpoints.load("weights.pth")(image, features, size)
    return result[0]


@pytest.mark.parametrize("name", ["out.npy", pytest.param("out.zarr", marks=pytest.mark.slow)])
def test_two_processes_write_what_the_model_returns(folder: Path, name: str) -> None:
    zarr = pytest.importorskip("zarr") if name.endswith("zarr") else None
    (status, out, err), other = run(folder, "-o", name, "--size", "47x60")
    assert (status, other[0]) == (0, 0), (err, other[2])
    assert out == f"{folder.resolve() / name}\n" or out == f"{name}\n"
    assert "upsampling 5 x 6 x 8 to 47 x 60 on cpu, on 2 ranks" in err
    assert other[1:] == ("", "")
    written = np.load(name) if zarr is None else zarr.open_array(name, mode="r")[...][0]
    torch.testing.assert_close(torch.from_numpy(written), expected((47, 60)), rtol=1e-5, atol=1e-5)
    assert left() == {name}


@pytest.mark.parametrize("before", [DIES, pytest.param(DIES_LATE, marks=pytest.mark.slow)], ids=["passes", "pieces"])
def test_when_a_process_dies_the_others_say_so_and_leave_no_file(folder: Path, before: str) -> None:
    (status, out, err), (died, _, _) = run(folder, "-o", "out.npy", before=before)
    assert (status, died) == (1, 9), err
    assert out == ""
    assert "rank 0 of 2: another rank ended, or did not answer within the group's timeout" in err
    assert left() == set()


@pytest.mark.slow
def test_what_process_0_cannot_read_is_an_error_of_all(folder: Path) -> None:
    (folder / "features.npy").write_bytes(b"nothing")
    (status, _, err), (other, _, its) = run(folder, "-o", "out.npy")
    assert (status, other) == (1, 1)
    assert "features.npy" in err
    assert its.startswith("anyup: error: rank 0: ") and "features.npy" in its
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
