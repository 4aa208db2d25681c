"""A sweep's folder: `points.jsonl`, a flat object a point, under the keys of a run's summary and some more,
and `report.html`. Runs that were measured have folders of their own in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.errors import InvalidRequest
from loadgen.sweep.load import Point

POINTS = "points.jsonl"


class SweepFolder:
    """Writes a sweep as it goes on; a new folder, so that two are never mixed."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidRequest where there is something already, or nothing may be written."""
        self.path = path
        self._points = 0
        try:
            path.mkdir(parents=True)
            self._lines = (path / POINTS).open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be a new folder for results: {error}") from error

    def add(self, point: Point) -> None:
        """One point more."""
        self._lines.write(json.dumps(point.line, separators=(",", ":")) + "\n")

    def next_run(self) -> Path:
        """A folder for the next measured run, which is not there yet."""
        self._points += 1
        return self.path / f"run-{self._points:03d}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
