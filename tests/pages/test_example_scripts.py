"""The scripts and the notebook of examples/ run, on small photographs and with a small encoder."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkouts import ROOT
from support.small_video import write_video
from support.tiny_encoder import make_encoder
from torch import nn

import anyup
from anyup import images
from anyup.images import read_photo, save_picture

pytest.importorskip("PIL")

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = ROOT / "examples"

ARGUMENTS = {
    "folder.py": "photos out",
    "video.py": "video.mp4 out",
    "region.py": "photos/a.jpg out.png 40 8 16 24",
    "probe.py": "photos/a.jpg mask.png out.png",
    "to_zarr.py": "photos/a.jpg out.zarr 96",
}
NEEDS = {"video.py": "av", "to_zarr.py": "zarr"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    Path("photos").mkdir()
    for name in ("a", "b"):
        save_picture(f"photos/{name}.jpg", torch.rand(3, 28, 42, generator=generator))
    mask = torch.zeros(3, 28, 42)
    mask[:, :, 21:] = 1 / 255
    save_picture("mask.png", mask)
    if find_spec("av"):
        write_video("video.mp4")

    def load_encoder(name: str) -> nn.Module:
        return make_encoder(stride=14)

    monkeypatch.setattr(anyup.encoders, "load_encoder", load_encoder)
    monkeypatch.setattr(images, "fit_within", lambda size, side: size)  # small as they are
    return tmp_path


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name].split()])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_script_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_script_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    torch.manual_seed(0)
    run(name, monkeypatch)
    if name == "folder.py":
        assert [path.name for path in sorted(Path("out").iterdir())] == ["a.jpg.npy", "b.jpg.npy"]
        assert np.load("out/a.jpg.npy").shape[1:] == (28, 42)
    if name == "video.py":
        assert len(list(Path("out").glob("*.jpg"))) == 3
    if name == "region.py":
        assert read_photo("out.png").shape == (1, 3, 16, 24)
    if name == "probe.py":
        assert read_photo("out.png").shape == (1, 3, 28, 42)
    if name == "to_zarr.py":
        import zarr

        array = zarr.open_array("out.zarr", mode="r")
        assert array.shape[2:] == (64, 96)
        assert np.isfinite(array[:]).all() and array[0, :, -1, -1].any()


def test_notebook_runs_and_stores_no_output() -> None:
    notebook = json.loads((EXAMPLES / "quick_look.ipynb").read_text(encoding="utf-8"))
    given: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), "quick_look.ipynb", "exec"), given)
    assert given["upsampled"].shape == (1, 384, 196, 294)
    assert torch.allclose(given["at_points"][0, 1], given["upsampled"][0, :, 100, 40], atol=1e-4)
    # A cell weighs most where it lies.
    row, column = divmod(int(given["weights"][0].argmax()), 294)
    assert abs(row // 7 - 8) <= 2 and abs(column // 7 - 17) <= 2
