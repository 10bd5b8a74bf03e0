"""Folders and repositories in Hugging Face's layout; the hub itself is a stand-in."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.recipe import fill, wave

import anyup
from anyup import AnyUp
from anyup.checkpoints import DownloadError

ARGUMENTS: dict[str, Any] = {"qk_dim": 16, "num_heads": 2, "window_ratio": 0.3, "window": "cell", "lfu_dim": 8}


@pytest.fixture
def model() -> AnyUp:
    return fill(AnyUp(**ARGUMENTS), 0).eval()


@pytest.fixture
def folder(model: AnyUp, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "new" / "folder")
    return tmp_path / "new" / "folder"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """A hub with one repository, owner/name; what it was asked for."""
    hugging_face = pytest.importorskip("huggingface_hub")
    asked: list[dict[str, Any]] = []

    def give(repository: str, name: str, **options: Any) -> str:
        asked.append({"repository": repository, "name": name, **options})
        if repository != "owner/name":
            raise hugging_face.errors.LocalEntryNotFoundError("no network\nmore")
        return str(folder / name)

    monkeypatch.setattr(hugging_face, "hf_hub_download", give)
    return asked


def assert_same(found: AnyUp, expected: AnyUp) -> None:
    assert found.config == expected.config and not found.training
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_folder_holds_two_files_and_gives_the_model_back(model: AnyUp, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text()) == model.config
    for again in (AnyUp.from_pretrained(folder), anyup.load(folder), anyup.load(folder / "model.safetensors")):
        assert_same(again, model)
    assert AnyUp.from_pretrained(str(folder), window_ratio=0.2, backend="torch").window_ratio == 0.2


def test_the_hubs_own_class_reads_what_is_written_and_writes_what_is_read(
    model: AnyUp, folder: Path, tmp_path: Path
) -> None:
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin

    class Theirs(AnyUp, mixin):  # type: ignore[misc, valid-type]
        from_pretrained = classmethod(mixin.from_pretrained.__func__)
        save_pretrained = mixin.save_pretrained

    theirs = Theirs.from_pretrained(folder)
    assert_same(theirs.eval(), model)
    image, features = wave((1, 3, 12, 10), 3, 0.8), wave((1, 5, 3, 2), 7)
    with torch.no_grad():
        assert torch.equal(theirs(image, features), model(image, features))
    for more in ({}, {"window": None, "use_natten": True}):
        Theirs(**{**ARGUMENTS, **more}).save_pretrained(tmp_path / "theirs")
        assert AnyUp.from_pretrained(tmp_path / "theirs", backend="torch").config == model.config


def test_a_repository_is_downloaded(model: AnyUp, hub: list[dict[str, Any]]) -> None:
    assert_same(anyup.load("hf://owner/name"), model)
    assert_same(anyup.load("hf://owner/name@v2"), model)
    assert_same(AnyUp.from_pretrained("owner/name", revision="v3", local_files_only=True, token="t"), model)
    assert [one["name"] for one in hub] == ["config.json", "model.safetensors"] * 3
    assert [one["revision"] for one in hub] == [None, None, "v2", "v2", "v3", "v3"]
    assert hub[-1]["local_files_only"] is True and hub[-1]["token"] == "t"


def test_a_repository_that_cannot_be_had_is_told(hub: list[dict[str, Any]]) -> None:
    for load in (lambda: anyup.load("hf://owner/other"), lambda: AnyUp.from_pretrained("owner/other")):
        with pytest.raises(DownloadError, match=r"'hf://owner/other' are not cached .*: no network\n  expected: "):
            load()


def test_a_name_that_is_no_repository_is_told() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(DownloadError, match="hf://owner/name"):
        anyup.load("hf://not/a/repository")


def test_without_the_hubs_package_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        AnyUp.from_pretrained("owner/name")


def test_both_files_are_pushed(model: AnyUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hugging_face = pytest.importorskip("huggingface_hub")
    said: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            said["token"] = token

        def create_repo(self, repository: str, **options: Any) -> Any:
            said.update(options)
            return SimpleNamespace(repo_id=repository)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            said.update(repository=repo_id, message=commit_message)
            shutil.copytree(folder_path, tmp_path / "pushed")
            return "address"

    monkeypatch.setattr(hugging_face, "HfApi", Api)
    assert model.push_to_hub("owner/name", private=True, token="t") == "address"
    assert said == {
        "token": "t",
        "private": True,
        "exist_ok": True,
        "repository": "owner/name",
        "message": "Push AnyUp",
    }
    assert_same(AnyUp.from_pretrained(tmp_path / "pushed"), model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json' cannot be read"),
        ("[1]", "expected the constructor's arguments, got a list"),
        ('{"qk_dim": 32}', "stored argument qk_dim=32 contradicts the weights"),
        ('{"colour": 1}', "does not know: colour"),
    ],
)
def test_another_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        AnyUp.from_pretrained(folder)


def test_a_folder_without_both_files_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"a folder with config.json and model.safetensors"):
        anyup.load(folder)


def test_an_interrupted_save_leaves_the_old_files(model: AnyUp, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("anyup.stored_weights._safetensors_torch", lambda path: SimpleNamespace(save=_fail))
    with pytest.raises(OSError, match="disk full"):
        fill(AnyUp(**ARGUMENTS), 1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _fail(*_: object) -> bytes:
    raise OSError("disk full")
