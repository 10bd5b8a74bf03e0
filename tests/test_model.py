"""The model: its constructor, its parameters, and what a call returns."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import BACKENDS, assert_close_enough
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.bench.baseline import Published
from anyup.model import OPERATIONS
from anyup.window import CellWindow, RatioWindow

SMALL: dict[str, Any] = {"qk_dim": 32, "num_heads": 2, "lfu_dim": 16, "kernel_size_lfu": 3}


def small(seed: int = 0, **arguments: Any) -> AnyUp:
    return fill(AnyUp(**{**SMALL, **arguments}), seed).eval()


def inputs(
    size: tuple[int, int] = (24, 20), grid: tuple[int, int] = (6, 5), channels: int = 7, batch: int = 1
) -> tuple[Tensor, Tensor]:
    return wave((batch, 3, *size), 3, 0.8), wave((batch, channels, *grid), 7)


# The constructor.


@pytest.mark.parametrize(
    ("arguments", "total"), [({}, 878_080), ({"lfu_dim": 32}, 867_296), ({"kernel_size": 3}, 881_152)]
)
def test_parameters_are_as_many_as_published(arguments: dict[str, Any], total: int) -> None:
    assert sum(p.numel() for p in AnyUp(**arguments).parameters()) == total


def test_state_dict_has_the_published_names_and_shapes() -> None:
    expected = {"image_encoder.0.weight": (128, 3, 1, 1), "rope.freqs": (2, 128)}
    expected |= {f"{name}_encoder.0.weight": (128, 128, 1, 1) for name in ("key", "query")}
    expected["aggregation.0.weight"] = (128, 256, 3, 3)
    expected["key_features_encoder.0.basis"] = (128, 1, 5, 5)
    for encoder in ("image_encoder", "key_encoder", "query_encoder", "key_features_encoder", "aggregation"):
        for block in (1, 2):
            for norm in (0, 3):
                expected |= {f"{encoder}.{block}.block.{norm}.{kind}": (128,) for kind in ("weight", "bias")}
            expected |= {f"{encoder}.{block}.block.{conv}.weight": (128, 128, 1, 1) for conv in (2, 5)}
    attention = "cross_decode.cross_attn"
    expected |= {f"{attention}.norm_{name}.weight": (128,) for name in "qk"}
    expected |= {
        f"{attention}.attention.in_proj_weight": (384, 128),
        f"{attention}.attention.in_proj_bias": (384,),
        f"{attention}.attention.out_proj.weight": (128, 128),
        f"{attention}.attention.out_proj.bias": (128,),
        "cross_decode.conv2d.weight": (128, 128, 3, 3),
    }
    model = AnyUp()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert len(expected) == 73 and not list(model.buffers())


def test_other_widths_give_the_published_shapes() -> None:
    state = AnyUp(input_dim=4, qk_dim=64, kernel_size=3, kernel_size_lfu=7, lfu_dim=32).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["image_encoder.0.weight"] == (64, 4, 3, 3)
    assert shapes["key_features_encoder.0.basis"] == (32, 1, 7, 7)
    assert shapes["key_features_encoder.1.block.0.weight"] == (32,)
    assert shapes["key_features_encoder.1.block.2.weight"] == (64, 32, 1, 1)
    assert shapes["key_features_encoder.1.block.3.weight"] == (64,)
    assert shapes["key_features_encoder.1.shortcut.weight"] == (64, 32, 1, 1)
    assert len(shapes) == 74


def test_rotary_frequencies_start_as_published() -> None:
    freqs = AnyUp(qk_dim=64, num_heads=2).rope.freqs
    expected = torch.zeros(2, 64)
    for j in range(32):
        expected[0, j] = expected[1, 32 + j] = 2 * math.pi * 100 ** (-(j % 16) / 15)
    torch.testing.assert_close(freqs.detach(), expected)


def test_arguments_come_in_the_published_order() -> None:
    model = AnyUp(3, 64, 1, 3, 0.2, 2, False, True, 32)
    assert model.config == {
        "input_dim": 3,
        "qk_dim": 64,
        "kernel_size": 1,
        "kernel_size_lfu": 3,
        "window_ratio": 0.2,
        "num_heads": 2,
        "init_gaussian_derivatives": False,
        "lfu_dim": 32,
        "window": "cell",
    }


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_natten": True}, {"window": "cell", "window_ratio": 0.25, "num_heads": 1}, {"kernel_size": 5}],
)
def test_config_makes_the_same_model_again(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    again = AnyUp(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(*inputs()), model(*inputs()))


def test_unknown_arguments_are_named_in_one_warning() -> None:
    with pytest.warns(UserWarning, match="num_head, qk_dims") as caught:
        model = AnyUp(**SMALL, qk_dims=3, num_head=8)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert model.config["num_heads"] == 2


def test_known_arguments_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnyUp(**SMALL, backend="torch", window="ratio")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk_dim": 100}, "qk_dim: .*multiple of 8.*100"),
        ({"qk_dim": 0}, "qk_dim: .*0"),
        ({"lfu_dim": 12}, "lfu_dim: .*multiple of 8.*12"),
        ({"num_heads": 3}, "num_heads: .*divisor of qk_dim = 32.*3"),
        ({"num_heads": 0}, "num_heads: .*0"),
        ({"input_dim": 0}, "input_dim: .*0"),
        ({"kernel_size_lfu": 4}, "kernel_size_lfu: .*odd.*4"),
        ({"kernel_size": -1}, "kernel_size: .*-1"),
        ({"window": "round"}, "window: .*'round'"),
        ({"use_natten": True, "window": "ratio"}, "window: .*use_natten.*'ratio'"),
        ({"backend": "cuda"}, "backend: .*triton.*'cuda'"),
        ({"backend": ["torch", "cuda"]}, "backend: .*'cuda'"),
        ({"backend": {"attention": "torch"}}, "backend: .*window_attention.*attention"),
        ({"backend": {"pixel_encoder": "cuda"}}, "backend: .*'cuda'"),
        ({"window_ratio": math.nan}, "window_ratio: .*nan"),
        ({"window_ratio": math.inf}, "window_ratio: .*inf"),
    ],
)
def test_a_bad_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyUp(**{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk_dim": 32.0}, "qk_dim: .*integer"),
        ({"num_heads": 2.0}, "num_heads: .*integer"),
        ({"lfu_dim": "16"}, "lfu_dim: .*integer"),
        ({"window_ratio": "0.1"}, "window_ratio: "),
        ({"backend": 5}, "backend: "),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AnyUp(**{**SMALL, **arguments})


def test_use_natten_is_the_cell_window() -> None:
    assert AnyUp(**SMALL, use_natten=True).window == CellWindow(0.1)
    assert AnyUp(**SMALL, use_natten=True, window="cell").window == CellWindow(0.1)
    assert AnyUp(**SMALL, window="cell", window_ratio=0.2).window == CellWindow(0.2)
    assert AnyUp(**SMALL).window == RatioWindow(0.1)
    with torch.no_grad():
        image, features = inputs((32, 32), (16, 16))
        assert not torch.allclose(small()(image, features), small(use_natten=True)(image, features), atol=1e-3)


# A call.


CALLS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "plain": ((24, 20), (6, 5), None, {}),
    "odd and prime": ((23, 19), (7, 5), (11, 13), {}),
    "output smaller than the grid": ((24, 20), (6, 5), (5, 4), {}),
    "output larger than the image": ((12, 14), (6, 5), (33, 37), {}),
    "features finer than the image": ((12, 10), (18, 20), None, {}),
    "one key": ((16, 12), (1, 1), None, {}),
    "one row of keys": ((16, 12), (1, 6), None, {}),
    "one column of keys": ((16, 12), (6, 1), None, {}),
    "one pixel": ((1, 1), (4, 3), None, {}),
    "one row of pixels": ((1, 9), (4, 3), None, {"kernel_size": 3}),
    "kernel size 3": ((24, 20), (6, 5), None, {"kernel_size": 3}),
    "even kernel": ((24, 20), (6, 5), None, {"kernel_size": 4}),
    "even kernel, one row of pixels": ((1, 9), (4, 3), (3, 9), {"kernel_size": 2}),
    "more filters than width": ((24, 20), (6, 5), None, {"lfu_dim": 40}),
    "every key": ((24, 20), (6, 5), None, {"window_ratio": 0.0}),
    "tiny window": ((24, 20), (12, 10), None, {"window_ratio": 0.01}),
    "half the grid": ((24, 20), (6, 5), None, {"window_ratio": 0.5}),
    "nearly the grid": ((24, 20), (6, 5), None, {"window_ratio": 0.9}),
    "cell": ((24, 20), (12, 10), None, {"window": "cell"}),
    "one head": ((24, 20), (6, 5), None, {"num_heads": 1}),
    "eight heads": ((24, 20), (6, 5), None, {"num_heads": 8}),
    "gaussian derivatives": ((24, 20), (6, 5), None, {"init_gaussian_derivatives": True}),
}
"""Sizes of the image, the features and the output, and the constructor's arguments."""

# The two dtypes of half precision go through the same steps: shapes have one of them, by turns.
CALLS_IN_DTYPES = [
    (name, dtype)
    for number, name in enumerate(CALLS)
    for dtype in (torch.float32, torch.float64, (torch.float16, torch.bfloat16)[number % 2])
]


@pytest.mark.parametrize(("name", "dtype"), CALLS_IN_DTYPES)
def test_a_forward_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    size, grid, output, arguments = CALLS[name]
    # One pixel has the largest error, and it is a matter of luck which backend's is larger there: many are compared.
    batch = 16 if dtype == torch.float32 else 2
    image, features = (t.to(dtype) for t in inputs(size, grid, batch=batch))
    outs = []
    for backend, wide in (("torch", dtype), ("reference", dtype), ("reference", torch.float64)):
        model = small(**arguments, backend=backend).to(dtype).to(wide)
        with torch.no_grad():
            outs.append(model(image.to(wide), features.to(wide), output))
    assert outs[0].shape == (batch, 7, *(output or size))
    assert_close_enough(*outs, name=str(dtype))


@pytest.mark.parametrize("kernel_size", [2, 4, 6])
@pytest.mark.parametrize(
    ("size", "grid", "output", "arguments"),
    [
        ((24, 20), (6, 5), None, {}),
        ((17, 23), (5, 6), (9, 30), {"window": "cell", "num_heads": 4}),
        ((7, 12), (7, 12), (7, 12), {"window_ratio": 0.0, "input_dim": 5}),
    ],
    ids=str,
)
def test_an_even_kernel_gives_the_numbers_of_the_published_forward(
    size: Any, grid: Any, output: Any, arguments: dict[str, Any], kernel_size: int
) -> None:
    """Whose encoded image is a row and a column larger than the image, with rotary coordinates of its own."""
    model = small(kernel_size=kernel_size, **arguments).double()
    image = wave((2, arguments.get("input_dim", 3), *size), 3, 0.8).double()
    features = wave((2, 7, *grid), 7).double()
    with torch.no_grad():
        expected = Published(model)(image, features, None, output)
        torch.testing.assert_close(model(image, features, output), expected, rtol=1e-9, atol=1e-9)
        assert model.guidance(image).shape[2:] == (size[0] + 1, size[1] + 1)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_an_even_kernel_s_gradients_are_those_of_the_published_forward(kernel_size: int) -> None:
    found = []
    for published in (False, True):
        model = small(kernel_size=kernel_size).double()
        image, features = (t.double().requires_grad_() for t in inputs((11, 9), (4, 3)))
        out = (Published(model) if published else model)(image, features)
        out.backward(wave(tuple(out.shape), 31).double())
        leaves = dict(model.named_parameters(), image=image, features=features)
        found.append({name: t.grad for name, t in leaves.items() if t.grad is not None and t.grad.any()})
    assert found[0].keys() == found[1].keys() and "image_encoder.0.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            gradient, found[1][name], rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("channels", [1, 7, 1537])
def test_any_number_of_channels_obeys_the_error_rule(channels: int) -> None:
    """Over several inputs together: the unified features of six positions differ by little, which a normalisation
    magnifies, roundings and all; which backend is the nearer one is a matter of luck."""
    models = small(backend="torch"), small(backend="reference")
    exact = small(backend="reference").double()
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 3, 9, 8), (1, channels, 3, 2)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(16)]
    with torch.no_grad():
        outs = [torch.cat([model(*pair) for pair in drawn]) for model in models]
        outs.append(torch.cat([exact(image.double(), features.double()) for image, features in drawn]))
    assert_close_enough(*outs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 3)])
def test_a_model_of_width_8_takes_a_small_grid(grid: tuple[int, int], backend: str) -> None:
    image, features = inputs((8, 9), grid)
    with torch.no_grad():
        out = AnyUp(qk_dim=8, num_heads=2, backend=backend)(image, features)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_batch(backend: str) -> None:
    image, features = inputs(batch=2)
    assert small(backend=backend)(image[:0], features[:0]).shape == (0, 7, 24, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_gives_its_value_everywhere(backend: str) -> None:
    image, features = inputs(grid=(1, 1))
    with torch.no_grad():
        out = small(backend=backend)(image, features)
    torch.testing.assert_close(out, features.expand_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_image_of_a_batch_is_on_its_own(backend: str) -> None:
    image, features = inputs(batch=3)
    model = small(backend=backend)
    with torch.no_grad():
        both = model(image, features)
        for n in range(3):
            alone = model(image[n : n + 1], features[n : n + 1])
            torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels last", "sliced", "transposed"])
def test_strides_of_the_inputs_change_nothing(layout: str) -> None:
    image, features = inputs((24, 20), (6, 5))

    def move(t: Tensor) -> Tensor:
        if layout == "channels last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack((t, t + 1), dim=-1)[..., 0]
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    model = small()
    with torch.no_grad():
        torch.testing.assert_close(model(move(image), move(features)), model(image, features), rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_were() -> None:
    image, features = inputs()
    before = image.clone(), features.clone()
    small()(image, features).sum().backward()
    assert torch.equal(image, before[0]) and torch.equal(features, before[1])


@pytest.mark.parametrize("values", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_output_has_the_features_dtype_whatever_the_model_s_and_the_image_s(
    weights: torch.dtype, values: torch.dtype
) -> None:
    image, features = inputs()
    with torch.no_grad():
        expected = small()(image, features)
        for pixels in (torch.float32, torch.float16):
            out = small().to(weights)(image.to(pixels), features.to(values))
            assert out.dtype == values
            assert (out - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_has_the_features_dtype_under_autocast(backend: str, features_dtype: torch.dtype) -> None:
    image, features = inputs()
    model = small(backend=backend)
    expected = model(image, features)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(image, features.to(features_dtype))
    assert out.dtype == features_dtype
    assert (out - expected).abs().mean() < 0.1 * expected.abs().mean()
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "out_proj" not in n)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_model_trains(cast: str) -> None:
    model = getattr(small(), cast)()
    image, features = inputs()
    model(image, features).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "out_proj" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == parameter.dtype


def test_values_are_carried_by_the_attention_of_the_features() -> None:
    image, features = inputs()
    model = small()
    with torch.no_grad():
        assert torch.equal(model(image, features, values=features), model(image, features))
        values = torch.cat((features[:, 2:4], torch.ones(1, 1, 6, 5)), dim=1)
        out = model(image, features, values=values)
        torch.testing.assert_close(out[:, :2], model(image, features)[:, 2:4])
        torch.testing.assert_close(out[:, 2], torch.ones(1, 24, 20))
        assert model(image, features, values=values.double()).dtype == torch.float64


@pytest.mark.parametrize("chunk", [1, 7, 100, 10**6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_does_not_depend_on_the_chunk(chunk: int, backend: str) -> None:
    image, features = inputs()
    model = small(backend=backend)
    with torch.no_grad():
        expected = model(image, features)
        torch.testing.assert_close(model(image, features, q_chunk_size=chunk), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [[12, 10], (12, 10), torch.Size((12, 10))])
def test_output_size_may_be_any_sequence(size: Any) -> None:
    with torch.no_grad():
        assert small()(*inputs(), output_size=size).shape == (1, 7, 12, 10)


def test_a_smaller_output_pools_the_queries() -> None:
    image, features = inputs()
    model = small(backend="reference")
    with torch.no_grad():
        size = (9, 7)
        query, key, _ = model.queries_and_keys(image, features, size)
        encoded = model.image_encoder(image)
        turned = _rotated(encoded, model.rope.freqs)
        pooled = F.adaptive_avg_pool2d(model.query_encoder(turned), size)
        x = model.cross_decode.conv2d(pooled).permute(0, 2, 3, 1)
        attention = model.cross_decode.cross_attn
        x = F.linear(
            attention.norm_q(x), attention.attention.in_proj_weight[:32], attention.attention.in_proj_bias[:32]
        )
    torch.testing.assert_close(query.flatten(3), x, rtol=1e-4, atol=1e-4)
    assert key.shape == (1, 6, 5, 2, 16)


def _rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """The rotary embedding of (B, D, H, W), angle by angle."""
    out = torch.empty_like(x)
    dim, height, width = x.shape[1:]
    for i in range(height):
        for j in range(width):
            angle = freqs[0] * (i / max(height - 1, 1)) + freqs[1] * (j / max(width - 1, 1))
            vector = x[:, :, i, j]
            half = torch.cat((-vector[:, dim // 2 :], vector[:, : dim // 2]), dim=1)
            out[:, :, i, j] = vector * angle.cos() + half * angle.sin()
    return out


def test_gradients_reach_every_parameter_that_influences_the_result() -> None:
    model = small()
    image, features = (t.requires_grad_() for t in inputs())
    model(image, features).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"cross_decode.cross_attn.attention.out_proj.{kind}" for kind in ("weight", "bias")}
    assert image.grad is not None and features.grad is not None


def test_a_frozen_model_gives_gradients_to_its_inputs() -> None:
    model = small().requires_grad_(False)
    image, features = inputs()
    out = model(image, features)
    assert out.grad_fn is None  # nothing is kept
    features.requires_grad_()
    model(image, features).sum().backward()
    assert features.grad is not None and features.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_in_inference(mode: Any) -> None:
    with mode():
        out = small()(*inputs())
    assert out.grad_fn is None and not out.requires_grad


def test_inference_mode_before_training_does_no_harm() -> None:
    image, features = inputs((26, 22))
    model = small()
    with torch.inference_mode():
        model(image, features)
    model(image, features).sum().backward()
    assert model.rope.freqs.grad is not None


def test_a_copy_and_a_pickle_are_the_same_model() -> None:
    model = small(backend="torch", window="cell")
    with torch.no_grad():
        expected = model(*inputs())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(*inputs()), expected) and again.config == model.config


def test_a_forward_on_the_meta_device_works_out_the_shape() -> None:
    model = small().to("meta")
    image, features = (t.to("meta") for t in inputs())
    out = model(image, features, (11, 13))
    assert out.device.type == "meta" and out.shape == (1, 7, 11, 13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_device_does_not_matter(backend: str) -> None:
    image, features = inputs((22, 18))
    model = small(backend=backend)
    with torch.no_grad():
        expected = model(image, features)
        with torch.device("meta"):
            assert torch.equal(model(image, features), expected)
            model.explain(image, features)


def test_memory_that_nobody_wrote_is_never_read(poisoned_memory: None) -> None:
    model = small()
    image, features = inputs((96, 100), (7, 9), batch=2)
    out = model(image, features, (90, 80))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_padded_border_replicates_where_there_is_nothing_to_reflect() -> None:
    convolution = small().aggregation[0]
    x = wave((1, 64, 1, 6), 4)
    padded = F.pad(x[:, :, [0, 0, 0]], (1, 1, 0, 0), mode="reflect")
    with torch.no_grad():
        torch.testing.assert_close(convolution(x).permute(0, 3, 1, 2), F.conv2d(padded, convolution.weight))
        x = wave((1, 64, 5, 6), 4)
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        expected = F.conv2d(padded, convolution.weight).permute(0, 2, 3, 1)
        torch.testing.assert_close(convolution(x), expected, rtol=1e-5, atol=1e-5)


# Backends.


def test_explain_says_what_would_run_and_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.ops.dispatch import Operation

    monkeypatch.setattr(Operation, "run", None)
    explanation = small().explain(*inputs())
    assert explanation.chosen == {**dict.fromkeys(OPERATIONS, "torch"), "pixel_encoder_pair": None, "key_grid": None}
    text = str(explanation)
    assert all(operation in text for operation in OPERATIONS)
    assert "24 x 20 from 6 x 5" in text and "reference: can, comes after torch" in text


def test_explain_converts_no_weight() -> None:
    upsampler, (image, features) = small().bfloat16(), (tensor.bfloat16() for tensor in inputs())
    with torch.profiler.profile() as profile, torch.no_grad():
        upsampler.explain(image, features)
    asked = {event.key for event in profile.key_averages()}
    assert "aten::expand" in asked and "aten::_to_copy" not in asked


def test_a_name_binds_the_attention_and_is_a_preference_for_the_rest() -> None:
    chosen = small(backend="reference").explain(*inputs()).chosen
    assert chosen == {**dict.fromkeys(OPERATIONS, "reference"), "pixel_encoder_pair": None, "key_grid": None}
    explanation = small(backend="flex").explain(*inputs())
    # Not what has no flex: the next that can, which is triton where it interprets kernels.
    others = {name: explanation.chosen[name] for name in ("pixel_encoder", "feature_unification")}
    assert all(name in ("triton", "torch") for name in others.values()), others


def test_a_mapping_binds_each_operation() -> None:
    backend = {"pixel_encoder": "reference", "window_attention": ("reference", "torch")}
    chosen = small(backend=backend).explain(*inputs()).chosen
    assert chosen == {
        "pixel_encoder": "reference",
        "window_attention": "reference",
        "feature_unification": "torch",
        "pixel_encoder_pair": None,
        "key_grid": None,
        "query_projection": "torch",
    }


def test_a_sequence_takes_the_first_that_can() -> None:
    assert small(backend=["triton", "reference"]).explain(*inputs()).chosen["window_attention"] in (
        "triton",
        "reference",
    )


def test_explain_follows_the_size_the_dtype_and_the_gradients() -> None:
    image, features = inputs()
    model = small().bfloat16()
    text = str(model.explain(image, features, (9, 8), values=features[:, :2]))
    assert "9 x 8 from 6 x 5" in text and "C = 2" in text and "bfloat16" in text
    with pytest.raises(ValueError, match="features: "):
        model.explain(image, features[0])


def test_explain_says_how_to_have_the_kernels_that_a_gradient_excludes() -> None:
    image, features = inputs()
    model = small()
    reason = "a gradient is wanted, .*: call it under torch.no_grad\\(\\) or torch.inference_mode\\(\\)"
    # FlexAttention's, and that of a pair of encoders.
    assert len(re.findall(reason, str(model.explain(image, features)))) == 2
    with torch.no_grad():
        assert "a gradient" not in str(model.explain(image, features))


def test_vis_attn_shows_the_attention_and_returns_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup import visualization

    shown: list[Any] = []
    monkeypatch.setattr(visualization, "show_attention", lambda grid, painted: shown.append((grid, painted)))
    image, features = inputs(batch=2)
    model = small()
    with torch.no_grad():
        assert torch.equal(model(image, features, vis_attn=True), model(image, features))
        expected = model(image[:1], features[:1], values=visualization.key_colors(6, 5)[None])[0]
    ((grid, painted),) = shown
    assert grid == (6, 5) and painted.shape == (3, 24, 20)
    torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)


def test_a_profile_shows_the_stages() -> None:
    model = AnyUp(qk_dim=16, num_heads=2, lfu_dim=8)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        model(wave((1, 3, 12, 10), 1), wave((1, 5, 4, 3), 2))
    stages = ("image encoder", "key encoder", "query encoder", "query projection", "keys", "window attention")
    assert {f"anyup: {stage}" for stage in stages} <= {event.key for event in profiler.key_averages()}
