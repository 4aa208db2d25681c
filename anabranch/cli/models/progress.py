"""How far a long action is: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class FetchProgress(Protocol):
    """What fetching reports; one phase runs at a time."""

    def begin(self, phase: str, total_bytes: int | None = None) -> None:
        """A phase starts, and the one before it is over; without a total its end is not foreseeable."""
        ...

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """The running phase has handled `done_bytes`; `total_bytes` corrects what `begin` said."""
        ...


class SilentProgress:
    """Reports nothing; for tests and callers that show their own."""

    def begin(self, phase: str, total_bytes: int | None = None) -> None:
        """Nothing is shown."""

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """Nothing is shown."""


class ConsoleProgress:
    """Draws one bar per phase on a terminal and prints one line per phase elsewhere; use with `with`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._complete()
        self._bars.stop()

    def begin(self, phase: str, total_bytes: int | None = None) -> None:
        """Close the bar of the last phase and open one for `phase`."""
        self._complete()
        if not self._console.is_terminal:
            size = "" if total_bytes is None else f" ({total_bytes / 1e6:.0f} MB)"
            self._console.print(f"{phase}{size} ...", highlight=False)
        self._task = self._bars.add_task(phase, total=total_bytes)

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """Move the running bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=done_bytes, total=total_bytes)

    def _complete(self) -> None:
        """Fill the running bar: a phase that ended early, or never knew its total, is done now."""
        if self._task is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        total = task.total if task.total is not None else max(task.completed, 1)
        self._bars.update(self._task, completed=total, total=total)
