"""Decides now and then which cache moves: the planner over what members reported. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import sequence_message
from cluster.clock import Clock, monotonic
from cluster.config import Config
from cluster.perfmodel import Line
from cluster.policies.directory import Life
from cluster.policies.instances import home_of
from cluster.policies.planner import ArenaView, InstanceView, Move, PlannerPolicy, plan
from cluster.telemetry import logger
from cluster.types import Epoch, SequenceKey, WorkerId
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable

_log = logger("controller.balancer")

_REST_S = 30.0
"""A sequence that was to move is left where it is for so long: its move may be under way, or was refused."""

_SETTLE_S = 6.0
"""An arena that was to give something away is left alone for so long: orders leave with a heartbeat, and what
they did is reported with another. Planned from the report before, too much would leave.
"""


@dataclass(frozen=True, slots=True)
class BalancerSettings:
    """`homes`: dense workers among which attention workers are dealt out; 0 where all share them. `may_lend`:
    whether they give to each other. An interval of 0 plans nothing.
    """

    block_tokens: int = 1
    homes: int = 0
    interval_s: float = 0.0
    move_gain: float = 0.0
    may_lend: bool = True

    @classmethod
    def of(cls, config: Config) -> BalancerSettings:
        """As configured. Instances that keep to their own move between their own arenas only."""
        placement = config.placement
        is_shared = placement.instances == "shared"
        return cls(
            config.attention.block_tokens,
            0 if is_shared else config.dense.replicas,
            placement.plan_interval_s,
            placement.move_gain,
            may_lend=placement.instances != "separate",
        )


NO_MOVES = BalancerSettings()


class Balancer:
    """Owns the orders of the last round, until every dense worker has fetched them with a heartbeat.

    An order goes to all dense workers: only a sequence's own moves it, and which that is changes. What is not
    carried out, because the target refused or the sequence ended, is planned anew.
    """

    def __init__(
        self,
        settings: BalancerSettings,
        table: MembershipTable,
        directory: DirectoryKeeper,
        clock: Clock = monotonic,
    ) -> None:
        self._settings = settings
        self._policy = PlannerPolicy(
            settings.block_tokens, gain_least=settings.move_gain, may_lend=settings.may_lend
        )
        self._table = table
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._next_s = clock() + settings.interval_s
        self._orders: dict[WorkerId, list[control_pb2.MoveOrder]] = {}
        self._resting: dict[SequenceKey, float] = {}
        self._settling: dict[WorkerId, float] = {}

    def tick(self) -> None:
        """Plan a round, if one is due."""
        now_s = self._clock()
        interval_s = self._settings.interval_s
        if interval_s <= 0 or now_s < self._next_s:
            return
        self._next_s = now_s + interval_s
        self._resting = {key: end_s for key, end_s in self._resting.items() if end_s > now_s}
        self._settling = {worker: end_s for worker, end_s in self._settling.items() if end_s > now_s}
        members = self._table.membership().members
        moves = self._plan([member for member in members if member.state == inference_pb2.MEMBER_STATE_READY])
        for move in moves:
            self._resting[move.sequence] = now_s + _REST_S
            self._settling[move.source] = now_s + _SETTLE_S
            _log.info(
                "move_planned",
                request_id=move.sequence.request_id,
                peer=move.source,
                target=move.target,
                tokens=move.tokens,
            )
        orders = [_order(move) for move in moves]
        dense = [WorkerId(member.worker_id) for member in members if member.role == inference_pb2.ROLE_DENSE]
        with self._lock:
            self._orders = {worker: list(orders) for worker in dense} if orders else {}

    def orders(self, worker: str) -> Sequence[control_pb2.MoveOrder]:
        """What a worker has not been told yet."""
        with self._lock:
            return self._orders.pop(WorkerId(worker), [])

    def _plan(self, members: Sequence[inference_pb2.Member]) -> Sequence[Move]:
        arenas = [member for member in members if member.role == inference_pb2.ROLE_ATTENTION]
        instances = [
            _instance(member)
            for member in members
            if member.role == inference_pb2.ROLE_DENSE and member.load.HasField("step_times")
        ]
        lives = {WorkerId(member.worker_id): Epoch(member.epoch) for member in arenas}

        def held(worker: WorkerId) -> Mapping[SequenceKey, int]:
            if worker in self._settling:
                return {}
            blocks = self._directory.sequences_at(Life(worker, lives[worker]))
            return {
                key: count * self._settings.block_tokens
                for key, count in blocks.items()
                if key not in self._resting
            }

        return plan(instances, [self._arena(member) for member in arenas], held, self._policy)

    def _arena(self, member: inference_pb2.Member) -> ArenaView:
        worker, blocks, settings = WorkerId(member.worker_id), member.load.blocks, self._settings
        return ArenaView(
            worker,
            home_of(WorkerId(member.slot), settings.homes) if settings.homes else None,
            blocks.capacity * settings.block_tokens,
            (blocks.free + blocks.sealed_cached) * settings.block_tokens,
            self._directory.blocks_at(Life(worker, Epoch(member.epoch))) * settings.block_tokens,
            member.tier,
            member.slot,
        )


def _instance(member: inference_pb2.Member) -> InstanceView:
    load, times = member.load, member.load.step_times
    waiting = load.sequences_waiting
    return InstanceView(
        WorkerId(member.worker_id),
        load.sequences_running,
        waiting,
        load.waiting_tokens / waiting if waiting else 0.0,
        Line(times.dense_base_s, times.dense_row_s),
        Line(times.attention_base_s, times.attention_token_s),
    )


def _order(move: Move) -> control_pb2.MoveOrder:
    return control_pb2.MoveOrder(
        sequence=sequence_message(move.sequence),
        source=move.source,
        target=move.target,
        tokens=move.tokens,
    )
