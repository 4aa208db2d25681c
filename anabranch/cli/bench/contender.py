"""A process that serves the same batches as the others: ours, or a peer's from another environment.

    PYTHON PROGRAM '{"model": FOLDER, "dtype": ..., "threads": ..., ...}'

It prints `{"ready": {...}}` with what made it what it is, then answers each line `{"prompts": [[...], ...],
"steps": n}` with `{"prefill_s": ..., "step_s": [...]}`: seconds until every sequence has its first token, and
those of each later step in which every sequence got one. Other lines it prints are passed over. It ends with
its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest, Unavailable

_READY_S = 600.0
_WORK_S = 900.0
_VOCABULARY = (100, 40_000)
"""Token ids every model of the comparison has, special ones left out."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch of equally long prompts."""

    batch: int
    prompt: int
    steps: int = 24

    def work(self, seed: int) -> dict[str, Any]:
        """The line a contender gets."""
        generator = np.random.default_rng(seed)
        prompts = generator.integers(*_VOCABULARY, size=(self.batch, self.prompt))
        return {"prompts": prompts.tolist(), "steps": self.steps}


@dataclass(frozen=True, slots=True)
class Served:
    """Tokens per second of one round."""

    decode: float
    prefill: float


class Contender:
    """One such process, stopped by a signal while it is not its turn: threads that spin disturb nobody."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it is ready. Raises Unavailable with the end of what it said."""
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | dict(environment or {}),
            # Signals reach what it starts, too. Of our session: when we die, the system wakes and ends
            # a stopped group that nobody is left to wake.
            process_group=0,
        )
        self._buffer = b""
        self.settings = {**settings, **self._answer("ready", _READY_S)["ready"]}
        self._signal(signal.SIGSTOP)

    def serve(self, cell: Cell, seed: int) -> Served:
        """One round of a cell. Raises Unavailable, and InvalidRequest for a cell that shows no decoding."""
        answer = self.work(cell, seed)
        if not answer["step_s"]:
            raise InvalidRequest(
                f"{self.name}, {cell.batch}x{cell.prompt}: the first sequences had their {cell.steps} tokens "
                "before the last had one; choose fewer or shorter prompts, or more --step-tokens"
            )
        step_s = statistics.median(answer["step_s"])
        return Served(cell.batch / step_s, cell.batch * cell.prompt / answer["prefill_s"])

    def work(self, cell: Cell, seed: int) -> dict[str, Any]:
        """What it answers to a cell. Raises Unavailable."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(cell.work(seed)).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer("step_s", _WORK_S)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it. Idempotent."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _signal(self, number: signal.Signals) -> None:
        """Its own process group, which is there until it has been waited for."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, number)

    def _answer(self, key: str, timeout_s: float) -> dict[str, Any]:
        deadline_s = monotonic() + timeout_s
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                self._read_more(deadline_s)
                continue
            self._buffer = rest
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and key in found:
                    return found

    def _read_more(self, deadline_s: float) -> None:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        ready, _, _ = select.select([handle], [], [], max(0.0, deadline_s - monotonic()))
        data = os.read(handle, 65536) if ready else b""
        if not data:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
            said = self._errors.read().decode(errors="replace")
            self.close()
            raise Unavailable(f"{self.name} {'ended' if ready else 'did not answer'}: ... {said}")
        self._buffer += data


def own_command() -> list[str]:
    """The command of our own contender."""
    return [sys.executable, "-m", "anabranch.cli.bench.own"]
