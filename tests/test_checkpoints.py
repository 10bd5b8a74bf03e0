"""Weights from names and files, and back."""

from __future__ import annotations

import argparse
import builtins
import http.server
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anyup import assets, checkpoints
from anyup.checkpoints import MINI, NAMED, PACKAGED, CheckpointNotFoundError, DownloadError, NamedCheckpoint, load, save
from anyup.model import AnyUp

SMALL: dict[str, Any] = {
    "input_dim": 5,
    "qk_dim": 16,
    "kernel_size": 3,
    "kernel_size_lfu": 7,
    "window_ratio": 0.2,
    "num_heads": 2,
    "lfu_dim": 24,
    "window": "cell",
}


@pytest.fixture
def small() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp(**SMALL)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub; the folder where its checkpoints go."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    for name, tensor in state_a.items():
        assert torch.equal(tensor, state_b[name]), name


def bare(model: AnyUp) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".PTH"])
def test_saved_model_comes_back_with_its_weights_and_arguments(small: AnyUp, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save(small, path)
    again = load(path)
    assert_same_weights(small, again)
    assert again.config == small.config
    assert again.config["window"] == "cell"
    assert not again.training
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_default_model_keeps_its_config(tmp_path: Path) -> None:
    model = AnyUp()
    save(model, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").config == model.config
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth").config == model.config


def test_published_state_dict_of_73_tensors_loads(tmp_path: Path) -> None:
    model = AnyUp()
    assert len(model.state_dict()) == 73
    torch.save(model.state_dict(), tmp_path / "anyup_paper.pth")
    assert_same_weights(model, load(str(tmp_path / "anyup_paper.pth")))


@pytest.mark.parametrize("key", ["anyup", "state_dict"])
def test_training_checkpoint_is_found_under_its_key(small: AnyUp, tmp_path: Path, key: str) -> None:
    path = tmp_path / "training.pth"
    torch.save({"step": 3, key: bare(small), "config": small.config, "optimizer": {"state": {}}}, path)
    again = load(path)
    assert_same_weights(small, again)
    assert again.config == small.config


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_widths_of_a_bare_state_dict_are_inferred(small: AnyUp, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bare{suffix}"
    if suffix == ".pth":
        torch.save(bare(small), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(bare(small), path)
    again = load(path, num_heads=2)
    assert_same_weights(small, again)
    for name in ("input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "lfu_dim"):
        assert again.config[name] == SMALL[name], name
    assert again.config["num_heads"] == 2
    assert again.config["window_ratio"] == 0.1
    assert again.config["window"] == "ratio"


def test_arguments_override_what_is_stored(small: AnyUp, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save(small, path)
    assert load(path).config["window"] == "cell"
    assert load(path, window="ratio").config["window"] == "ratio"
    again = load(path, num_heads=8, window_ratio=0.4)
    assert again.config["num_heads"] == 8
    assert again.config["window_ratio"] == 0.4


def test_use_natten_selects_the_cell_window(small: AnyUp, tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save(bare(small), path)
    assert load(path, num_heads=2, use_natten=True).config["window"] == "cell"
    assert load(path, num_heads=2, use_natten=False).config["window"] == "ratio"
    with pytest.raises(ValueError, match="use_natten"):
        load(path, num_heads=2, use_natten=True, window="ratio")


@pytest.mark.parametrize(
    ("name", "value"),
    [("qk_dim", 32), ("input_dim", 3), ("kernel_size", 1), ("kernel_size_lfu", 5), ("lfu_dim", 16)],
)
def test_width_that_contradicts_the_weights_is_refused(small: AnyUp, tmp_path: Path, name: str, value: int) -> None:
    path = tmp_path / "weights.pth"
    save(small, path)
    with pytest.raises(ValueError, match=f"{name}={value}.*{name}={SMALL[name]}"):
        load(path, **{name: value})
    torch.save({"anyup": bare(small), "config": {**small.config, name: value}}, path)
    with pytest.raises(ValueError, match=f"stored argument {name}={value}.*{name}={SMALL[name]}"):
        load(path)


def test_stored_argument_of_a_later_version_is_refused(small: AnyUp, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"anyup": bare(small), "config": {**small.config, "registers": 4}}, path)
    with pytest.warns(UserWarning, match="registers"), pytest.raises(ValueError, match="registers"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_another_dtype_load_into_float32(
    small: AnyUp, tmp_path: Path, dtype: torch.dtype, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    save(small.to(dtype), path)
    again = load(path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name].float()), name


def test_loaded_parameters_are_trainable_in_eval_mode(small: AnyUp, tmp_path: Path) -> None:
    save(small, tmp_path / "w.pth")
    for loaded in (load(MINI), load(tmp_path / "w.pth")):
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_leaves_the_random_generator_alone(small: AnyUp, tmp_path: Path) -> None:
    save(small, tmp_path / "a.pth")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(tmp_path / "a.pth")
    assert torch.equal(torch.rand(3), expected)


def test_weights_arrive_whatever_the_default_device(small: AnyUp, tmp_path: Path) -> None:
    save(small, tmp_path / "a.pth")
    with torch.device("meta"):
        again = load(tmp_path / "a.pth")
    assert_same_weights(small, again)


def test_loaded_model_runs_on_the_device_asked_for(small: AnyUp, tmp_path: Path) -> None:
    save(small, tmp_path / "a.pth")
    assert {p.device.type for p in load(tmp_path / "a.pth", device="cpu").parameters()} == {"cpu"}
    assert {p.device.type for p in load(tmp_path / "a.pth", torch.device("meta")).parameters()} == {"meta"}


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_device_that_is_not_there_is_refused_before_reading(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=r"device: .*" + device):
        load(tmp_path / "no file at all.pth", device=device)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointNotFoundError, match="'anyup', 'anyup_multi_backbone'") as caught:
        load("anyup_multibackbone")
    assert "anyup_multibackbone" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileNotFoundError)


def test_missing_file_names_the_place_that_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="weights.pth") as caught:
        load("weights.pth")
    assert str(tmp_path / "weights.pth") in str(caught.value)


def test_path_argument_never_means_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anyup").mkdir()
    with pytest.raises(ValueError, match="folder"):
        load(Path("anyup"))


def test_other_suffix_is_refused(small: AnyUp, tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.pt, \.pth, \.safetensors"):
        load(tmp_path / "weights.onnx")
    with pytest.raises(ValueError, match=r"\.pt, \.pth, \.safetensors"):
        save(small, tmp_path / "weights.onnx")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (torch.ones(3, dtype=torch.int64), "'rope.freqs': expected floating-point numbers, got torch.int64"),
        (torch.ones(3, 3).to_sparse(), "'rope.freqs': expected a dense tensor, got one of torch.sparse_coo"),
        (torch.ones(3, 3, device="meta"), "'rope.freqs': expected numbers, got a tensor on the device meta"),
        ([1.0], "'rope.freqs': expected a tensor, got list"),
    ],
)
def test_an_entry_that_is_no_weight_is_named_with_the_reason(
    entry: object, reason: str, small: AnyUp, tmp_path: Path
) -> None:
    torch.save({**bare(small), "rope.freqs": entry}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("anyup_mni", "anyup_mini"), ("anyup_multibackbone", "anyup_multi_backbone"), ("Anyup", "anyup")],
)
def test_a_misspelt_name_is_told_from_a_missing_file(name: str, meant: str) -> None:
    with pytest.raises(checkpoints.CheckpointNotFoundError, match=rf"did you mean '{meant}'\?"):
        load(name)
    with pytest.raises(checkpoints.CheckpointNotFoundError) as caught:
        load("runs/first/final.pth")
    assert "did you mean" not in str(caught.value)


def test_number_is_neither_name_nor_path() -> None:
    with pytest.raises(TypeError, match="name_or_path.*int"):
        load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_file_is_refused_by_name(small: AnyUp, tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"weights{suffix}"
    save(small, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        load(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_of_another_kind_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text("<html>Not Found</html>" * 20)
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        load(path)


def test_file_with_code_in_it_is_not_executed(small: AnyUp, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "sprung",)

    path = tmp_path / "weights.pth"
    torch.save({"anyup": bare(small), "extra": Trap()}, path)
    with pytest.raises(
        ValueError, match=r"weights.pth' cannot be read: it holds pickled objects \(.*\), which are never"
    ):
        load(path)
    assert not (tmp_path / "sprung").exists()
    torch.save({"anyup": bare(small), "args": argparse.Namespace(lr=1e-3)}, path)
    with pytest.raises(ValueError, match=r"pickled objects \(argparse.Namespace\)"):
        load(path)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {}, {"step": 3}, {"a": torch.ones(3, dtype=torch.int64)}]
)
def test_content_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="state dict"):
        load(tmp_path / "weights.pth")


def test_missing_and_unexpected_keys_and_other_shapes_are_all_listed(small: AnyUp, tmp_path: Path) -> None:
    state = bare(small)
    del state["rope.freqs"]
    del state["cross_decode.conv2d.weight"]
    state["module.rope.freqs"] = torch.ones(2, 16)
    state["norm.weight"] = torch.ones(1)
    state["aggregation.0.weight"] = torch.ones(16, 32, 1, 1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth") as caught:
        load(tmp_path / "weights.pth", num_heads=2, qk_dim=16)
    message = str(caught.value)
    assert "missing keys (2): " in message
    assert "unexpected keys (2): " in message
    for name in ("rope.freqs", "cross_decode.conv2d.weight", "module.rope.freqs", "norm.weight"):
        assert name in message
    assert "aggregation.0.weight: expected (16, 32, 3, 3), got (16, 32, 1, 1)" in message


def test_weights_of_a_wrapped_model_are_refused_with_what_to_do(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in AnyUp(qk_dim=16, num_heads=2).state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"a module around it: take 'module.' off their names") as caught:
        load(tmp_path / "weights.pth", num_heads=2, qk_dim=16)
    assert len(str(caught.value)) < 800


def test_head_count_that_does_not_divide_names_the_file_and_the_argument(small: AnyUp, tmp_path: Path) -> None:
    torch.save(bare(small), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth.*num_heads"):
        load(tmp_path / "weights.pth", num_heads=3)


def test_damaged_stored_arguments_are_refused(small: AnyUp, tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors_torch.save_file(bare(small), path, metadata={"anyup_config": "{"})
    with pytest.raises(ValueError, match="JSON"):
        load(path)
    safetensors_torch.save_file(bare(small), path, metadata={"anyup_config": "[1]"})
    with pytest.raises(ValueError, match="as a dict"):
        load(path)


def test_missing_safetensors_package_says_what_to_install(
    small: AnyUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "safetensors":
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: load(tmp_path / "weights.safetensors"),
        lambda: save(small, tmp_path / "other.safetensors"),
    ):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()
    assert not (tmp_path / "other.safetensors").exists()


def test_file_that_could_not_be_written_leaves_the_old_one(
    small: AnyUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    save(small, path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(small, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_save_refuses_what_is_no_upsampler_and_a_folder_that_is_not_there(small: AnyUp, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected an AnyUp, got Linear"):
        save(torch.nn.Linear(1, 1), tmp_path / "a.pth")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="missing"):
        save(small, tmp_path / "missing" / "a.pth")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_saved_file_has_the_permissions_of_an_ordinary_file(small: AnyUp, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    for name in ("a.pth", "a.safetensors"):
        save(small, tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_stored_arguments_of_a_safetensors_file_are_json(small: AnyUp, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    save(small, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["anyup_config"]) == small.config


class _Server:
    """A web server on this machine that answers with ``content`` and promises ``announced`` bytes."""

    def __init__(self) -> None:
        self.content = b""
        self.announced: int | None = None
        self.requests = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                self.send_response(200)
                length = len(outer.content) if outer.announced is None else outer.announced
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/release/anyup_paper.pth"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = _Server()
    monkeypatch.setitem(NAMED, "anyup", NamedCheckpoint(server.url, "features", "CC-BY-4.0"))
    yield server
    server.close()


def test_the_packaged_checkpoint_is_the_default_small_and_has_a_card(hub: Path) -> None:
    model = load()
    assert_same_weights(model, load(MINI))
    assert_same_weights(model, load(PACKAGED[MINI].path))
    assert model.config == AnyUp().config and not model.training
    assert PACKAGED[MINI].path.stat().st_size <= 4_000_000
    assert not hub.exists()  # nothing was downloaded
    card = assets.path("anyup_mini.md").read_text(encoding="utf-8")
    for part in ("licence", "Limits", "SqueezeNet", "bilinear"):
        assert part in card


def test_the_packaged_checkpoint_is_finite_and_was_trained() -> None:
    model, untrained = load(), AnyUp()
    for name, tensor in model.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), name
    norms = [name for name, tensor in untrained.state_dict().items() if bool((tensor == 1).all())]
    assert norms and all(bool((model.state_dict()[name] != 1).any()) for name in norms)


def test_published_addresses_are_those_of_the_release() -> None:
    release = "https://github.com/wimmerth/anyup/releases/download/"
    assert {name: checkpoint.url for name, checkpoint in NAMED.items()} == {
        "anyup": release + "checkpoint/anyup_paper.pth",
        "anyup_multi_backbone": release + "checkpoint_v2/anyup_multi_backbone.pth",
    }
    assert NAMED["anyup"].path.name == "anyup_paper.pth"


def test_named_checkpoint_is_downloaded_once(tmp_path: Path, hub: Path, server: _Server) -> None:
    model = AnyUp()
    torch.save(model.state_dict(), tmp_path / "published.pth")
    server.content = (tmp_path / "published.pth").read_bytes()
    assert_same_weights(model, load("anyup"))
    assert_same_weights(model, load("anyup", window="cell"))
    assert server.requests == 1
    assert [file.name for file in hub.iterdir()] == ["anyup_paper.pth"]


def test_file_put_into_the_cache_by_hand_is_found(hub: Path) -> None:
    model = AnyUp()
    hub.mkdir(parents=True)
    torch.save(model.state_dict(), hub / "anyup_multi_backbone.pth")
    assert_same_weights(model, load("anyup_multi_backbone"))


def test_name_is_not_shadowed_by_a_folder(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anyup").mkdir()
    hub.mkdir(parents=True)
    torch.save(AnyUp().state_dict(), hub / "anyup_paper.pth")
    load("anyup")


def assert_says_what_to_do(error: DownloadError, hub: Path, url: str) -> None:
    for part in (url, str(hub / "anyup_paper.pth"), "anyup.load(PATH)", "pretrained=False"):
        assert part in str(error)
    assert not list(hub.iterdir())


def test_machine_without_network_is_told_address_path_and_alternatives(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("anyup.stored_weights.urlopen", refused)
    with pytest.raises(DownloadError, match="not cached.*Name or service") as caught:
        load("anyup")
    assert_says_what_to_do(caught.value, hub, NAMED["anyup"].url)


def test_connection_that_breaks_off_leaves_no_file(tmp_path: Path, hub: Path, server: _Server) -> None:
    torch.save(AnyUp().state_dict(), tmp_path / "published.pth")
    whole = (tmp_path / "published.pth").read_bytes()
    server.content, server.announced = whole[: len(whole) // 2], len(whole)
    with pytest.raises(DownloadError, match="broke off") as caught:
        load("anyup")
    assert_says_what_to_do(caught.value, hub, server.url)


def test_page_in_place_of_the_file_does_not_end_in_the_cache(hub: Path, server: _Server) -> None:
    server.content = b"<html>Please log in</html>"
    with pytest.raises(DownloadError) as caught:
        load("anyup")
    assert_says_what_to_do(caught.value, hub, server.url)


def test_damaged_file_in_the_cache_is_named(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "anyup_paper.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="anyup_paper.pth"):
        load("anyup")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_is_refused_without_waiting(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(OSError, match=rf"name_or_path: .*a\{suffix}': expected a regular file, this is a named pipe"):
        checkpoints.load(tmp_path / f"a{suffix}", device="cpu")
