"""Signals are heard whichever thread the kernel gives them to. In processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading
from cluster.signals import Interrupts

def to_another_thread(number):
    sender = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number))
    sender.start()
    sender.join()

stop = threading.Event()
Interrupts(stop.set, lambda number: os._exit(128 + number)).start()
"""


def ran(program: str) -> subprocess.CompletedProcess[str]:
    """A program after the beginning above."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_main_thread_that_waits_is_woken(number: str) -> None:
    """The main thread waits without end, and another thread gets the signal."""
    ended = ran(
        f"threading.Timer(0.2, to_another_thread, [signal.{number}]).start()\nstop.wait()\nprint('asked')\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "asked\n", "")


def test_the_second_signal_insists() -> None:
    """With its number, also while the main thread waits for something else."""
    ended = ran(
        "to_another_thread(signal.SIGTERM)\n"
        "stop.wait()\n"
        "threading.Timer(0.2, to_another_thread, [signal.SIGTERM]).start()\n"
        "threading.Event().wait()\n"
    )
    assert ended.returncode == 128 + 15


def test_signals_are_given_back() -> None:
    """After `close` the handlers from before are there again, and the thread has ended."""
    ended = ran(
        "def mine(number, frame): print('mine')\n"
        "signal.signal(signal.SIGTERM, mine)\n"
        "with Interrupts(lambda: print('asked'), print):\n"
        "    pass\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print([thread.name for thread in threading.enumerate()].count('signals'))\n"
    )
    assert ended.stdout == "mine\n1\n"  # the one that was started first
