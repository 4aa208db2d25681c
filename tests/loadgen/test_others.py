"""How much of a machine others take."""

from __future__ import annotations

import os

import pytest

from anabranch.cli.bench.others import busy_s, watched


def test_stolen_time_counts_as_busy() -> None:
    """What a host gave to other machines was taken from this one; idle and waiting for disks were not."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = (1, 2, 4, 100, 200, 8, 16, 32, 0, 0)
    stat = "cpu  " + " ".join(str(word * ticks) for word in words) + "\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert busy_s(stat) == pytest.approx(1 + 2 + 4 + 8 + 16 + 32)


def test_memory_is_read_while_one_watches() -> None:
    """However short the watch; a hundred gigabytes a second is more than one core gets."""
    with watched() as others:
        pass
    assert 1e8 < others.read_bytes_per_s < 1e11
