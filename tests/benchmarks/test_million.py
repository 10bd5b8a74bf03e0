"""The page of scaling says what the counts say."""

from __future__ import annotations

import pytest

from benchmarks import million


@pytest.mark.skipif(not million.PAGE.exists(), reason="the documentation is not here")
def test_the_page_s_table_is_made_of_the_counts() -> None:
    text = million.PAGE.read_text()
    assert million.page(text) == text, "run python -m benchmarks.million"


def test_bytes_and_minutes_follow_from_each_other() -> None:
    whole, half = million.STORED[:2]
    assert whole.bytes == 2 * half.bytes == 308_281_344
    assert million.seconds(whole)["disks"] == pytest.approx(308_281_344 * 1e6 / (8 * 6e9))
    assert million.seconds(whole)["upsample"] == million.seconds(half)["upsample"] > 0
