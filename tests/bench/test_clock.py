"""The clock of a card, on a card that is counted: what the host launches runs in turn, once the card has come to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

from anyup.bench import clock as clocks
from anyup.bench.clock import CudaClock
from anyup.bench.timing import Time

CPU = torch.device("cpu")
LAUNCH = 40e-6


class Card:
    """Seconds at which the host is, and at which the card will have done all that it was given."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.held: list[float] = []

    def launch(self, seconds: float, host: float = LAUNCH) -> None:
        self.host += host
        self.free = max(self.free, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def sleep(self, cycles: int) -> None:
        self.held.append(cycles / 2e9)  # of a card with a slower clock than is reckoned with
        self.launch(self.held[-1], 0.0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = max(made.free, made.host)

        def query(self) -> bool:
            return self.time <= made.host

        def elapsed_time(self, end: Event) -> float:
            return (end.time - self.time) * 1e3

    monkeypatch.setattr(clocks, "_FLUSHED_BYTES", 16)
    monkeypatch.setattr(clocks, "perf_counter", lambda: made.host)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return made


def calling(card: Card, launches: int, seconds: float, *, waits: bool = False) -> tuple[Callable[[], None], list[int]]:
    """A call of so many launches, each of so many seconds on the card, which waits for it first or not; its calls."""
    calls: list[int] = []

    def call() -> None:
        calls.append(launches)
        if waits:
            card.synchronize()
        for _ in range(launches):
            card.launch(seconds)

    return call, calls


def test_the_card_s_time_is_that_of_its_work_and_not_of_the_launches(card: Card) -> None:
    call, calls = calling(card, 100, 2e-6)  # the host takes 4 ms, the card 0.2 ms
    found = CudaClock(CPU).once(call)
    assert found.seconds == pytest.approx(2e-4) and found.host == pytest.approx(4e-3)
    assert found.ahead and len(calls) == 1


def test_a_call_that_takes_the_host_longer_is_called_again_with_the_card_held_longer(card: Card) -> None:
    call, calls = calling(card, 1000, 2e-6)  # 40 ms
    found = CudaClock(CPU).once(call)
    assert found.seconds == pytest.approx(2e-3) and found.host == pytest.approx(0.04) and found.ahead
    assert len(calls) == 2 and max(card.held) > 0.04


def test_a_call_that_waits_for_the_card_is_told_and_timed_with_a_card_that_is_not_held(card: Card) -> None:
    call, calls = calling(card, 100, 2e-6, waits=True)
    found = CudaClock(CPU).once(call)
    assert not found.ahead and len(calls) == 3
    assert found.seconds == pytest.approx(4e-3, rel=0.01) and found.host == pytest.approx(4e-3)


def test_a_call_that_would_be_held_for_seconds_is_not(card: Card) -> None:
    call, calls = calling(card, 20_000, 1e-4)  # the host takes 0.8 s, the card 2 s
    found = CudaClock(CPU).once(call)
    assert found == Time(pytest.approx(2.0, rel=0.01), pytest.approx(0.8), False) and len(calls) == 1
    assert sum(card.held) < 0.1


def test_a_kernel_s_time_is_the_median_of_warm_launches(card: Card) -> None:
    durations = iter([9.0, 9.0, *[5e-3, 1e-3, 3e-3, 2e-3, 4e-3] * 10])
    assert CudaClock(CPU, budget=0.1)(lambda: card.launch(next(durations))) == pytest.approx(3e-3)


def test_what_a_call_raises_is_raised(card: Card) -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CudaClock(CPU).once(fails)
