"""Instances: a dense worker and the attention workers at home with it (DistKV-LLM's term). Pure."""

from __future__ import annotations

from cluster.types import WorkerId


def home_of(attention: WorkerId, dense_workers: int) -> WorkerId:
    """The dense worker at which the attention worker of a slot is at home: they are dealt out by number."""
    return WorkerId(f"dense-{slot_number(attention) % dense_workers}")


def slot_number(worker: WorkerId) -> int:
    """The number in a slot's name, such as 3 in `attention-3`; 0 where a name has none."""
    number = worker.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
