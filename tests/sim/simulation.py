"""One simulated cluster: processes that die and come back, faults, and what must hold meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from anabranch.v1 import inference_pb2
from cluster.errors import Fenced
from cluster.policies.directory import Life
from cluster.policies.instances import slot_number
from cluster.types import Epoch, SequenceKey, WorkerId
from tests.sim.dense import SimulatedDense
from tests.sim.faults import CONTROLLER, Faults
from tests.sim.members import SimulatedController, SimulatedMember, member_of
from tests.sim.pool import Network, SimulatedAttention
from tests.sim.requests import DEADLINE_S, PATIENCE_S, Gateway, Request
from tests.sim.shape import EXPIRY_S, GRACE_S, HEARTBEAT_S, LEASE_S, ORPHAN_S, Shape
from tests.sim.sums import VOCABULARY, SumDecoder, continuation
from tests.sim.watch import Violation
from tests.sim.world import World

_LATE_S = PATIENCE_S + 2.0
"""Beyond a deadline, of a request whose gateways are lost: a client asks the next one within a second."""


class Simulation:
    """A cluster of one seed. `run` raises Violation, or whatever the code under test raises."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.shape = Shape.drawn(self.world)
        self.config = self.shape.config()
        self.network = Network(self.world)
        self.controller = SimulatedController(self.world, self.config)
        self.attention: dict[str, SimulatedAttention] = {}
        self.dense: dict[str, SimulatedDense] = {}
        self.gateways: dict[str, Gateway] = {}
        self.requests: list[Request] = []
        self._decoder = SumDecoder(self.shape.window)
        self._geometry = self._decoder.spec.geometry("float32", self.shape.block_tokens)
        for index in range(self.shape.attention):
            self.start_attention(f"attention-{index}")
        for index in range(self.shape.dense):
            self.start_dense(f"dense-{index}")
        for index in range(self.shape.gateways):
            self.start_gateway(f"gateway-{index}")
        self.world.check = self._check

    def epoch(self) -> Epoch:
        """A new life's."""
        return Epoch(self.world.rng.getrandbits(64) | 1)

    def start_attention(self, name: str) -> None:
        """A new life of an attention worker."""
        worker = SimulatedAttention(
            self.world,
            self.config.attention,
            self._geometry,
            WorkerId(name),
            self.epoch(),
            self.shape.blocks,
        )
        self.attention[name] = worker
        self.network.attention[worker.address] = worker
        self.world.every(LEASE_S / 8, lambda: worker.when_awake(worker.look_after), lambda: worker.alive)
        member = member_of(name, inference_pb2.ROLE_ATTENTION, worker.epoch, worker.address)
        member.tier = slot_number(worker.worker) % self.shape.tiers
        speaker = SimulatedMember(
            self.controller, member, worker.load, lambda _members: None, journal=worker.journal
        )

        def speak() -> None:
            if worker.store.draining:
                member.state = inference_pb2.MEMBER_STATE_DRAINING
            if worker.answers:
                self._speak(name, speaker, lambda: self.kill_attention(worker, 0.2))

        self.world.every(HEARTBEAT_S, speak, lambda: worker.alive)

    def start_dense(self, name: str) -> None:
        """A new life of a dense worker."""
        worker = SimulatedDense(
            self.world,
            self.network,
            self.config,
            self._decoder,
            name,
            self.epoch(),
            self.controller.find,
            self.config.dense.serves_at(slot_number(WorkerId(name))),
        )
        self.dense[name] = worker
        member = member_of(name, inference_pb2.ROLE_DENSE, worker.epoch, name)
        speaker = SimulatedMember(self.controller, member, worker.load, worker.learn, worker.move)

        def speak() -> None:
            if worker.answers:
                self._speak(name, speaker, lambda: self.kill_dense(worker, 0.2))

        self.world.every(HEARTBEAT_S, speak, lambda: worker.alive)

    def start_gateway(self, name: str) -> None:
        """A new life of a gateway."""
        gateway = Gateway(self.world, self.network.watch, name)
        self.gateways[name] = gateway

        def look() -> None:
            for dense in self.dense.values():
                if dense.answers and self.network.passes(name, dense.name):
                    gateway.connect(dense)
            for link in list(gateway.links.values()):
                if not link.dense.answers or not self.network.passes(name, link.dense.name):
                    gateway.lose(link)

        self.world.every(HEARTBEAT_S, look, lambda: gateway.alive)

    def kill_attention(self, worker: SimulatedAttention, away_s: float) -> None:
        """SIGKILL; its slot is filled again after a while."""
        if worker.alive:
            worker.alive = False
            del self.network.attention[worker.address]
            if self.attention[worker.name] is worker:
                self.controller.gone(worker.name)
                self.world.after(away_s, lambda: self.start_attention(worker.name))

    def freeze_attention(self, worker: SimulatedAttention, seconds: float) -> None:
        """SIGSTOP, then SIGCONT. Where it is taken for dead its slot may be filled before it goes on."""

        def replace() -> None:
            if self.attention[worker.name] is worker and worker.alive and not worker.answers:
                self.world.note(f"{worker.name} is replaced")
                self.start_attention(worker.name)

        worker.freeze(seconds)
        if self.world.chance(0.5):
            self.world.after(EXPIRY_S + HEARTBEAT_S, replace)

    def kill_dense(self, worker: SimulatedDense, away_s: float) -> None:
        """SIGKILL; its slot is filled again after a while."""
        if worker.alive:
            worker.alive = False
            self.controller.gone(worker.name)
            self.world.after(away_s, lambda: self.start_dense(worker.name))

    def kill_gateway(self, gateway: Gateway, away_s: float) -> None:
        """SIGKILL; clients go on through another one, with what reached them."""
        gateway.alive = False
        for link in gateway.links.values():
            link.cut()
        self.world.after(away_s, lambda: self.start_gateway(gateway.name))
        for request in list(gateway.requests.values()):
            lost = min(len(request.tokens), self.world.rng.choice((0, 0, 1, 3)))
            del request.tokens[len(request.tokens) - lost :]
            if self.world.chance(0.2):
                request.shard_map = None
            self.world.after(self.world.rng.uniform(0.0, 0.5), partial(self._ask, request))

    def drain_attention(self, worker: SimulatedAttention) -> None:
        """SIGTERM: it leaves when it is empty, or its grace is over."""
        worker.store.draining = True
        end_s = self.world.now_s + GRACE_S

        def leave() -> None:
            if (worker.answers and worker.store.empty.is_set()) or self.world.now_s >= end_s:
                self.kill_attention(worker, 0.3)

        self.world.every(0.1, leave, lambda: worker.alive)

    def drain_dense(self, worker: SimulatedDense) -> None:
        """SIGTERM: what runs there goes elsewhere."""
        if worker.answers:
            worker.leave()
            self.world.after(0.3, lambda: self.kill_dense(worker, 0.3))

    def living_requests(self) -> list[Request]:
        """Those that are not over."""
        return [request for request in self.requests if not request.is_over]

    def run(self) -> None:
        """The load with its faults, then peace: every request ends, and every block is free again."""
        with _no_unforeseen_error():
            self._begin_load()
            faults = Faults(self)
            self.world.run(lambda: len(self.requests) == self.shape.requests and self._is_done(), 60.0)
            faults.end()
            self.network.heal()
            if not self.world.run(self._is_done, 240.0):
                raise Violation(f"still open: {[str(each.key) for each in self.living_requests()]}")
            if not self.world.run(self._is_empty, 20 * LEASE_S):
                raise Violation(f"still held: {self._held()}")
            self.world.run(lambda: False, ORPHAN_S)  # whom a dead gateway left, renews until nobody came
            self.network.watch.renewed.clear()
            self.world.run(lambda: False, LEASE_S)
            if self.network.watch.renewed or not self._is_empty():
                raise Violation(f"still renewed: {self.network.watch.renewed}, held: {self._held()}")

    def _begin_load(self) -> None:
        rng = self.world.rng
        common = [rng.randrange(VOCABULARY) for _ in range(40)]
        at_s = 0.5
        for index in range(self.shape.requests):
            at_s += rng.expovariate(rng.choice((2.0, 8.0)))
            self.world.after(at_s, partial(self._new_request, index, common))

    def _new_request(self, number: int, common: Sequence[int]) -> None:
        rng = self.world.rng
        room = min(200, self.shape.attention * self.shape.blocks * self.shape.block_tokens)
        count = rng.randint(1, room // 2)
        own = rng.randint(1, room - count) if rng.random() < 0.3 else rng.randint(1, min(12, room - count))
        shared = min(rng.choice((0, 0, 12, 40)), room - count - own)
        prompt = (*common[:shared], *(rng.randrange(VOCABULARY) for _ in range(own)))
        request = Request(
            SequenceKey(f"r{number}"),
            prompt,
            continuation(prompt, count, self.shape.window),
            rng.choice((0, 0, 1)),
            rng.choice(("one", "one", "two")),
            self.world.now_s + rng.choice((*[DEADLINE_S] * 5, 0.5, 2.0, 6.0)),
        )
        self.requests.append(request)
        self._ask(request)

    def _ask(self, request: Request) -> None:
        """A client turns to any gateway; it tries again while there is none, and time is left."""
        living = [gateway for gateway in self.gateways.values() if gateway.alive]
        if request.is_over:
            return
        if living:
            self.world.rng.choice(living).accept(request)
        elif self.world.now_s >= request.deadline_s:
            self.world.note(f"{request.key} is late, and no gateway there")
            request.is_over = True
        else:
            self.world.after(0.1, lambda: self._ask(request))

    def _is_done(self) -> bool:
        return len(self.requests) == self.shape.requests and not self.living_requests()

    def _held(self) -> dict[str, dict[SequenceKey, int]]:
        living = self.network.attention.items()
        return {name: worker.store.blocks_held() for name, worker in living if worker.store.holdings()}

    def _is_empty(self) -> bool:
        """No sequence lives or is known to hold anything, no lease lasts, and all blocks can be reserved."""
        living = self.network.attention.values()
        lives = [Life(worker.worker, worker.epoch) for worker in living]
        return (
            not self._held()
            and all(worker.store.available == worker.store.account().capacity for worker in living)
            and all(each.engine.is_idle() for each in self.dense.values() if each.alive)
            and not any(self.controller.directory.sequences_at(life) for life in lives)
        )

    def _check(self) -> None:
        """After every event: every arena's account adds up, no queue is too long, no request too late."""
        for arena in self.network.attention.values():
            account = arena.store.audit()
            if account.total != account.capacity:
                raise Violation(f"{arena.worker}: {account}")
        for dense in self.dense.values():
            engine, shape = dense.engine, self.shape
            waiting_most = shape.max_waiting + shape.max_batch  # those preempted wait as well
            if engine.sequences_running > shape.max_batch or engine.sequences_waiting > waiting_most:
                raise Violation(
                    f"{dense.name}: {engine.sequences_running} run, {engine.sequences_waiting} wait"
                )
        for request in self.requests:
            if not request.is_over and self.world.now_s > request.deadline_s + _LATE_S:
                raise Violation(f"{request.key} has not ended by its deadline")

    def _speak(self, name: str, member: SimulatedMember, replace: Callable[[], None]) -> None:
        if not self.network.passes(name, CONTROLLER):
            return
        try:
            member.speak(self.world.now_s, EXPIRY_S)
        except Fenced:
            self.world.note(f"{name} is fenced and begins anew")
            replace()


class _Errors(logging.Handler):
    """Collects what was logged as an error: nobody foresaw it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.records.append(record)


@contextmanager
def _no_unforeseen_error() -> Iterator[None]:
    """Raises Violation where the code under test logs an error."""
    errors, log = _Errors(), logging.getLogger("anabranch")
    log.addHandler(errors)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(errors)
        log.propagate = before
    if errors.records:
        raise Violation(f"logged as an error: {errors.records[0].getMessage()}")
