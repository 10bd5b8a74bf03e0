"""The kernels of the feature unification, the query projection and single pixels through their operators."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.accuracy import assert_close_enough, output_and_gradients
from support.card import in_dtypes
from support.feature_distance_cases import Shape as DistanceShape
from support.feature_distance_cases import measured
from support.feature_distance_cases import tensors_of as distance_tensors
from support.feature_unification_cases import Shape as UnificationShape
from support.feature_unification_cases import tensors_of as unification_tensors
from support.point_cases import attention_at
from support.point_cases import tensors_of as point_tensors
from support.query_projection_cases import Shape as ProjectionShape
from support.query_projection_cases import run as project
from support.query_projection_cases import tensors_of as projection_tensors
from support.recipe import KERNEL_SHAPES, AttentionShape

from anyup.ops.feature_unification import unify_features

pytestmark = pytest.mark.gpu

UNIFICATION = {
    "M divides C, batch 2": UnificationShape((2, 5), 32, batch=2),
    "two classes of outputs": UnificationShape((1, 2), 48, filters=32, kernel_size=3),
    "odd C": UnificationShape((2, 2), 37),
    "one channel": UnificationShape((1, 2), 1, kernel_size=3),
    "filters that are no power of two": UnificationShape((2, 3), 24, filters=24, kernel_size=3),
}
PROJECTION = {
    "partial rectangles, batch 2": ProjectionShape((9, 5), dim=16, batch=2),
    "one pixel": ProjectionShape((1, 1), dim=32),
    "a width that is no power of two": ProjectionShape((3, 18), dim=40),
}

DISTANCES = {
    "whole maps, batch 2": DistanceShape((3, 7), channels=130, batch=2, channels_last=False),
    "windows that overlap": DistanceShape((6, 7), windows=3, window=(4, 5)),
}

POINTS = {
    **{name: KERNEL_SHAPES[name] for name in ("odd", "one key", "no window", "cell, wide", "eight heads")},
    "two slices of channels": AttentionShape((20, 18), (8, 9), channels=600, heads=4, head_dim=32),
}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(UNIFICATION))
def test_the_unification_obeys_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    tensors = unification_tensors(UNIFICATION[name], dtype)
    actual = output_and_gradients(unify_features, {key: t.cuda() for key, t in tensors.items()}, "triton")
    assert launched.total() == 6  # arranged twice, forward, two gradients, folded
    expected = output_and_gradients(unify_features, tensors, "reference")
    exact = output_and_gradients(unify_features, {key: t.double() for key, t in tensors.items()}, "reference")
    for key in exact:
        assert_close_enough(actual[key].cpu(), expected[key], exact[key], key)


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(PROJECTION))
def test_the_projection_obeys_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    tensors = projection_tensors(PROJECTION[name], dtype)
    actual = output_and_gradients(project, {key: t.cuda() for key, t in tensors.items()}, "triton")
    assert launched.total() == 1 + 4
    expected = output_and_gradients(project, tensors, "reference")
    exact = output_and_gradients(project, {key: t.double() for key, t in tensors.items()}, "reference")
    for key in exact:
        assert_close_enough(actual[key].cpu(), expected[key], exact[key], key)


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(DISTANCES))
def test_the_distances_obey_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    prediction, target, places = distance_tensors(DISTANCES[name], dtype)
    # As in a training under autocast: what the windows are compared with is of float32.
    run = measured(target if places is None else target.float(), places)
    actual = output_and_gradients(run, {"prediction": prediction.cuda()}, "triton")
    assert launched.total() == 2
    expected = output_and_gradients(run, {"prediction": prediction}, "reference")
    exact = output_and_gradients(run, {"prediction": prediction.double()}, "reference")
    for key in exact:
        assert_close_enough(actual[key].cpu(), expected[key], exact[key], key)


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(POINTS))
def test_single_pixels_obey_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    attention, tensors = attention_at(POINTS[name]), point_tensors(POINTS[name], dtype)
    actual = output_and_gradients(attention, {key: t.cuda() for key, t in tensors.items()}, "triton")
    assert launched.total() == 1  # the gradients are PyTorch's
    expected = output_and_gradients(attention, tensors, "reference")
    exact = output_and_gradients(attention, {key: t.double() for key, t in tensors.items()}, "reference")
    for key in exact:
        assert_close_enough(actual[key].cpu(), expected[key], exact[key], key)
