"""A run's folder: `requests.jsonl`, a record a line as they came, `summary.jsonl`, a flat object a stage,
`members.jsonl`, the cluster's members once a second where it told, and `report.html`, all of it to look at.

A run of one stage has a summary of one line, which is plain JSON: `vllm bench serve`'s keys and ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import InvalidRequest
from loadgen.members import Sample
from loadgen.metrics import Summary
from loadgen.records import Record, read_lines

_REQUESTS, _SUMMARY, _MEMBERS = "requests.jsonl", "summary.jsonl", "members.jsonl"

PAGE = "report.html"


@dataclass(frozen=True, slots=True)
class Run:
    """What a folder holds."""

    name: str
    """The folder's."""
    records: tuple[Record, ...]
    summaries: tuple[Summary, ...]
    samples: tuple[Sample, ...]


class ResultsFolder:
    """Writes a run as it goes on; a new folder, so that two runs are never mixed."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidRequest where there is something already, or nothing may be written."""
        self.path = path
        try:
            path.mkdir(parents=True)
            # By lines: what ended is there, whatever becomes of this process.
            self._requests = (path / _REQUESTS).open("w", encoding="utf-8", buffering=1)
            self._members = (path / _MEMBERS).open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be a new folder for results: {error}") from error

    def add(self, record: Record) -> None:
        """One request more."""
        self._requests.write(record.to_line() + "\n")

    def add_sample(self, sample: Sample) -> None:
        """One member at one moment more."""
        self._members.write(sample.to_line() + "\n")

    def sum_up(self, summaries: Sequence[Summary]) -> None:
        """The stages' figures."""
        lines = (json.dumps(summary, separators=(",", ":")) + "\n" for summary in summaries)
        (self.path / _SUMMARY).write_text("".join(lines), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.close()
        self._members.close()


def read_run(path: Path) -> Run:
    """All of a run's folder. Raises InvalidRequest where there is none to read."""
    return Run(
        path.resolve().name,
        tuple(read_records(path)),
        tuple(read_summaries(path)),
        tuple(_read_samples(path / _MEMBERS)),
    )


def read_records(path: Path) -> list[Record]:
    """The requests of a run's folder. Raises InvalidRequest where there are none to read."""
    try:
        with (path / _REQUESTS).open(encoding="utf-8") as lines:
            return list(read_lines(lines))
    except OSError as error:
        raise InvalidRequest(f"{path} holds no run: {error}") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{path / _REQUESTS}: {error.message}") from error


def read_summaries(path: Path) -> list[dict[str, Any]]:
    """The stages' figures of a run's folder. Raises InvalidRequest where there are none to read."""
    try:
        return [json.loads(line) for line in (path / _SUMMARY).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path / _SUMMARY} is no summary of a run: {error}") from error


def _read_samples(path: Path) -> list[Sample]:
    try:
        return [Sample.from_line(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []  # a run of an endpoint without members may have none
