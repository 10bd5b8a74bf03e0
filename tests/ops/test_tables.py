"""Tables that are made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anyup.ops import tables
from anyup.ops.tables import made_once

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _none_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_made", {})


def counting(made: list[int]) -> Callable[[], Tensor]:
    return lambda: made.append(len(made)) or torch.ones(len(made))


def test_a_table_is_made_once_for_what_it_depends_on() -> None:
    made: list[int] = []
    first, second, other = (made_once(kind, CPU, counting(made)) for kind in (("a", 1), ("a", 1), ("a", 2)))
    assert first is second and other is not first and len(made) == 2


def test_a_table_that_is_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        table = made_once("a", CPU, counting([]))
    assert not table.is_inference()


def test_no_more_than_so_many_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_MOST", 2)
    made: list[int] = []
    for kind in range(5):
        made_once(kind, CPU, counting(made))
        assert len(tables._made) <= 2
    assert len(made) == 5


def test_what_is_made_while_a_graph_is_captured_is_not_taken_for_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tables, "_read_by_graphs", {})
    made: list[int] = []
    kept = [made_once("a", torch.device("cuda"), counting(made)) for _ in range(2)]
    assert len(made) == 2
    assert {id(table) for table in kept} == tables._read_by_graphs.keys()
