"""The image's half of the work, done once for several feature maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.recipe import fill, wave
from torch import Tensor, nn

from anyup import AnyUp, layers, with_head
from anyup.image_context import ImageContext

IMAGE = wave((2, 3, 24, 20), 3, 0.8)
MAPS = {(6, 5): wave((2, 12, 6, 5), 7), (4, 9): wave((2, 7, 4, 9), 8)}


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of channels of each map of the image's size that goes through the pixel encoder."""
    runs = []
    encode = layers.encode_pixels

    def counted(pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if pixels.shape[1:3] == IMAGE.shape[2:]:  # not one of a features' grid
            runs.append(pixels.shape[3])
        return encode(pixels, *args, **kwargs)

    monkeypatch.setattr(layers, "encode_pixels", counted)
    return runs


@pytest.mark.parametrize("size", [None, (24, 20), (31, 40), (9, 13)])
@pytest.mark.parametrize(
    "arguments", [{}, {"window": "cell"}, {"kernel_size": 3}, {"kernel_size": 2}, {"backend": "reference"}], ids=str
)
def test_a_call_with_a_context_equals_the_call_with_the_image(
    arguments: dict[str, Any], size: tuple[int, int] | None
) -> None:
    model = upsampler(**arguments)
    with torch.no_grad():
        context = model.encode_image(IMAGE, size, grids=[(6, 5)])
        for grid, features in MAPS.items():
            assert torch.equal(model(context, features), model(IMAGE, features, size)), grid
        carried = model(context, MAPS[6, 5], values=MAPS[6, 5][:, :2])
        assert torch.equal(carried, model(IMAGE, MAPS[6, 5], size, values=MAPS[6, 5][:, :2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_context_has_the_model_s_dtype(dtype: torch.dtype) -> None:
    model, features = upsampler().to(dtype), MAPS[6, 5].to(dtype)
    with torch.no_grad():
        context = model.encode_image(IMAGE.to(dtype), grids=[(6, 5)])
        assert context.queries.dtype == dtype
        assert torch.equal(model(context, features), model(IMAGE.to(dtype), features))


def test_a_named_grid_leaves_nothing_of_the_image_to_compute(encoded: list[int]) -> None:
    model = upsampler()
    with torch.no_grad():
        context = model.encode_image(IMAGE, grids=[(6, 5), [4, 9], (6, 5)])
        assert encoded == [3, 32, 32, 32]
        for features in MAPS.values():
            model(context, features)
    assert encoded == [3, 32, 32, 32]
    assert context.grids == ((6, 5), (4, 9))


def test_for_another_grid_the_image_is_encoded_again_without_its_queries(encoded: list[int]) -> None:
    model = upsampler()
    with torch.no_grad():
        context = model.encode_image(IMAGE)
        encoded.clear()
        model(context, MAPS[6, 5])
    assert encoded == [3, 32]
    assert context.grids == ()


def test_the_image_may_be_written_over() -> None:
    model, frame = upsampler(), IMAGE.clone()
    with torch.no_grad():
        context, expected = model.encode_image(frame), model(frame, MAPS[6, 5])
        frame.zero_()
        assert torch.equal(model(context, MAPS[6, 5]), expected)


def test_nbytes_counts_image_queries_and_keys() -> None:
    with torch.no_grad():
        context = upsampler().encode_image(IMAGE, (48, 40), grids=list(MAPS))
    assert context.nbytes == 4 * 2 * (3 * 24 * 20 + 32 * 48 * 40 + 32 * (6 * 5 + 4 * 9))
    assert f"{context.nbytes / 1e6:.1f} MB" in repr(context)


def test_a_head_takes_a_context() -> None:
    model, head = upsampler(), nn.Conv2d(12, 4, 1)
    with torch.no_grad():
        context = model.encode_image(IMAGE, grids=[(6, 5)])
        assert torch.equal(with_head(model, head)(context, MAPS[6, 5]), with_head(model, head)(IMAGE, MAPS[6, 5]))


def test_gradients_through_a_context_are_those_of_the_calls() -> None:
    model = upsampler().double()
    gradients = []
    for shared in (True, False):
        image = IMAGE.double().requires_grad_()
        source: Tensor | ImageContext = model.encode_image(image, grids=[(6, 5)]) if shared else image
        loss = sum((model(source, f.double()) * wave((2, f.shape[1], 24, 20), 9)).sum() for f in MAPS.values())
        weights = [model.rope.freqs, *model.key_encoder.parameters(), *model.query_encoder.parameters()]
        gradients.append(torch.autograd.grad(loss, [image, *weights]))  # type: ignore[arg-type]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": IMAGE[0]}, ValueError, r"image: expected \(B, 3, height, width\)"),
        ({"image": "photo.jpg"}, TypeError, "image: expected a tensor, got str"),
        ({"output_size": (0, 4)}, ValueError, "output_size: .*0"),
        ({"grids": (6, 5)}, TypeError, r"grids: expected a sequence of \(height, width\), got \(6, 5\)"),
        ({"grids": [(6, 0)]}, ValueError, "grids: .*0"),
        ({"grids": 6}, TypeError, r"grids: expected a sequence of \(height, width\), got 6"),
    ],
)
def test_a_mistake_in_making_a_context_is_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        upsampler().encode_image(**{"image": IMAGE, **arguments})


def test_a_context_serves_no_other_call_than_it_was_made_for() -> None:
    model, features = upsampler(), MAPS[6, 5]
    with torch.no_grad():
        context = model.encode_image(IMAGE, (9, 13), grids=[(6, 5)])
        assert model(context, features, (9, 13)).shape == (2, 12, 9, 13)
        with pytest.raises(ValueError, match=r"output_size: the context was made for \(9, 13\), got \(24, 20\)"):
            model(context, features, (24, 20))
        with pytest.raises(ValueError, match="features: expected the image's batch of 2, got 1"):
            model(context, features[:1])
        with pytest.raises(ValueError, match="image: the context was made by another upsampler"):
            upsampler()(context, features)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(TypeError, match=r"computed in torch.float32, this call computes in torch.bfloat16"),
        ):
            model(context, features)
        model.rope.freqs.mul_(1.01)
        with pytest.raises(ValueError, match="image: the upsampler's weights have changed"):
            model(context, features)


def test_explain_answers_for_a_context() -> None:
    model = upsampler()
    with torch.no_grad():
        context = model.encode_image(IMAGE, (9, 13))
        assert "9 x 13 from 6 x 5" in str(model.explain(context, MAPS[6, 5]))
