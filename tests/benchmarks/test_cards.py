"""The page of cards says what the planner says."""

from __future__ import annotations

import pytest

from benchmarks import cards


@pytest.mark.skipif(not cards.PAGE.exists(), reason="the documentation is not here")
def test_the_page_s_table_is_the_planner_s() -> None:
    text = cards.PAGE.read_text()
    assert cards.page(text) == text, "run python -m benchmarks.cards"
