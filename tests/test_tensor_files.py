"""Files of tensors that cannot be read: one line says why, and never how to read them unsafely."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyup.checkpoints import load
from anyup.cli import command as cli
from anyup.cli.upsample_inputs import read_head
from anyup.images import read_features, read_tensors, save_picture
from anyup.tensor_files import read_numpy, read_safetensors, read_torch
from anyup.training import state

safetensors_torch = pytest.importorskip("safetensors.torch")


class Trap:
    """What a hostile file would have executed."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("sprung",)


def saved(suffix: str, folder: Path) -> Path:
    """A whole file with one map, called "features" where it has a name."""
    path, tensor = folder / f"whole{suffix}", torch.randn(3, 40, 40)
    if suffix == ".npy":
        np.save(path, tensor.numpy())
    elif suffix == ".npz":
        np.savez_compressed(path, features=tensor.numpy())
    elif suffix == ".safetensors":
        safetensors_torch.save_file({"features": tensor}, path)
    else:
        torch.save({"features": tensor}, path)
    return path


def read(path: Path) -> Any:
    if path.suffix in (".npy", ".npz"):
        return read_numpy(path, "features")
    return read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)


def failure(path: Path) -> str:
    """What is said of a file; "" where it can be read."""
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, -1])
def test_what_is_truncated_is_said_to_be(suffix: str, kept: float, tmp_path: Path) -> None:
    path = saved(suffix, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: -1 if kept == -1 else int(kept * len(content))])
    with pytest.raises(ValueError, match="^it is truncated, it"):
        read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_empty_is_said_to_be(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(ValueError, match="^it is empty$"):
        read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("changed", [0.2, 0.5, 0.8])
def test_what_is_damaged_is_not_said_to_be_truncated(suffix: str, changed: float, tmp_path: Path) -> None:
    path = saved(suffix, tmp_path)
    content = bytearray(path.read_bytes())
    first = int(changed * len(content))
    content[first : first + 200] = bytes(200)
    path.write_bytes(content)
    assert "truncated" not in failure(path)


KINDS = {
    "a PNG picture": b"\x89PNG\r\n\x1a\n" + bytes(600),
    "a JPEG picture": b"\xff\xd8\xff\xe0" + bytes(600),
    "a web page": b"\n<!DOCTYPE html><title>404</title>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(600),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_a_file_of_another_kind_is_said_to_be(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(KINDS[kind])
    with pytest.raises(ValueError, match=f"^it is {kind}"):
        read(path)


@pytest.mark.parametrize(
    ("suffix", "given", "kind"),
    [
        (".safetensors", ".pt", "a .safetensors file"),
        (".npy", ".pt", "a NumPy .npy file"),
        (".npz", ".pth", "an .npz file"),
        (".pt", ".safetensors", "a file of torch.save"),
        (".pt", ".npz", "a file of torch.save"),
        (".npy", ".safetensors", "a NumPy .npy file"),
    ],
)
def test_what_has_anothers_ending_is_said_to(suffix: str, given: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{given}"
    path.write_bytes(saved(suffix, tmp_path).read_bytes())
    with pytest.raises(ValueError, match=f"^it is {kind}$"):
        read(path)


def test_a_torchscript_archive_and_another_zip_are_named(tmp_path: Path) -> None:
    for member, kind in (("a/constants.pkl", "a TorchScript archive"), ("readme.txt", "a zip archive")):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"")
        with pytest.raises(ValueError, match=f"^it is {kind}"):
            read(path)


def pickles(folder: Path) -> dict[str, Path]:
    """Files that hold objects to be unpickled."""
    paths = {name: folder / name for name in ("new.pt", "old.pth", "plain.pt", "array.npy", "arrays.npz")}
    torch.save({"features": Trap()}, paths["new.pt"])
    torch.save(Trap(), paths["old.pth"], _use_new_zipfile_serialization=False)
    paths["plain.pt"].write_bytes(pickle.dumps(Trap()))
    np.save(paths["array.npy"], np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(paths["arrays.npz"], features=np.array([Trap()], dtype=object))
    return paths


@pytest.mark.parametrize("name", ["new.pt", "old.pth", "plain.pt", "array.npy", "arrays.npz"])
def test_pickled_objects_are_one_line_without_advice(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pickles(tmp_path)[name]
    calls: list[Callable[[], object]] = [lambda: read(path), lambda: read_features(path)]
    if path.suffix in (".pt", ".pth"):
        calls += [lambda: load(path), lambda: read_tensors(path), lambda: state.load(path)]
    for call in calls:
        with pytest.raises(ValueError, match="it holds pickled objects.*, which are never loaded") as caught:
            call()
        told = str(caught.value)
        assert "\n" not in told and not any(
            word in told for word in ("weights_only", "trust", "allow_pickle", "unsafe")
        )
    assert capsys.readouterr().out == ""


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = pickles(tmp_path)
    torch.save(torch.ones(3, 4, 4), tmp_path / "features.pt")
    save_picture(tmp_path / "photo.png", torch.zeros(3, 8, 8))
    words = ["upsample", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.npy")]
    whole = ["--features", str(tmp_path / "features.pt")]
    for options in (["--features", str(paths["new.pt"])], [*whole, "--weights", str(paths["old.pth"])]):
        assert cli.main([*words, *options]) == 1
        told = capsys.readouterr().err
        assert "it holds pickled objects" in told and told.count("anyup: error") == 1 and "trust" not in told


def test_only_the_array_that_is_wanted_is_unpacked(tmp_path: Path) -> None:
    whole = np.zeros((16, 256, 256), np.float32)
    np.savez_compressed(tmp_path / "a.npz", features=whole, others=np.zeros((64, 256, 256), np.float32), text="words")
    tracemalloc.start()
    found = read_features(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (1, 16, 256, 256)
    assert peak < 1.3 * whole.nbytes


def test_an_array_file_is_read_without_a_copy(tmp_path: Path) -> None:
    whole = np.zeros((16, 256, 256), np.float32)
    np.save(tmp_path / "a.npy", whole)
    tracemalloc.start()
    read_features(tmp_path / "a.npy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * whole.nbytes


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", "<f2"])
def test_every_layout_and_order_of_bytes_is_read(dtype: str, order: str, tmp_path: Path) -> None:
    array = np.asarray(np.random.default_rng(0).random((3, 4, 5)), dtype=dtype, order=order)  # type: ignore[call-overload]
    buffer = io.BytesIO()
    np.savez(buffer, array)
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    np.save(tmp_path / "a.npy", array)
    for name in ("a.npz", "a.npy"):
        found = read_features(tmp_path / name)
        assert np.array_equal(found[0].numpy(), array)
        found += 1  # it can be written


ODD = {
    "sparse": (lambda: torch.ones(3, 4, 4).to_sparse(), "expected a dense tensor, got one of torch.sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3, 4)] * 2), "expected a dense tensor, got a nested one"),
    "meta": (lambda: torch.ones(3, 4, 4, device="meta"), "the device meta"),
    "complex": (lambda: torch.ones(3, 4, 4, dtype=torch.complex64), "expected floating-point numbers"),
    "integers": (lambda: torch.ones(3, 4, 4, dtype=torch.int64), "expected floating-point numbers"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_without_numbers_to_compute_with_is_named(kind: str, tmp_path: Path) -> None:
    make, message = ODD[kind]
    torch.save({"features": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"features .*a.pt: .*{message}"):
        read_features(tmp_path / "a.pt")
    torch.save({"rope.freqs": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt'.*'rope.freqs': .*{message}"):
        load(tmp_path / "a.pt")
    if kind != "nested":
        torch.save({"weight": make()[0]}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"head .*a.pt: weight: .*{message}"):
            read_head(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(3, [("a", "f4")]), np.zeros(3, np.longdouble)])
def test_numbers_that_torch_has_no_type_for_are_named(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="^torch has no tensors of NumPy's (str_|void|longdouble)"):
        read(tmp_path / "a.npy")


def test_what_the_memory_does_not_hold_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 8.00 TiB")

    monkeypatch.setattr(np, "load", fails)
    with pytest.raises(ValueError, match="not enough memory"):
        read(saved(".npy", tmp_path))


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError):
            read(tmp_path / f"none{suffix}")
