"""The store's lock: one at a time, in the order of asking, whatever the body does."""

from __future__ import annotations

import threading
import time

import pytest

from workers.attention.turns import Turns

DEADLINE_S = 20.0


def join(threads: list[threading.Thread]) -> None:
    """End threads that should end by themselves."""
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def until_waiting(turns: Turns, count: int) -> None:
    """Block until `count` threads wait for a turn."""
    deadline_s = time.monotonic() + DEADLINE_S
    while turns.waiting < count:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)


def test_one_at_a_time() -> None:
    """Read-modify-write by eight threads loses nothing, and no two are ever inside."""
    turns = Turns()
    inside = total = worst = 0

    def work() -> None:
        nonlocal inside, total, worst
        for _ in range(200):
            with turns:
                inside += 1
                worst = max(worst, inside)
                seen = total
                threading.Event().wait(0)
                total = seen + 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    join(threads)
    assert (total, worst, turns.waiting) == (1600, 1, 0)


def test_who_asks_first_is_served_first() -> None:
    """Threads are served in the order in which they began to wait."""
    turns, served = Turns(), list[int]()

    def work(index: int) -> None:
        with turns:
            served.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(10)]
    with turns:
        for index, thread in enumerate(threads):
            thread.start()
            until_waiting(turns, index + 1)
    join(threads)
    assert served == list(range(10))


def test_who_had_a_turn_waits_behind_those_who_asked() -> None:
    """A thread that takes turn after turn lets each waiting one in between: a plain lock would not."""
    turns, served = Turns(), list[str]()

    def short() -> None:
        with turns:
            served.append("short")

    threads = [threading.Thread(target=short) for _ in range(2)]
    with turns:
        served.append("slice")
        for index, thread in enumerate(threads):
            thread.start()
            until_waiting(turns, index + 1)
    with turns:
        served.append("slice")
    join(threads)
    assert served == ["slice", "short", "short", "slice"]


def test_an_exception_ends_a_turn() -> None:
    """A body that raises hands the turn on, to a waiting thread and to the next."""
    turns, entered = Turns(), threading.Event()

    def work() -> None:
        with turns:
            entered.set()

    def fail() -> None:
        with turns:
            thread.start()
            until_waiting(turns, 1)
            raise ZeroDivisionError

    thread = threading.Thread(target=work)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert entered.wait(DEADLINE_S)
    join([thread])
    with turns:
        assert turns.is_mine


def test_a_turn_has_one_owner() -> None:
    """Only the thread that is inside has the turn."""
    turns = Turns()
    others: list[bool] = []
    with turns:
        assert turns.is_mine
        thread = threading.Thread(target=lambda: others.append(turns.is_mine))
        thread.start()
        join([thread])
    assert others == [False]
    assert not turns.is_mine


def test_asking_twice_is_a_bug_and_no_deadlock() -> None:
    """A thread that asks for the turn it has is told so at once."""
    turns = Turns()
    with turns, pytest.raises(AssertionError, match="waits for the turn it has"), turns:
        pass
    with turns:
        assert turns.is_mine
