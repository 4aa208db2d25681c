"""Which gateway to ask next, after what pause, and when to give up: pure policy, and its one I/O rule.

answered --interrupted--> next gateway at once --each tried--> pause, growing --> all again
    ^                                                                        |
    +------------------------------- answered -------------------------------+
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import grpc

from anabranch.addresses import Gateway
from cluster import rpc
from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, DeadlineExceeded, Stopping, Unavailable

_PAUSE_FIRST_S = 0.05
_PAUSE_LONGEST_S = 2.0
_DOUBLINGS_MAX = 16
_STATUS_DETAILS = "grpc-status-details-bin"


class Failover:
    """The attempts of one call over several gateways, until its deadline.

    `known` says which there are now, and `first` with which of them to begin. `outage_s` bounds how long
    failures may follow each other without an answer in between. Pauses double from 50 ms to 2 s once per
    round over all gateways, and are cut by up to half at random, so that the clients of a gateway that died
    do not return in step.
    """

    def __init__(
        self,
        known: Callable[[], Sequence[Gateway]],
        *,
        first: int = 0,
        timeout_s: float,
        outage_s: float,
        clock: Clock = monotonic,
        jitter: random.Random | None = None,
    ) -> None:
        self._known = known
        self._first = first
        self._timeout_s = timeout_s
        self._outage_s = outage_s
        self._clock = clock
        self._jitter = jitter or random.Random()  # noqa: S311  # spreads load, hides nothing
        self._deadline_s = clock() + timeout_s
        self._asked: Gateway | None = None
        self._is_left = True
        self._tried: set[Gateway] = set()  # in this round
        self._rounds = 0
        self._failures = 0
        self._failing_since_s = self._heard_s = -math.inf
        self._said_stop = False

    def gateway(self) -> Gateway:
        """The gateway to ask now: the same one until `interrupted`, then the next that was not tried."""
        if self._asked is None or self._is_left:
            known = tuple(self._known())
            start = known.index(self._asked) + 1 if self._asked in known else self._first % len(known)
            in_turn = known[start:] + known[:start]
            self._asked = next((each for each in in_turn if each not in self._tried), in_turn[0])
            self._is_left = False
        return self._asked

    def remaining_s(self) -> float:
        """Time left. Raises DeadlineExceeded when there is none."""
        remaining_s = self._deadline_s - self._clock()
        if remaining_s <= 0:
            raise self.deadline_error()
        return remaining_s

    def answered(self) -> None:
        """The gateway brought news: the outage, if there was one, is over."""
        self._failures = self._rounds = 0
        self._tried.clear()
        self._said_stop = False

    def heard(self) -> None:
        """The gateway said something, which need not be news: a resumed stream begins so. Pauses go on
        growing, lest a gateway that answers and breaks be asked for ever, but this is no outage.
        """
        self._heard_s = self._clock()

    def interrupted(self, error: AnabranchError, *, refuses: bool = False) -> float:
        """Turn to the next gateway; returns the pause before asking it, in seconds. `refuses`: the gateway
        itself says that the request cannot be served now, so that it was heard does not end the outage. One
        that stops does not say that: the next may serve.

        Raises DeadlineExceeded, or Unavailable after an outage longer than `outage_s`.
        """
        now_s = self._clock()
        if self._failures == 0:
            self._failing_since_s = now_s
        self._failures += 1
        self._tried.add(self.gateway())
        self._is_left = True
        self._said_stop |= isinstance(error, Stopping)
        remaining_s = self.remaining_s()
        heard_s = -math.inf if refuses else self._heard_s
        if now_s - max(self._failing_since_s, heard_s) >= self._outage_s:
            silence = f" for {self._outage_s:g} s" if self._outage_s else ""
            stopped = " since one said that it stops; is the cluster down?" if self._said_stop else ""
            outcome = f"no gateway {'serves this' if refuses else 'answered'}{silence}{stopped}"
            raise Unavailable(f"{outcome} ({self._all()}): {error.message}")
        return min(self._pause_s(), remaining_s)

    def deadline_error(self) -> DeadlineExceeded:
        """What to raise when the time is over."""
        return DeadlineExceeded(f"the request was not done within its {self._timeout_s:g} s")

    def _all(self) -> str:
        return ", ".join(gateway.address for gateway in self._known())

    def _pause_s(self) -> float:
        if not self._tried.issuperset(self._known()):
            return 0.0
        self._tried.clear()
        longest_s = min(_PAUSE_LONGEST_S, _PAUSE_FIRST_S * 2.0 ** min(self._rounds, _DOUBLINGS_MAX))
        self._rounds += 1
        return longest_s * self._jitter.uniform(0.5, 1.0)


class _Ended(Protocol):
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None: ...


def is_interruption(error: grpc.RpcError) -> bool:
    """Whether a call ended because gateway or connection went away, not because of an answer.

    A connection that dies is reported as UNAVAILABLE or, when the server's end reset the stream, as
    CANCELLED or INTERNAL. A gateway that means one of the latter two says so with ErrorInfo.
    """
    call = cast(_Ended, error)  # every RpcError of a finished call has these
    code = call.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    if _is_answer(call):
        return False
    reset = code is grpc.StatusCode.INTERNAL and "RST_STREAM" in (call.details() or "")
    return reset or code is grpc.StatusCode.CANCELLED


def _is_answer(call: _Ended) -> bool:
    """Whether a server of ours chose this status, rather than gRPC itself."""
    return any(key == _STATUS_DETAILS for key, _ in call.trailing_metadata() or ())


def next_pause_s(failover: Failover, error: grpc.RpcError) -> float:
    """The pause before the next attempt of a call that failed; raises the error when it was an answer."""
    translated = rpc.from_rpc(error)
    if isinstance(translated, DeadlineExceeded) and not _is_answer(cast(_Ended, error)):
        raise failover.deadline_error() from error
    if not is_interruption(error):
        raise translated from error
    refuses = _is_answer(cast(_Ended, error)) and not isinstance(translated, Stopping)
    return failover.interrupted(translated, refuses=refuses)
