"""A plugin of pytest's that gathers what the tests in `device/` found: launches, outcomes and what they measured.

Reports arrive at the process that started the run, with pytest-xdist from all of its workers, so that the one file is
written there alone, and after each test: a run may be ended before its last one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.card import description, no_card, no_device, pretended

_LONGEST = 2000
"""Characters of a test's message that are kept."""


class DeviceResults:
    """What has been found by now.

    Args:
        folder: where to store what a card gave, or one that ttsem pretends; None: of a real card, in `device/results`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._launches: Counter[str] = Counter()
        self._tests: dict[str, dict[str, Any]] = {}
        self._path: Path | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a report of a test's setup, call or teardown."""
        if "device" not in Path(report.fspath).parts:
            return
        given = dict(report.user_properties)
        if report.when == "call" or report.outcome != "passed":
            test = self._tests.setdefault(report.nodeid, {})
            # What fails before or after the call is an error of the test, whatever the call gave.
            test["outcome"] = report.outcome if report.when == "call" or report.skipped else "error"
            test["seconds"] = round(getattr(report, "duration", 0.0), 2)
            if report.longrepr:
                test.setdefault("message", _message(report)[:_LONGEST])
        if report.when == "teardown":
            self._launches.update(given.get("launches", {}))
            if report.nodeid in self._tests:
                self._tests[report.nodeid].update(given.get("measured", {}))
        if report.when == "teardown" or report.outcome != "passed":
            self._store()

    @functools.cached_property
    def _is_stored(self) -> bool:
        if importlib.util.find_spec("triton") is None:
            return False
        return no_device() is None if self._folder else no_card() is None and not pretended()

    def _store(self) -> None:
        if not self._is_stored:
            return
        card = description()
        folder = self._folder or Path(__file__).parents[1] / "device" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{re.sub('[^A-Za-z0-9._-]+', '-', card['device'])}.json"
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({**card, "launches": self._launches, "tests": self._tests}, indent=1) + "\n")
        partial.replace(self._path)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Skipped tests are no failure of a run of all tests, but they are of one that asks for these alone."""
        if _asked_for_a_card(session.config) is not None:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        """Say what was launched: a run that launched nothing has shown nothing."""
        for name, number in sorted(self._launches.items()):
            terminalreporter.write_line(f"launched: {name}: {number}")
        reason = _asked_for_a_card(config)
        if reason is not None:
            terminalreporter.write_line(f"failed: -m gpu asks for a real card: {reason}", red=True)
        if self._path is not None:
            terminalreporter.write_line(f"results: {self._path}")


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of what was skipped: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()


def _asked_for_a_card(config: pytest.Config) -> str | None:
    """Why there is none for `pytest -m gpu`; None: there is one, or nobody asked."""
    if config.option.markexpr.strip() != "gpu":
        return None
    return no_card() if importlib.util.find_spec("triton") else "triton is not installed"
