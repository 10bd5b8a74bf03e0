"""`anyup.ray.Upsample`: what becomes of a batch; and in Ray's workers, of which one is killed."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import in_a_process
from support.tiny_encoder import make_encoder

import anyup
import anyup.ray
from anyup.images import read_photo, save_picture

pytest.importorskip("PIL")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((16, 12), (16, 20), (24, 16))


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    anyup.save(anyup.AnyUp(qk_dim=16, num_heads=2), tmp_path / "weights.pth")
    paths = [tmp_path / f"{number}.png" for number in range(len(SIZES))]
    for path, (height, width) in zip(paths, SIZES, strict=True):
        save_picture(path, torch.rand(3, height, width))
    return paths


def upsample(photographs: list[Path], **arguments: Any) -> anyup.ray.Upsample:
    weights = photographs[0].with_name("weights.pth")
    given = {"encoder": make_encoder, "weights": weights, "encoder_size": 16, "dtype": "float32", **arguments}
    return anyup.ray.Upsample(**given)


def of_objects(cells: list[Any]) -> np.ndarray[Any, Any]:
    column = np.empty(len(cells), dtype=object)
    for number, cell in enumerate(cells):
        column[number] = cell
    return column


def test_a_row_gets_what_the_command_gives(photographs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.cli import command

    monkeypatch.setattr(anyup.encoders, "load_encoder", lambda name, device: make_encoder())
    folder = photographs[0].parent
    monkeypatch.chdir(folder)
    options = ("--encoder", "tiny", "--encoder-size", "16", "--weights", "weights.pth", "--size", "12")
    assert command.main(["upsample", *map(str, photographs), *options, "-o", "out"]) == 0
    kinds = {
        "bytes": of_objects([path.read_bytes() for path in photographs]),
        "path": of_objects([str(path) for path in photographs]),
        "image": of_objects(
            [(read_photo(path)[0].permute(1, 2, 0) * 255).round().byte().numpy() for path in photographs]
        ),
    }
    for pixels in kinds["image"]:
        pixels.flags.writeable = False  # as in Ray's object store
    for column, cells in kinds.items():
        batch = {column: cells, "id": np.arange(3)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = upsample(photographs, column=column, size=12)(batch)
        assert found.keys() == {column, "id", "features", "error"} and list(found["error"]) == [""] * 3
        for path, features in zip(photographs, found["features"], strict=True):
            np.testing.assert_allclose(features, np.load(f"out/{path.name}.npy"), rtol=1e-5, atol=1e-5)


def test_one_shape_makes_one_array_of_the_dtype(photographs: list[Path]) -> None:
    batch = {"path": of_objects([str(path) for path in photographs])}
    found = upsample(photographs, column="path", size=(10, 14), dtype="float16", output="high")(batch)
    assert (found["high"].shape, found["high"].dtype) == ((3, 6, 10, 14), np.float16)


def test_a_head_components_and_points_are_of_the_features(photographs: list[Path]) -> None:
    batch = {"path": of_objects([str(path) for path in photographs])}
    how: dict[str, Any] = {"column": "path", "size": (12, 12)}
    features = upsample(photographs, **how)(batch)["features"]
    torch.manual_seed(1)
    head = torch.nn.Conv2d(6, 2, 1)
    logits = upsample(photographs, head=head, **how)(batch)["features"]
    np.testing.assert_allclose(logits, head(torch.from_numpy(features)).detach(), rtol=1e-4, atol=1e-4)
    found = upsample(photographs, components=6, **how)(batch)  # of 6 channels: nothing is lost
    again = np.einsum("bkc,bkhw->bchw", found["features_basis"], found["features"])
    np.testing.assert_allclose(again + found["features_mean"][:, :, None, None], features, rtol=1e-4, atol=1e-4)
    few = upsample(photographs, components=2, **how)(batch)
    np.testing.assert_allclose(few["features"], found["features"][:, :2], rtol=1e-4, atol=1e-4)
    batch["points"] = of_objects([np.array([[0, 0], [11, 5], [3, 7]])] * 3)
    places = upsample(photographs, points="points", **how)(batch)["features"]
    for row, at in zip(features, places, strict=True):
        np.testing.assert_allclose(at, row[:, [0, 11, 3], [0, 5, 7]].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"size": (8, 8)}, {"components": 2}, {"head": torch.nn.Linear(6, 3)}])
def test_a_photograph_that_is_broken_has_an_error_and_its_row_stays(
    photographs: list[Path], arguments: dict[str, Any]
) -> None:
    photographs[1].write_bytes(photographs[1].read_bytes()[:60])
    batch = {"bytes": of_objects([path.read_bytes() for path in photographs])}
    found = upsample(photographs, **arguments)(batch)
    assert [bool(error) for error in found["error"]] == [False, True, False]
    assert "cannot be decoded" in found["error"][1]
    channels = {"components": 2, "head": 3}.get(next(iter(arguments), ""), 6)
    nothing = found["features"][1]
    assert nothing.shape == (channels, *arguments.get("size", (0, 0))) and np.isnan(nothing).all()
    assert np.isfinite(found["features"][0]).all() and found["features"][0].shape[0] == channels


def test_features_whose_norm_overflows_are_told(photographs: list[Path]) -> None:
    def loud() -> Any:
        encoder = make_encoder()
        quiet = encoder.features
        encoder.features = lambda image: quiet(image) * 1e25
        return encoder

    found = upsample(photographs, encoder=loud)({"bytes": of_objects([photographs[0].read_bytes()])})
    assert "the norm in float32 of features of" in found["error"][0]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "photograph: expected a file's bytes, a path or pixels, got NoneType"),
        ("gone.png", "No such file"),
        (np.zeros((4, 4, 3)), "pixels: expected (H, W, 3) of uint8, got (4, 4, 3) of float64"),
        (np.zeros((4, 4), np.uint8), "pixels: expected (H, W, 3) of uint8, got (4, 4) of uint8"),
    ],
)
def test_a_cell_that_is_no_photograph_is_told(photographs: list[Path], cell: object, message: str) -> None:
    (error,) = upsample(photographs)({"bytes": of_objects([cell])})["error"]
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: expected one of float16, float32, got 'bfloat16'"),
        ({"size": (4, 4, 4)}, "size: expected the longer side or"),
        ({"size": "64"}, "size: expected the longer side or .*, got '64'"),
        ({"size": 64.5}, "size: expected the longer side or .*, got 64.5"),
        ({"encoder_size": 0}, "encoder_size: expected the longer side or"),
        ({"encoder": None}, "encoder: expected a name or a function, got NoneType"),
        ({"max_memory": "2GX"}, 'max_memory: expected bytes or a text such as "2GB"'),
        ({"components": 7}, "components: expected at most the encoder's 6, got 7"),
        ({"components": 0}, "components: expected a whole number of 1 or more, got 0"),
        ({"components": 2.5}, "components: expected a whole number of 1 or more, got 2.5"),
        ({"head": torch.nn.ReLU()}, "head: expected nn.Conv2d or nn.Linear, got ReLU"),
        ({"components": 2, "head": torch.nn.Linear(6, 3)}, "components: expected without a head"),
    ],
)
def test_mistakes_are_told_at_once(photographs: list[Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        upsample(photographs, **arguments)


def test_columns_are_told_that_are_missing_or_there_already(photographs: list[Path]) -> None:
    batch = {"path": of_objects([str(photographs[0])]), "features": np.zeros(1)}
    with pytest.raises(ValueError, match="column 'bytes': expected one of 'path', 'features'"):
        upsample(photographs)(batch)
    with pytest.raises(ValueError, match="output: the batch has a column 'features' already"):
        upsample(photographs, column="path")(batch)


_PROGRAM = """
import json, logging, os, signal, sys
from pathlib import Path

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray reports on standard output whenever it likes

import ray

import anyup.ray
from support.tiny_encoder import make_encoder

folder = Path(sys.argv[1])


class Killed(anyup.ray.Upsample):
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        (folder / f"worker-{os.getpid()}").touch()
        if self.calls == 2 and not (folder / "killed").exists():  # the first worker that comes to a second batch
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
photographs = ray.data.read_binary_files(str(folder / "photographs"), include_paths=True, override_num_blocks=8)
made = photographs.map_batches(
    Killed,
    fn_constructor_args=(make_encoder, folder / "weights.pth"),
    fn_constructor_kwargs={"encoder_size": 16, "dtype": "float16", "size": 12},
    batch_size=1,
    num_cpus=0.5,
    compute=ray.data.ActorPoolStrategy(size=2),
)
made.drop_columns(["bytes"]).write_parquet(str(folder / "out"))
rows = ray.data.read_parquet(str(folder / "out")).take_all()
print(json.dumps([[Path(row["path"]).name, row["error"], row["features"].tolist()] for row in rows]), file=answer)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.skipif(not find_spec("ray"), reason="needs Ray: pip install 'ray[data]'")
def test_nothing_is_lost_or_doubled_where_a_worker_is_killed(photographs: list[Path]) -> None:
    folder = photographs[0].parent
    (folder / "photographs").mkdir()
    torch.manual_seed(2)
    for number in range(8):
        save_picture(folder / "photographs" / f"{number}.png", torch.rand(3, 12 + number, 16))
    (folder / "photographs" / "broken.png").write_bytes(photographs[0].read_bytes()[:60])
    rows = in_a_process(_PROGRAM, str(folder))
    assert (folder / "killed").exists() and len(
        list(folder.glob("worker-*"))
    ) >= 3  # two, and one in place of the killed
    assert sorted(name for name, _, _ in rows) == [*(f"{number}.png" for number in range(8)), "broken.png"]
    assert [name for name, error, _ in rows if error] == ["broken.png"]
    paths = {name: of_objects([str(folder / "photographs" / name)]) for name, error, _ in rows if not error}
    alone = upsample(photographs, column="path", size=12, dtype="float16")
    for name, _, features in rows:
        if name in paths:
            assert np.array_equal(np.array(features, np.float16), alone({"path": paths[name]})["features"][0])
