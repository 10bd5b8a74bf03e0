"""What scripts for the published class touch beside the call: it means the same here, or is refused in words."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.recipe import fill, wave
from torch import Tensor

import anyup
from anyup import AnyUp
from anyup.bench.baseline import Published, rotate
from anyup.image_context import ImageContext
from anyup.layers import setup_cross_attention_block
from anyup.window import CellWindow, RatioWindow

SIZE, GRID = (24, 20), (12, 10)


def small(**arguments: Any) -> AnyUp:
    return fill(AnyUp(**{"qk_dim": 32, "num_heads": 2, "kernel_size_lfu": 3, **arguments}), 0).eval()


@pytest.fixture
def image() -> Tensor:
    return wave((1, 3, *SIZE), 3, 0.8)


@pytest.fixture
def features() -> Tensor:
    return wave((1, 7, *GRID), 7)


def coordinates(size: tuple[int, int]) -> Tensor:
    rows, columns = (torch.linspace(0, 1, length) for length in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2).flatten(0, 1)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


# The window.


@torch.no_grad()
def test_a_window_ratio_set_where_the_published_code_keeps_it_takes_effect(image: Tensor, features: Tensor) -> None:
    model = small()
    narrow, before = small(window_ratio=0.05), model(image, features)
    context = model.encode_image(image, grids=[GRID])
    model.cross_decode.window_ratio = 0.05
    assert model.window_ratio == model.config["window_ratio"] == 0.05 and model.window == RatioWindow(0.05)
    expected = narrow(image, features)
    assert not torch.equal(expected, before)
    assert torch.equal(model(image, features), expected)
    assert torch.equal(model(context, features), expected)
    assert torch.equal(torch.cat([piece for *_, piece in model.stream(image, features)], dim=2), expected)
    assert torch.equal(copy.deepcopy(model)(image, features), expected)
    assert_same(Published(model)(image, features), expected)
    plans = [anyup.plan((512, 512), (64, 64), 384, upsampler=each, stream=True) for each in (model, narrow, small())]
    assert plans[0].peak_bytes == plans[1].peak_bytes != plans[2].peak_bytes


@torch.no_grad()
def test_a_window_ratio_that_was_set_is_saved(tmp_path: Path, image: Tensor, features: Tensor) -> None:
    model = small()
    model.cross_decode.window_ratio = 0.3
    anyup.save(model, tmp_path / "weights.pth")
    again = anyup.load(tmp_path / "weights.pth")
    assert again.window_ratio == 0.3 and torch.equal(again(image, features), model(image, features))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_follows_the_window(image: Tensor, features: Tensor) -> None:
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # what is asked of is the guards
    compiled(image, features)
    model.cross_decode.window_ratio = 0.3
    assert torch.equal(compiled(image, features), model(image, features))


@pytest.mark.parametrize("ratio", ["0.2", True, None])
def test_a_window_ratio_that_is_no_number_is_refused(ratio: Any) -> None:
    with pytest.raises(TypeError, match="window_ratio: expected a number"):
        small().cross_decode.window_ratio = ratio
    with pytest.raises(ValueError, match="window_ratio: expected a finite number"):
        small().cross_decode.window_ratio = float("nan")


def test_a_window_ratio_set_where_the_published_code_ignores_it_is_refused() -> None:
    model = small()
    with pytest.raises(AttributeError, match="cross_decode.window_ratio"):
        model.window_ratio = 0.2  # type: ignore[misc]
    assert model.window_ratio == 0.1 and (model.qk_dim, model.lfu_dim) == (32, 32)


@torch.no_grad()
def test_the_block_is_swapped_as_the_published_entry_points_swap_it(image: Tensor, features: Tensor) -> None:
    model, expected = small(), small(use_natten=True)
    model.cross_decode = setup_cross_attention_block(
        use_natten=True,
        qk_dim=model.cross_decode.cross_attn.attention.embed_dim,
        num_heads=2,
        window_ratio=model.cross_decode.window_ratio,
        use_params_from=model.cross_decode,
    )
    assert model.window == CellWindow(0.1) and model.config == expected.config
    assert torch.equal(model(image, features), expected(image, features))


def test_a_model_that_an_earlier_version_pickled_is_the_same(image: Tensor, features: Tensor) -> None:
    model = small(window="cell", window_ratio=0.3)
    old = copy.deepcopy(model)
    old.__dict__.update(config=dict(old.config), window=old.window)
    del old.__dict__["_widths"], old.cross_decode.__dict__["window"]
    again = pickle.loads(pickle.dumps(old))
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(image, features), model(image, features))


# The parts of the call.


@torch.no_grad()
def test_upsample_is_the_calls_second_half(image: Tensor, features: Tensor) -> None:
    model = small()
    encoded = model.image_encoder(image)
    assert encoded.shape == (1, 32, *SIZE)
    turned = model.rope(encoded.permute(0, 2, 3, 1).flatten(1, 2), coordinates(SIZE))
    turned = turned.unflatten(1, SIZE).permute(0, 3, 1, 2)
    assert_same(turned, rotate(encoded, model.rope.freqs))
    for size in (SIZE, (9, 13), 16):
        assert_same(model.upsample(turned, features, size), model(image, features, size))
    assert_same(model.upsample(turned, features, SIZE, False, np.int64(7)), model(image, features))


def test_upsample_names_its_own_arguments(image: Tensor, features: Tensor) -> None:
    with pytest.raises(ValueError, match="enc_img: expected 32 channels"):
        small().upsample(image, features, SIZE)
    with pytest.raises(ValueError, match="output_size: expected"):
        small().upsample(wave((1, 32, *SIZE), 3), features, (3, 4, 5))  # type: ignore[arg-type]


@torch.no_grad()
def test_the_modules_chain_as_the_published_ones(image: Tensor, features: Tensor) -> None:
    for lfu_dim in (32, 16):
        model = small(lfu_dim=lfu_dim)
        encoded = rotate(model.image_encoder(image), model.rope.freqs)
        query = F.adaptive_avg_pool2d(model.query_encoder(encoded), SIZE)
        key = F.adaptive_avg_pool2d(model.key_encoder(encoded), GRID)
        key = torch.cat((key, model.key_features_encoder(F.normalize(features, dim=1))), dim=1)
        out = model.cross_decode(query, model.aggregation(key), features)
        assert_same(out, model(image, features))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (16, (16, 16)),
        (np.int64(16), (16, 16)),
        (torch.tensor(16), (16, 16)),
        ((None, 48), (SIZE[0], 48)),
        ([9, None], (9, SIZE[1])),
        (np.array([9, 13]), (9, 13)),
        (torch.tensor([9, 13]), (9, 13)),
        ((torch.tensor(9), np.int32(13)), (9, 13)),
    ],
)
@torch.no_grad()
def test_an_output_size_is_what_adaptive_pooling_takes(
    given: Any, expected: tuple[int, int], image: Tensor, features: Tensor
) -> None:
    model = small()
    assert model(image, features, given).shape[2:] == expected
    assert model.encode_image(image, given).output_size == expected
    assert anyup.plan(SIZE, GRID, 7, output_size=given, upsampler=model).task.output == expected


@pytest.mark.parametrize("given", [True, 2.5, (3,), "ab", (0, 3), (2.5, 3), np.array([2.5, 3.0]), -3, {"h": 3}])
def test_another_output_size_is_refused(given: Any, image: Tensor, features: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="output_size: expected"):
        small()(image, features, given)


@torch.no_grad()
def test_a_chunk_size_may_be_of_numpy(image: Tensor, features: Tensor) -> None:
    model = small(backend="reference")
    assert_same(model(image, features, q_chunk_size=np.int64(7)), model(image, features))


@torch.no_grad()
def test_a_hook_on_an_encoder_sees_its_map(image: Tensor, features: Tensor) -> None:
    model, seen = small(), {}
    for name in ("image_encoder", "key_encoder", "query_encoder", "aggregation"):
        getattr(model, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.shape}))
    model(image, features)
    whole, pooled = (1, 32, *SIZE), (1, 32, *GRID)
    assert seen == {"image_encoder": whole, "query_encoder": whole, "key_encoder": pooled, "aggregation": pooled}


# What is refused.


def test_torch_func_is_refused_in_words(image: Tensor, features: Tensor) -> None:
    model = small()
    with pytest.raises(NotImplementedError, match="torch.autograd.grad"):
        torch.func.jacrev(lambda f: model(image, f).mean((2, 3)))(features)
    with pytest.raises(NotImplementedError, match="torch.autograd.grad"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (image, features)).sum())(
            dict(model.named_parameters())
        )
    jacobian = torch.autograd.functional.jacobian(lambda f: model(image, f).mean((2, 3)), features)
    assert jacobian.shape == (1, 7, 1, 7, *GRID)


def test_a_second_derivative_is_refused_by_our_name(image: Tensor, features: Tensor) -> None:
    features.requires_grad_()
    (first,) = torch.autograd.grad(small()(image, features).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="anyup: .* cannot be differentiated"):
        first.sum().backward()


def test_jit_trace_is_refused_in_words(image: Tensor, features: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="torch.export.export"):
        torch.jit.trace(small(), (image, features))


# Two packages of one name.


def test_a_namesake_in_front_is_not_taken_for_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anyup").mkdir()
    (tmp_path / "anyup" / "model.py").write_text("class AnyUp: pass\n")
    (tmp_path / "hubconf.py").write_text(
        "from anyup.model import AnyUp\n\n\ndef anyup(pretrained=True):\n    return AnyUp()\n"
    )
    with pytest.raises(ImportError, match="two packages are called 'anyup'"):
        torch.hub.load(str(tmp_path), "anyup", source="local")
    assert isinstance(small(), AnyUp)  # the folder has left the path
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=str(tmp_path)):
        small()


def test_another_copy_of_this_package_is_no_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anyup" / "ops").mkdir(parents=True)
    (tmp_path / "anyup" / "model.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(small(), AnyUp)


def test_a_script_beside_a_folder_of_our_name_runs(tmp_path: Path) -> None:
    (tmp_path / "anyup" / "notes").mkdir(parents=True)
    root = Path(anyup.__file__).resolve().parents[1]
    script = f"import sys; sys.path.insert(1, {str(root)!r}); import anyup; print(anyup.AnyUp().qk_dim)"
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert made.stdout.strip() == "128", made.stderr


def test_a_context_is_asked_for_its_own_size(image: Tensor, features: Tensor) -> None:
    model = small()
    with torch.no_grad():
        context = model.encode_image(image, 16, grids=[GRID])
        assert isinstance(context, ImageContext)
        assert torch.equal(model(context, features, 16), model(image, features, 16))
    with pytest.raises(ValueError, match="output_size: the context was made for"):
        model(context, features, (None, 16))
