"""Choosing a backend, and saying why not the others."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from anyup import options
from anyup.model import OPERATIONS
from anyup.ops import feature_unification, pixel_encoder, query_projection, window_attention
from anyup.ops.dispatch import BACKEND_NAMES, BackendFailure, Operation, from_schema, parse_backend, to_schema
from anyup.ops.refusals import remembered


class Problem(NamedTuple):
    size: int
    device: torch.device = torch.device("cpu")

    def __str__(self) -> str:
        return f"size {self.size}"


def backend(name: str, most: int, log: list[str] | None = None, slow: int = 1000) -> Any:
    """A backend that takes sizes up to `most`, from `slow` on by name only, and returns its name and its arguments."""

    def unsupported(problem: Problem) -> list[str]:
        return [] if problem.size <= most else [f"size is {problem.size}, at most {most}", "and more"]

    def discouraged(problem: Problem) -> list[str]:
        return [] if problem.size < slow else [f"slow from {slow}"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return name, args, kwargs, torch.is_autocast_enabled("cpu")

    def load() -> Any:
        if log is not None:
            log.append(name)
        return SimpleNamespace(
            unsupported=unsupported, forward=forward, **({"discouraged": discouraged} if slow < 1000 else {})
        )

    return load


@pytest.fixture
def operation() -> Operation:
    return Operation(
        "stretch",
        {"triton": backend("triton", 4), "torch": backend("torch", 100), "reference": backend("reference", 10)},
    )


def test_none_takes_the_first_that_can(operation: Operation) -> None:
    assert operation.run("forward", Problem(3), None)[0] == "triton"
    assert operation.run("forward", Problem(9), None)[0] == "torch"


def test_a_name_is_that_one_or_an_error(operation: Operation) -> None:
    assert operation.run("forward", Problem(3), "reference")[0] == "reference"
    with pytest.raises(
        NotImplementedError, match=r"size 50\): no backend can\n  not reference: size is 50, at most 10"
    ):
        operation.run("forward", Problem(50), "reference")


def test_a_sequence_takes_the_first_of_these_that_can(operation: Operation) -> None:
    assert operation.run("forward", Problem(3), ["reference", "triton"])[0] == "reference"
    assert operation.run("forward", Problem(50), ("reference", "torch"))[0] == "torch"


def test_when_nobody_can_every_reason_of_every_backend_is_listed(operation: Operation) -> None:
    with pytest.raises(NotImplementedError) as error:
        operation.run("forward", Problem(1000), None)
    text = str(error.value)
    for name, most in (("triton", 4), ("torch", 100), ("reference", 10)):
        assert f"not {name}: size is 1000, at most {most}" in text and f"not {name}: and more" in text


def test_a_backend_that_the_operation_lacks_is_a_reason(operation: Operation) -> None:
    explanation = operation.explain(Problem(3), ["flex", "torch"])
    assert explanation.chosen == "torch"
    assert "no 'flex' backend" in explanation.candidates[0].reasons[0]
    with pytest.raises(NotImplementedError, match="no 'flex' backend"):
        operation.choose(Problem(3), "flex")


def test_a_discouraged_backend_runs_by_name_alone() -> None:
    operation = Operation("stretch", {"flex": backend("flex", 10, slow=5), "torch": backend("torch", 7)})
    assert operation.run("forward", Problem(4), None)[0] == "flex"
    assert operation.run("forward", Problem(5), None)[0] == "torch"
    for request in ("flex", ["flex", "torch"]):
        assert (
            operation.run("forward", Problem(5), request)[0] == "flex" == operation.explain(Problem(5), request).chosen
        )
    explanation = operation.explain(Problem(5))
    assert explanation.chosen == "torch"
    assert explanation.candidates[0].reasons == () and explanation.candidates[0].discouraged == ("slow from 5",)
    assert "flex: can, only by name: slow from 5" in str(explanation)
    assert "only by name" not in str(operation.explain(Problem(5), ["torch", "flex"]))


def test_when_only_a_discouraged_backend_can_the_error_says_so() -> None:
    operation = Operation("stretch", {"flex": backend("flex", 10, slow=5), "torch": backend("torch", 7)})
    assert operation.explain(Problem(9)).chosen is None
    with pytest.raises(NotImplementedError, match="flex: can, only by name: slow from 5\n  not torch: size is 9"):
        operation.choose(Problem(9))


def test_explanation_holds_the_reasons_as_data(operation: Operation) -> None:
    explanation = operation.explain(Problem(20))
    assert explanation.operation == "stretch" and explanation.chosen == "torch"
    assert {c.name: len(c.reasons) for c in explanation.candidates} == {"triton": 2, "torch": 0, "reference": 2}
    assert operation.explain(Problem(5)).chosen == "torch"
    assert "reference: can, comes after torch" in str(operation.explain(Problem(5)))
    assert operation.explain(Problem(1000)).chosen is None


def test_arguments_reach_the_backend_with_autocast_off(operation: Operation) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        name, args, kwargs, autocast = operation.run("forward", Problem(1), "torch", 1, two=2)
        assert torch.is_autocast_enabled("cpu")
    assert (name, args, kwargs, autocast) == ("torch", (1,), {"two": 2}, False)


def test_what_is_not_asked_for_is_not_imported() -> None:
    log: list[str] = []
    operation = Operation("stretch", {"triton": backend("triton", 4, log), "torch": backend("torch", 100, log)})
    operation.run("forward", Problem(3), "torch")
    assert set(log) == {"torch"}


def test_the_chosen_backend_is_logged_once(operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="anyup"):
        for _ in range(3):
            operation.run("forward", Problem(3), None)
    assert [r.levelno for r in caplog.records] == [logging.DEBUG]
    assert "stretch" in caplog.text and "'triton'" in caplog.text


@pytest.mark.parametrize("request_", [None, "torch", ["flex", "torch"], ("reference",)])
def test_a_request_survives_the_schema_of_an_operator(request_: Any) -> None:
    assert (from_schema(to_schema(request_)) or ()) == parse_backend(request_)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ("cuda", ValueError, "backend: expected one of triton, flex, torch, reference, got 'cuda'"),
        ("", ValueError, "backend: "),
        ("torch,reference", ValueError, "backend: .*'torch,reference'"),
        (["torch", "cuda"], ValueError, "backend: .*'cuda'"),
        ([], ValueError, "backend: .*empty"),
        ([1], TypeError, "backend: .*int"),
        (5, TypeError, "backend: .*int"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(request_: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_backend(request_)


@pytest.mark.parametrize("module", [window_attention, pixel_encoder, feature_unification, query_projection])
def test_every_operation_has_the_two_backends_that_take_anything(module: Any) -> None:
    operation = (
        module.operator if hasattr(module, "operator") else sys.modules["anyup.ops.window_attention.operator"]
    ).OPERATION
    assert operation.name in OPERATIONS
    assert set(operation._backends) <= set(BACKEND_NAMES)
    assert [name for name in operation._backends if name in ("torch", "reference")] == ["torch", "reference"]
    for name in ("torch", "reference"):
        assert operation._backends[name]().unsupported(Problem(1)) == []


def test_the_command_line_offers_every_backend() -> None:
    assert options.BACKENDS == BACKEND_NAMES


def test_backends_import_neither_each_other_nor_the_reference() -> None:
    for folder in ("window_attention", "pixel_encoder", "feature_unification", "query_projection", "feature_distance"):
        for file in (Path(__file__).parents[2] / "anyup" / "ops" / folder).glob("*.py"):
            if file.stem in ("eager", "flex", "fused", "reference"):
                lines = [line for line in file.read_text().splitlines() if "import" in line]
                for other in ("eager", "flex", "fused", "reference"):
                    assert not any(re.search(rf"(\.|import ){other}\b", line) for line in lines), (file, other)


# A backend that fails when it runs.


def broken(calls: list[str]) -> Any:
    """A backend that says it can and then cannot."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("triton")
        raise BackendFailure("out of resource: shared memory, Required: 99, Hardware limit: 64")

    module = SimpleNamespace(unsupported=lambda problem: [], forward=forward)
    return lambda: module


def test_where_a_backend_fails_the_next_one_runs_with_one_warning_for_the_process() -> None:
    calls: list[str] = []
    operation = Operation("stretch", {"triton": broken(calls), "torch": backend("torch", 100)})
    with pytest.warns(UserWarning, match=r"'triton' failed on cpu .*out of resource: shared memory") as warned:
        ran = [operation.run("forward", Problem(3), None)[0] for _ in range(2)]
    assert ran == ["torch", "torch"]
    assert len(warned) == 1 and calls == ["triton"]
    assert [text for text in remembered() if "'triton' failed on cpu" in text and text.startswith("stretch: ")]
    assert "failed before on cpu" in operation.explain(Problem(3)).candidates[0].reasons[0]


def test_a_backend_asked_for_by_name_fails_aloud() -> None:
    operation = Operation("stretch", {"triton": broken([]), "torch": backend("torch", 100)})
    with pytest.raises(BackendFailure, match="shared memory"):
        operation.run("forward", Problem(3), "triton")


def test_a_sequence_goes_on_where_its_first_backend_fails() -> None:
    operation = Operation("stretch", {"triton": broken([]), "torch": backend("torch", 100)})
    with pytest.warns(UserWarning, match="failed on cpu"):
        assert operation.run("forward", Problem(3), ("triton", "torch"))[0] == "torch"


def test_cuda_tensors_on_the_slow_path_are_warned_about_once() -> None:
    operation = Operation("stretch", {"triton": backend("triton", 4), "torch": backend("torch", 100)})
    on_card = Problem(50, torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"stretch runs on its slow backend 'torch' \(triton: size is 50") as warned:
        operation.choose(on_card)
    operation.choose(on_card)
    assert len(warned) == 1 and "stretch runs on its slow backend 'torch' (triton: size is 50" in str(remembered())


@pytest.mark.parametrize(("size", "device", "request_"), [(3, "cuda", None), (50, "cpu", None), (50, "cuda", "torch")])
def test_nothing_is_warned_about_where_the_slow_path_is_none(size: int, device: str, request_: Any) -> None:
    operation = Operation("stretch", {"triton": backend("triton", 4), "torch": backend("torch", 100)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operation.choose(Problem(size, torch.device(device)), request_)
