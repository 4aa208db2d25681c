"""Ray's machines, and processes on them.

Ray places and watches small actors, the keepers; each starts one role process and reports its end. On a
cluster that is joined they outlive the controller, and the next one adopts them. No token and no tensor
passes through Ray.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Protocol

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config
from cluster.errors import AlreadyExists, Fenced, Unavailable
from cluster.telemetry import logger
from controller.adoption import filled, keeper_name
from controller.keeper import Ended, Held, Keeper, Outliving, Started
from controller.ray_connection import RayConnection, first_line
from controller.slots import Node, Order, Slot

_log = logger("fleet")

_KEEPER_THREADS = 16  # start, wait, adopt, terminate (again without grace), and waits nobody hears any more
_PROBE_S = 5.0


class Listener(Protocol):
    """Told what becomes of processes, on the thread that runs what the fleet posts."""

    def started(self, worker_id: str, attempt: int, process_id: int, log_file: str) -> None:
        """The process runs."""
        ...

    def ended(self, worker_id: str, attempt: int, status: int, last_line: str) -> None:
        """The process has ended."""
        ...

    def lost(self, worker_id: str, attempt: int, reason: str) -> None:
        """The keeper or its node is gone, and with it the process."""
        ...


Post = Callable[[Callable[[], None]], None]
"""Runs a call soon, on the one thread that owns the fleet."""


class RayFleet:
    """Owns the connection to Ray and one keeper per running process; implements `slots.Hands`.

    On a cluster that was joined keepers go on for `registry.lease_s` should this process die, in a Ray
    namespace named for `registry.cluster`. Controller and keeper hear of each other every
    `controller.heartbeat_ms`; one that was silent for `controller.expiry_ms` may be replaced.

    Not thread-safe: what Ray reports on its own threads is posted to the owner's.
    """

    def __init__(
        self,
        config: Config,
        cpus: int,
        order: Callable[[Slot], Order],
        post: Post,
    ) -> None:
        """Connect. `cpus` is what a private cluster claims to have. Raises what RayConnection raises."""
        self._config = config
        self._sign_s = config.controller.heartbeat_ms / 1000
        self._silence_s = config.controller.expiry_ms / 1000
        self._order = order
        self._post = post
        self._controller = secrets.token_hex(8)  # this life, to keepers
        self.listener: Listener | None = None
        self._keepers: dict[str, Any] = {}
        self._connection = RayConnection(config, cpus)

    def close(self) -> None:
        """End all keepers, and the private cluster. Idempotent."""
        for keeper in self._keepers.values():
            _kill(keeper)
        self._keepers.clear()
        self._connection.close()

    @property
    def address(self) -> str:
        """This machine's address as the other nodes reach it."""
        return str(ray.util.get_node_ip_address())

    def nodes(self) -> tuple[Node, ...]:
        """The live nodes. Raises Unavailable when Ray does not answer."""
        try:
            available = available_resources_per_node()
            described = ray.nodes()
        except RayError as error:
            raise Unavailable(f"Ray does not answer: {error}") from error
        return tuple(_node(raw, available.get(raw["NodeID"], {})) for raw in described if raw["Alive"])

    def adopt(self, slots: Sequence[Slot]) -> tuple[Slot, ...]:
        """The slots, with the processes that an earlier controller of this cluster left on Ray. What does not
        belong into any is ended. Takes seconds where there are such processes.

        Raises AlreadyExists while that controller lives.
        """
        if not self._is_joined:
            return tuple(slots)
        keepers = _named_keepers()
        held = self._held(keepers)
        has_registry = self._config.registry.url is not None
        found = filled(slots, held, lambda slot: self._order(slot).launch, may_move=has_registry)
        for slot in found:
            if slot.has_process:
                _log.info("adopted", worker=slot.worker_id, process=slot.process_id, node=slot.node)
                self._take(slot, keepers.pop(keeper_name(slot)))
        self._end_unwanted(keepers)
        return found

    def launch(self, slot: Slot) -> None:
        """Start the slot's process on its node. Raises AlreadyExists when another controller did."""
        order = self._order(slot)
        options = {
            "num_cpus": order.cpus,
            "num_gpus": order.gpus,
            "memory": order.memory_bytes,
            "resources": dict(order.custom),
            "max_concurrency": _KEEPER_THREADS,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(slot.node, soft=False),
        }
        outliving = None
        if self._is_joined:
            options |= {"name": keeper_name(slot), "lifetime": "detached"}
            outliving = self._outliving()
        try:
            keeper = ray.remote(Keeper).options(**options).remote(self._controller, slot.node, outliving)
        except ActorAlreadyExistsError as error:
            raise self._superseded() from error
        self._take(slot, keeper)
        self._watch(keeper.start.remote(order.launch), functools.partial(self._started, slot))

    def terminate(self, slot: Slot, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace; a grace of zero is SIGKILL at once."""
        keeper = self._keepers.get(slot.worker_id)
        if keeper is not None:
            keeper.terminate.remote(self._controller, grace_s)

    def abandon(self, slot: Slot) -> None:
        """Give up the keeper: its process, if it still runs, ends with it."""
        keeper = self._keepers.pop(slot.worker_id, None)
        if keeper is not None:
            _kill(keeper)

    @property
    def _is_joined(self) -> bool:
        return self._config.ray.address is not None

    def _outliving(self) -> Outliving:
        absence_s = max(self._config.registry.lease_s, self._silence_s)
        return Outliving(absence_s, self._config.controller.drain_grace_s)

    def _held(self, keepers: dict[str, Any]) -> dict[str, Held | None]:
        """What each holds, now that it is this controller's. The first that can say decides whose they are:
        they change hands all or none.
        """
        held: dict[str, Held | None] = {}
        rest = dict(sorted(keepers.items()))
        while rest and not any(held.values()):
            name = next(iter(rest))
            held |= self._ask({name: rest.pop(name)}, self._silence_s)
        return held | self._ask(rest, 0.0)

    def _ask(self, keepers: dict[str, Any], silence_s: float) -> dict[str, Held | None]:
        """What each that is adopted holds; None also for those that do not answer in time."""
        calls = {name: keeper.adopt.remote(self._controller, silence_s) for name, keeper in keepers.items()}
        if not calls:
            return {}
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=silence_s + _PROBE_S)
        return {name: _adopted(call) if call in done else None for name, call in calls.items()}

    def _end_unwanted(self, keepers: dict[str, Any]) -> None:
        """At once, so that ports and memory are free for what is started instead."""
        if not keepers:
            return
        _log.warning("not_adopted", keepers=sorted(keepers))
        calls = [keeper.terminate.remote(self._controller, 0.0) for keeper in keepers.values()]
        ray.wait(calls, num_returns=len(calls), timeout=_PROBE_S)
        for keeper in keepers.values():
            _kill(keeper)

    def _take(self, slot: Slot, keeper: Any) -> None:
        self._keepers[slot.worker_id] = keeper
        self._await_end(slot, keeper)

    def _await_end(self, slot: Slot, keeper: Any) -> None:
        waiting = keeper.wait.remote(self._controller, self._sign_s)
        self._watch(waiting, functools.partial(self._waited, slot, keeper))

    def _watch(self, ref: Any, done: Callable[[futures.Future[Any]], None]) -> None:
        ref.future().add_done_callback(lambda future: self._post(functools.partial(done, future)))

    def _started(self, slot: Slot, future: futures.Future[Started]) -> None:
        if future.exception() is None and self.listener is not None:
            process = future.result()
            self.listener.started(slot.worker_id, slot.attempt, process.process_id, process.log_file)

    def _waited(self, slot: Slot, keeper: Any, future: futures.Future[Ended | None]) -> None:
        """A wait is over, and perhaps the process."""
        error = future.exception()
        is_ours = self._keepers.get(slot.worker_id) is keeper
        if isinstance(error, Fenced):
            raise self._superseded() from error
        if error is None and future.result() is None:
            if is_ours:
                self._await_end(slot, keeper)
            return
        if is_ours:
            self.abandon(slot)
        if self.listener is not None:
            self._tell_end(self.listener, slot, future)

    def _tell_end(self, listener: Listener, slot: Slot, future: futures.Future[Ended | None]) -> None:
        error = future.exception()
        if error is not None:
            _log.warning("keeper_lost", worker=slot.worker_id, node=slot.node, problem=str(error))
            listener.lost(slot.worker_id, slot.attempt, first_line(error))
        elif (ended := future.result()) is not None:
            listener.ended(slot.worker_id, slot.attempt, ended.status, ended.last_line)

    def _superseded(self) -> AlreadyExists:
        """Another controller has the keepers: they are not this one's to end."""
        self._keepers.clear()
        return AlreadyExists(
            f"another controller took over the processes of {self._config.registry.cluster}, which go on; "
            "two clusters on one Ray cluster need names of their own (registry.cluster)"
        )


def _named_keepers() -> dict[str, Any]:
    """What there is in the namespace that was joined. Raises Unavailable when Ray does not answer."""
    found = {}
    try:
        for name in ray.util.list_named_actors():
            with contextlib.suppress(ValueError):  # it has just died
                found[name] = ray.get_actor(name)
    except RayError as error:
        raise Unavailable(f"Ray does not answer: {first_line(error)}") from error
    return found


def _adopted(call: Any) -> Held | None:
    """What a keeper that answered holds; None if nothing, or it is gone."""
    try:
        held: Held | None = ray.get(call)
    except AlreadyExists as error:
        raise AlreadyExists(
            "a controller of this name lives on this Ray cluster: `anabranch down` stops it; another cluster "
            "beside it needs a name of its own (registry.cluster)"
        ) from error
    except RayError as error:
        _log.warning("keeper_lost", problem=first_line(error))
        return None
    return held


def _node(raw: dict[str, Any], available: dict[str, float]) -> Node:
    return Node(
        node_id=raw["NodeID"],
        address=raw["NodeManagerAddress"],
        hostname=raw["NodeManagerHostname"],
        total=dict(raw["Resources"]),
        available=dict(available),
        labels=dict(raw["Labels"]),
    )


def _kill(keeper: Any) -> None:
    with contextlib.suppress(RayError):  # it is dead already
        ray.kill(keeper, no_restart=True)
