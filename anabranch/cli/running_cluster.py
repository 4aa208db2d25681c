"""A cluster that lives as long as a demonstration does, telling what it is doing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from anabranch.cli.awaited import Awaited
from anabranch.cli.live import SlotLines
from anabranch.cli.pulse import pulse
from cluster.config import Config
from cluster.errors import AnabranchError, Internal, Unavailable
from controller.controller import Controller
from controller.events import ClusterReady, Event, SlotChanged
from controller.state import ClusterRecord

_START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 60.0


class _Watcher:
    """Tells what becomes of the cluster, and notes when it is ready; a `controller.Observer`."""

    def __init__(self, console: Console) -> None:
        self.records: list[ClusterRecord] = []
        self.came_up = threading.Event()
        self._console = console
        self._lines = SlotLines()
        self._awaited = Awaited()

    def __call__(self, event: Event) -> None:
        self._awaited(event)
        if isinstance(event, ClusterReady):
            self.records.append(event.record)
            self.came_up.set()
        elif isinstance(event, SlotChanged):
            self._tell(self._lines.line(event.slot))

    def pulse(self, passed_s: float) -> None:
        """Say what is waited for."""
        if words := self._awaited.words():
            self._tell(f"{passed_s:.0f} s: {words}")

    def _tell(self, words: str | None) -> None:
        if words:
            self._console.print(f"  {words}", style="dim", markup=False, highlight=False, soft_wrap=True)


def apart(config: Config, state: Path) -> Config:
    """The same on free ports, without HTTP, and in a folder of its own."""
    told = config.model_dump()
    told["gateway"] |= {"port": 0, "http_port": None}
    told["controller"] |= {"port": 0}
    told["state_dir"] = str(state)
    return Config.model_validate(told)


@contextmanager
def running_cluster(console: Console, config: Config, words: str) -> Iterator[ClusterRecord]:
    """A running cluster, begun with `words`; drained and stopped at the end, whatever happens inside.

    Raises Unavailable where it does not come up, and what it failed with.
    """
    controller = Controller(config)
    stop = threading.Event()
    watcher = _Watcher(console)
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            controller.run(stop, watcher)
        except AnabranchError as error:
            failed.append(error)
        finally:
            watcher.came_up.set()

    thread = threading.Thread(target=serve, name="controller")
    console.print(words)
    thread.start()
    try:
        with pulse(watcher.pulse):
            is_up = watcher.came_up.wait(_START_TIMEOUT_S)
        if not is_up:
            raise Unavailable(
                f"the cluster was not ready within {_START_TIMEOUT_S:.0f} s; see {config.state_dir}/logs"
            )
        if failed:
            raise failed[0]
        yield watcher.records[-1]
    finally:
        console.print("stopping ...")
        stop.set()
        with pulse(watcher.pulse):
            thread.join(_STOP_TIMEOUT_S)
    if thread.is_alive():
        raise Internal(f"the cluster did not stop within {_STOP_TIMEOUT_S:.0f} s")
