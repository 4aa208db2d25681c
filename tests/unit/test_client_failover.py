"""Whom a client asks next, when, and how long it tries."""

import random
from typing import Any

import grpc
import pytest

from anabranch.addresses import Gateway
from anabranch.failover import Failover, next_pause_s
from cluster import rpc
from cluster.clock import ManualClock
from cluster.errors import AnabranchError, DeadlineExceeded, Stopping, Unavailable

NO_WORKER = Unavailable("no dense worker is ready")
GONE = Unavailable("gone")


class Ended(grpc.RpcError):
    """A call that a gateway ended with an error of ours."""

    def __init__(self, error: AnabranchError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        """See `grpc.Call`."""
        return rpc.status_code(self._error)

    def details(self) -> str:
        """See `grpc.Call`."""
        return self._error.message

    def trailing_metadata(self) -> Any:
        """See `grpc.Call`."""
        return (("grpc-status-details-bin", rpc.to_status(self._error).SerializeToString()),)


def make_failover(
    clock: ManualClock, *addresses: str, timeout_s: float = 100, outage_s: float = 30
) -> Failover:
    """A failover on a virtual clock."""
    known = tuple(Gateway(address) for address in addresses or ("a",))
    return Failover(
        lambda: known, timeout_s=timeout_s, outage_s=outage_s, clock=clock, jitter=random.Random(1)
    )


def test_every_gateway_is_tried_before_the_first_pause() -> None:
    """With others left to ask, there is no pause; then there is, and the first one's turn again."""
    failover = make_failover(ManualClock(), "a", "b", "c")
    asked = []
    pauses = []
    for _ in range(7):
        asked.append(failover.gateway().address)
        pauses.append(failover.interrupted(GONE) > 0)
    assert asked == ["a", "b", "c", "a", "b", "c", "a"]
    assert pauses == [False, False, True, False, False, True, False]


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    """Round by round from 50 ms to 2 s, each cut by at most half."""
    failover = make_failover(ManualClock())
    pauses = [failover.interrupted(GONE) for _ in range(40)]
    for round_number, pause_s in enumerate(pauses):
        longest_s = min(2.0, 0.05 * 2**round_number)
        assert longest_s / 2 <= pause_s <= longest_s
    assert len(set(pauses)) == len(pauses)


def test_an_answer_ends_the_outage() -> None:
    """Failures far apart, with news between them, are no outage; without news they are."""
    clock = ManualClock()
    failover = make_failover(clock)
    for _ in range(5):
        failover.interrupted(GONE)
        clock.advance(16)
        failover.answered()
    failover = make_failover(clock)
    failover.interrupted(GONE)
    clock.advance(16)
    failover.interrupted(GONE)
    clock.advance(16)
    with pytest.raises(Unavailable, match=r"no gateway answered for 30 s \(a\): gone"):
        failover.interrupted(GONE)


def test_a_gateway_that_says_nothing_new_is_no_outage() -> None:
    """While a long prompt is computed a resumed stream brings no news for minutes: the next gateway's loss is
    the beginning of an outage, not the end of one; pauses grow all the same.
    """
    clock = ManualClock()
    failover = make_failover(clock)
    first_s = failover.interrupted(GONE)
    failover.heard()
    clock.advance(29)
    failover.heard()
    clock.advance(10)
    assert failover.interrupted(GONE) > first_s
    clock.advance(25)
    with pytest.raises(Unavailable, match="no gateway answered"):
        failover.interrupted(GONE)


def test_a_gateway_that_begins_and_then_says_no_is_an_outage() -> None:
    """A gateway without a dense worker accepts a request and ends it after some seconds, again and again."""
    clock = ManualClock()
    failover = make_failover(clock)
    for _ in range(6):
        failover.interrupted(NO_WORKER, refuses=True)
        clock.advance(5)
        failover.heard()
    with pytest.raises(Unavailable, match=r"no gateway serves this for 30 s \(a\): no dense worker"):
        failover.interrupted(NO_WORKER, refuses=True)


def test_a_gateway_that_stops_is_no_refusal() -> None:
    """One that computed a long prompt for a resumed stream, silently, and then stops: the next is asked."""
    clock = ManualClock()
    failover = make_failover(clock, "a", "b", "c")
    failover.interrupted(GONE)
    clock.advance(1)
    failover.heard()
    clock.advance(29)
    error = Ended(Stopping("the gateway stops"))
    assert next_pause_s(failover, error) == 0.0
    with pytest.raises(Unavailable, match="no gateway serves this"):
        next_pause_s(failover, Ended(NO_WORKER))


def test_a_cluster_that_was_stopped_is_named_as_such() -> None:
    """After a gateway said that it stops, silence is no riddle; an answer from another one ends that."""
    clock = ManualClock()
    failover = make_failover(clock, "a", "b")
    failover.interrupted(Stopping("the gateway stops"))
    clock.advance(31)
    with pytest.raises(
        Unavailable, match=r"for 30 s since one said that it stops; is the cluster down\? \(a, b\)"
    ):
        failover.interrupted(GONE)
    failover.answered()
    failover.interrupted(GONE)
    clock.advance(31)
    with pytest.raises(Unavailable, match=r"for 30 s \(a, b\): gone"):
        failover.interrupted(GONE)


def test_the_deadline_bounds_everything() -> None:
    """No pause reaches beyond the deadline, and after it nothing is tried."""
    clock = ManualClock()
    failover = make_failover(clock, timeout_s=1)
    assert failover.remaining_s() == 1
    clock.advance(0.99)
    assert failover.interrupted(GONE) <= 0.01 + 1e-9
    clock.advance(0.02)
    with pytest.raises(DeadlineExceeded, match="within its 1 s"):
        failover.remaining_s()
    with pytest.raises(DeadlineExceeded):
        failover.interrupted(GONE)


def test_a_single_attempt_pauses_for_nothing() -> None:
    """Without patience the first failure is the last."""
    with pytest.raises(Unavailable, match=r"no gateway answered \(a\): gone"):
        make_failover(ManualClock(), outage_s=0).interrupted(GONE)
