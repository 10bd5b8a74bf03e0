"""The record of a run: a JSON object for each step, and what TensorBoard shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyup.images import complete_or_absent
from anyup.installing import pip_install

NAME = "log.jsonl"


class Log:
    """A run's records in its output folder.

    What a resumed run does again, and a line that a killed one did not finish, are taken out first.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / NAME
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        with complete_or_absent(self._path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")
        self.missing = ""  # why there is no TensorBoard although it was asked for
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.missing = f"TensorBoard's records need the package tensorboard: {pip_install('tensorboard')}"
            else:
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """Add a step's record."""
        self._write(record)

    def means(self, records: Sequence[dict[str, Any]], samples_per_second: float) -> None:
        """Show the means of some steps' terms, of all encoders together and the loss of each."""
        if self._writer is None:
            return
        step = records[-1]["step"]
        names = [name for name, value in records[-1].items() if isinstance(value, float)]
        for name in names:
            self._show(name, [record[name] for record in records if record.get(name) is not None], step)
        for encoder in sorted({record["encoder"] for record in records}):
            self._show(f"loss/{encoder}", [r["loss"] for r in records if r["encoder"] == encoder], step)
        self._show("samples_per_second", [samples_per_second], step)

    def held_out(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Add the scores of each encoder on the photographs held out."""
        self._write({"step": step, "held_out": scores})
        if self._writer is not None:
            for encoder, score in scores.items():
                for name, value in score.items():
                    self._show(f"held_out/{encoder}/{name}", [value], step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _show(self, name: str, values: Sequence[float], step: int) -> None:
        self._writer.add_scalar(name, sum(values) / len(values), step)

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
