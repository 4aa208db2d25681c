"""Clusters of processes that only join, under a real controller and a real Ray."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.v1 import inference_pb2
from cluster import config as configuration
from cluster.config import Config
from controller import roles
from controller.controller import Controller
from controller.events import ClusterReady, Event, SlotChanged
from controller.keeper import PYTHON_PLACE
from controller.slots import Phase, Slot

DEADLINE_S = 60.0

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
"""Nobody loads a weight here: what a model is suffices."""


def joining(**moods: str) -> roles.Command:
    """The command of a process that only joins; `gateway="stubborn"` gives a role another mood."""

    def command(slot: Slot, controller: str) -> tuple[str, ...]:
        mood = ("/usr/bin/env", f"ROLE_PROGRAM={moods.get(slot.role, 'obedient')}")
        program = (PYTHON_PLACE, "-m", "tests.integration.role_program")
        return (*mood, *program, *roles.arguments(slot, controller))

    return command


def configured(folder: Path, **settings: Any) -> Config:
    """A configuration with a model and a state folder of its own, quick to react.

    Settings are dotted keys with two underscores: attention__replicas=1.
    """
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(_MODEL))
    quick = {
        "model.path": str(model),
        "gateway.port": 0,
        "gateway.http_port": 0,
        "state_dir": str(folder / "state"),
        "controller.port": 0,
        "controller.heartbeat_ms": 200,
        "controller.expiry_ms": 1500,
        "controller.restart_backoff_s": 0.1,
        "controller.drain_grace_s": 5.0,
    }
    return configuration.load(
        None, quick | {key.replace("__", "."): value for key, value in settings.items()}
    )


class RunningCluster:
    """A controller on a thread of its own, and what it said so far."""

    def __init__(self, config: Config, command: roles.Command) -> None:
        self.controller = Controller(config, command)
        self.stop = threading.Event()
        self.events: list[Event] = []
        self._news: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._others = descendants(os.getpid())
        self._pool = futures.ThreadPoolExecutor(1)
        self.status = self._pool.submit(self._run)

    def _run(self) -> int:
        try:
            return self.controller.run(self.stop, self._news.put)
        finally:
            self._news.put(None)

    def await_event(self, wanted: Callable[[Event], bool]) -> None:
        """Wait for an event not seen yet; raises what the controller raised if it ends before."""
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            event = self._news.get(timeout=max(0.0, deadline_s - time.monotonic()))
            if event is None:
                raise AssertionError(f"the cluster ended with {self.status.result()}")
            self.events.append(event)
            if wanted(event):
                return

    def await_ready(self) -> None:
        """Wait until every slot serves."""
        self.await_event(lambda event: isinstance(event, ClusterReady))

    def await_phase(self, worker_id: str, phase: Phase) -> None:
        """Wait until a slot enters a phase."""
        self.await_event(
            lambda event: (
                isinstance(event, SlotChanged)
                and (event.slot.worker_id, event.slot.phase) == (worker_id, phase)
            )
        )

    def member(self, worker_id: str) -> inference_pb2.Member:
        """A live member."""
        members = self.controller.fleet().membership.members
        return next(member for member in members if member.worker_id == worker_id)

    def processes(self) -> dict[int, str]:
        """What this process has begun since, which is the cluster's; see `descendants`."""
        return dict(descendants(os.getpid()).items() - self._others.items())

    def end(self) -> int:
        """Stop and return the exit status."""
        self.stop.set()
        return self.status.result(DEADLINE_S)


@contextmanager
def running(config: Config, command: roles.Command) -> Iterator[RunningCluster]:
    """A cluster that has ended when the context has."""
    cluster = RunningCluster(config, command)
    try:
        yield cluster
    finally:
        cluster.stop.set()
        futures.wait([cluster.status], DEADLINE_S)


def descendants(process_id: int) -> dict[int, str]:
    """Processes below this one, with what tells each from a later one of the same number."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (facts := _facts(int(folder.name))) is not None:
            parents[int(folder.name)] = (int(facts[1]), facts[19])
    found: dict[int, str] = {}
    level = {process_id}
    while level:
        level = {child for child, (parent, _) in parents.items() if parent in level}
        found |= {child: parents[child][1] for child in level}
    return found


def alive(processes: dict[int, str]) -> list[int]:
    """Those that still run."""
    return [
        number
        for number, started in processes.items()
        if (facts := _facts(number)) is not None and facts[19] == started and facts[0] != "Z"
    ]


def _facts(process_id: int) -> list[str] | None:
    """The fields of /proc/N/stat from the state on; None if there is no such process."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
