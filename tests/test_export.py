"""The ONNX file gives what the package gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import fill, wave
from support.tiny_encoder import make_encoder
from torch import Tensor

from anyup import AnyUp, encoders, export, save
from anyup.bench.baseline import Published
from anyup.cli import command as cli
from anyup.export import to_onnx
from anyup.images import normalize_imagenet, resize

SMALL: dict[str, Any] = {"qk_dim": 16, "num_heads": 2, "lfu_dim": 8, "kernel_size_lfu": 3}


def small(**arguments: Any) -> AnyUp:
    return fill(AnyUp(**{**SMALL, **arguments}), 0).eval()


# The graph in PyTorch: quick, so that many shapes are tried.


@pytest.mark.parametrize(
    ("arguments", "image", "grid", "size"),
    [
        ({}, (24, 20), (6, 5), (24, 20)),
        ({"window": "cell"}, (24, 20), (6, 5), (48, 33)),
        ({"window_ratio": 0.0}, (19, 23), (5, 3), (7, 11)),
        ({"window_ratio": 0.3, "lfu_dim": 16}, (35, 105), (7, 15), (35, 105)),
        ({"kernel_size": 3}, (13, 9), (4, 1), (13, 9)),
        ({"kernel_size": 2}, (12, 9), (1, 4), (1, 1)),
    ],
)
@torch.no_grad()
def test_the_graph_is_the_forward(
    arguments: dict[str, Any], image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    model = small(**arguments)
    inputs = wave((2, 3, *image), 3, 0.8), wave((2, 7, *grid), 7)
    exact = AnyUp(**model.config, backend="reference").double().eval()
    exact.load_state_dict(model.state_dict())
    found = export._Graph(model, image, grid, size)(*inputs)
    published = Published(model)(*inputs, output_size=size)  # in float32 throughout, as the graph is
    assert_close_enough(found, published, exact(*(t.double() for t in inputs), size))


@torch.no_grad()
def test_a_window_one_key_too_narrow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = small(window_ratio=0.2), (wave((1, 3, 40, 40), 3, 0.8), wave((1, 7, 10, 10), 7))
    expected = model(*inputs)
    bounds = export.axis_bounds

    def narrow(*arguments: Any) -> Any:
        start, stop = bounds(*arguments)
        return start, tuple(max(last - 1, first + 1) for first, last in zip(start, stop, strict=True))

    monkeypatch.setattr(export, "axis_bounds", narrow)
    found = export._Graph(model, (40, 40), (10, 10), (40, 40))(*inputs)
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


# The file.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("onnx") / "anyup.onnx"
    assert to_onnx(small(), path, image_size=(24, 20), feature_size=(6, 5), channels=7) < 1e-4
    return path


@pytest.mark.slow
def test_the_file_is_of_standard_operators_and_alone(file: Path) -> None:
    import onnx

    model = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {(each.domain, each.version) for each in model.opset_import} == {("", export.OPSET)}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert [path.name for path in file.parent.iterdir()] == ["anyup.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "channels"), [(1, 7), (3, 5)])
def test_the_file_takes_any_batch_and_channels(file: Path, batch: int, channels: int) -> None:
    inputs = wave((batch, 3, 24, 20), 3, 0.8), wave((batch, channels, 6, 5), 7)
    model = small()
    exact = AnyUp(**model.config, backend="reference").double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = exact(*(t.double() for t in inputs))
        assert_close_enough(
            export._run(file, dict(zip(("image", "features"), inputs, strict=True))),
            Published(model)(*inputs),
            expected,
        )


@pytest.mark.slow
def test_a_file_with_other_results_is_not_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = export._run

    def wrong(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
        return run(file, inputs) * 1.01

    monkeypatch.setattr(export, "_run", wrong)
    monkeypatch.setattr(export, "_write", lambda graph, inputs, path: path.write_bytes(b"x"))
    with pytest.raises(RuntimeError, match="differ from the package's by 1.0e-02"):
        to_onnx(small(), tmp_path / "a.onnx", image_size=(24, 20), feature_size=(6, 5), channels=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_file_with_an_encoder_that_takes_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    encoder = make_encoder()
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    save(small(), tmp_path / "weights.safetensors")
    monkeypatch.setattr(encoders, "load_encoder", lambda name, device: encoder)
    output = tmp_path / "out.onnx"
    # The encoder sees 20 x 16: multiples of its patch, smaller along one axis and larger along the other.
    sizes = ["--size", "24x15", "--encoder-size", "19x17", "--output-size", "8", "--encoder", "tiny"]
    weights = ["--weights", str(tmp_path / "weights.safetensors")]
    assert cli.main(["export", "onnx", *sizes, *weights, "-o", str(output)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(output) and "largest difference from the package" in told.err
    photographs = wave((3, 3, 24, 15), 3, 0.3, 0.5).clamp(0, 1)
    with torch.no_grad():
        features = encoder(encoder.normalize(resize(photographs, (20, 16))))
        expected = small()(normalize_imagenet(photographs), features, (8, 8))
    found = export._run(output, {"photograph": photographs})
    assert found.shape == (3, 6, 8, 8)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_options_that_need_another_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["export", "onnx", "--size", "16", "--grid", "4", "-o", str(tmp_path / "out.onnx")]
    assert cli.main([*given, "--encoder-size", "8"]) == 2
    assert "--encoder-size goes with --encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "a.pt"}, ValueError, "path: expected a file name that ends in .onnx"),
        ({"image_size": (24,)}, ValueError, "image_size: expected two positive integers"),
        ({"feature_size": (0, 5)}, ValueError, "feature_size: expected positive integers"),
        ({"output_size": "x"}, ValueError, "output_size: expected two positive integers"),
        ({"channels": 0}, ValueError, "channels: expected a positive integer, got 0"),
        ({"encoder": torch.nn.Identity()}, TypeError, "encoder: expected an Encoder of anyup.encoders, got Identity"),
        ({"encoder": make_encoder()}, ValueError, r"feature_size: expected None beside an encoder, .* got \(6, 5\)"),
        ({"encoder_size": (8, 8)}, ValueError, "encoder_size: expected with an encoder alone"),
        ({"feature_size": None}, ValueError, "feature_size: expected two positive integers"),
        ({"upsampler": torch.nn.Identity()}, TypeError, "upsampler: expected an AnyUp, got Identity"),
    ],
)
def test_other_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    given = {"upsampler": small(), "path": "a.onnx", "image_size": (24, 20), "feature_size": (6, 5), **arguments}
    with pytest.raises(error, match=message):
        to_onnx(given.pop("upsampler"), tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_any_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else torch)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        to_onnx(small(), tmp_path / "a.onnx", image_size=(24, 20), feature_size=(6, 5))
