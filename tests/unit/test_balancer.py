"""Rounds of the balancer over members that report the same again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import sequence_key
from cluster.clock import ManualClock
from cluster.policies.directory import Life
from cluster.types import SequenceKey
from controller.balancer import Balancer, BalancerSettings

DENSE = ("dense-0", "dense-1")
FULL, EMPTY = "attention-0", "attention-1"
SEQUENCES = [SequenceKey(f"request-{index:02d}") for index in range(24)]
INTERVAL_S = 2.0


class FakeCluster:
    """Two dense workers, a full arena and an empty one; membership and directory in one."""

    def membership(self) -> control_pb2.Membership:
        """See `MembershipTable`."""
        times = inference_pb2.StepTimes(
            dense_base_s=0.02, dense_row_s=0.001, attention_base_s=0.0, attention_token_s=1e-5
        )
        running = inference_pb2.Load(sequences_running=12, step_times=times)
        members = [_member(name, inference_pb2.ROLE_DENSE, running) for name in DENSE]
        for name, free in ((FULL, 4), (EMPTY, 100)):
            blocks = inference_pb2.BlockAccount(capacity=100, free=free)
            load = inference_pb2.Load(blocks=blocks)
            members.append(_member(name, inference_pb2.ROLE_ATTENTION, load))
        return control_pb2.Membership(members=members)

    def sequences_at(self, life: Life) -> Mapping[SequenceKey, int]:
        """See `DirectoryKeeper`: four blocks each, all in one arena."""
        return dict.fromkeys(SEQUENCES, 4) if life.worker == FULL else {}

    def blocks_at(self, life: Life) -> int:
        """See `DirectoryKeeper`."""
        return sum(self.sequences_at(life).values())


def _member(name: str, role: inference_pb2.Role.ValueType, load: inference_pb2.Load) -> inference_pb2.Member:
    return inference_pb2.Member(
        worker_id=name, role=role, epoch=1, state=inference_pb2.MEMBER_STATE_READY, load=load
    )


class Rounds:
    """A balancer and its clock."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._clock = ManualClock()
        cluster = cast(Any, FakeCluster())
        settings = BalancerSettings(block_tokens=16, interval_s=interval_s)
        self.balancer = Balancer(settings, cluster, cluster, self._clock)

    def after(self, seconds: float) -> set[SequenceKey]:
        """What the first dense worker is told, so much later."""
        self._clock.advance(seconds)
        self.balancer.tick()
        return self.told(DENSE[0])

    def told(self, worker: str) -> set[SequenceKey]:
        """Which sequences a worker hears are to move; all of them away from the full arena."""
        orders = self.balancer.orders(worker)
        assert {(order.source, order.target) for order in orders} <= {(FULL, EMPTY)}
        return {sequence_key(order.sequence) for order in orders}


def test_every_dense_worker_hears_each_order_once() -> None:
    """Only a sequence's own worker moves it, and which that is changes: both hear, once, and nobody else."""
    rounds = Rounds()
    assert rounds.after(1.0) == set(), "no round is due"
    orders = rounds.after(INTERVAL_S)
    assert 0 < len(orders) < len(SEQUENCES)
    assert rounds.told(DENSE[1]) == orders
    assert [rounds.told(name) for name in (*DENSE, FULL, EMPTY)] == [set()] * 4


def test_an_arena_is_left_alone_while_its_orders_may_be_under_way() -> None:
    """The next rounds see the reports of before the moves: nothing more leaves. Where the reports are still
    the same some seconds later, others leave, and those of the first round only long after.
    """
    rounds = Rounds()
    first = rounds.after(INTERVAL_S)
    assert [rounds.after(INTERVAL_S) for _ in range(2)] == [set()] * 2
    second = rounds.after(INTERVAL_S)
    assert second
    assert not first & second
    later = [rounds.after(INTERVAL_S) for _ in range(15)]
    assert first & set().union(*later)
    assert not first & set().union(*later[:10])


def test_without_an_interval_nothing_is_planned() -> None:
    """An interval of 0 turns planning off, however long it goes on."""
    rounds = Rounds(interval_s=0.0)
    assert [rounds.after(100.0) for _ in range(3)] == [set()] * 3
