"""Signals that ask a command to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from anyup import stopping
from anyup.cli import command as cli
from anyup.training import config, loop

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Each kind is met by Python's `default_int_handler`, and as before after the test."""
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in KINDS}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize("command", list(cli._RUNNERS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_says_that_it_was_interrupted_and_by_what(
    kind: int, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def run(_: object) -> None:
        try:
            os.kill(os.getpid(), kind)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(cli, "_parse", lambda _: cli.argparse.Namespace(command=command, debug=False))
    monkeypatch.setitem(cli._RUNNERS, command, run)
    assert cli.main([]) == 128 + kind
    assert cleaned and capsys.readouterr().err == "\nanyup: interrupted\n"
    assert all(signal.getsignal(one) is signal.default_int_handler for one in KINDS)


def test_a_second_request_is_met_as_before() -> None:
    asked: list[int] = []
    with stopping.on_request(asked.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert asked == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As `nohup` and a shell's background jobs have it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping.on_request(stopping.stop):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(("stopped_by", "status"), [(None, 0), (int(signal.SIGTERM), 143)])
def test_a_training_that_was_stopped_is_not_taken_for_a_complete_one(
    stopped_by: int | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "read", lambda *_: config.Settings())
    monkeypatch.setattr(loop, "train", lambda *_, **__: stopped_by)
    assert cli.main(["train", "--config", "mini"]) == status
