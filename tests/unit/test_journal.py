"""What an attention worker reports: bounded, whole, and said again when nobody answered."""

from __future__ import annotations

from anabranch.v1 import control_pb2
from cluster.blocks import BlockHash
from cluster.types import SequenceKey
from workers.attention.journal import CHANGES_MOST, REPORT_ENTRIES_MOST, Journal

KEY = SequenceKey("r", 1)


def identity(number: int) -> BlockHash:
    """An identity."""
    return BlockHash(number.to_bytes(32, "little"))


def told(journal: Journal) -> control_pb2.PoolReport:
    """The next report, which is taken."""
    report = journal.report()
    journal.acknowledge(wants_all=False)
    return report


def numbers(report: control_pb2.PoolReport) -> list[int]:
    """The published identities."""
    return [int.from_bytes(block.hash, "little") for block in report.published]


def test_a_report_is_repeated_until_it_is_answered() -> None:
    """What happens meanwhile is in the next one."""
    journal = Journal()
    journal.published(identity(1), 1)
    first = journal.report()
    journal.published(identity(2), 2)
    assert journal.report() == first
    assert (first.number, first.starts_over, numbers(first)) == (1, True, [1])
    journal.acknowledge(wants_all=False)
    second = journal.report()
    assert (second.number, second.starts_over, numbers(second)) == (2, False, [2])


def test_what_came_and_went_is_told_as_gone() -> None:
    """A block published and evicted between two reports costs one entry, and is not said to be there."""
    journal = Journal()
    told(journal)
    journal.published(identity(1), 1)
    journal.withdrawn(identity(1))
    report = told(journal)
    assert numbers(report) == []
    assert list(report.withdrawn) == [identity(1)]


def test_a_report_is_bounded_and_the_rest_follows() -> None:
    """More than fits is told by the reports that follow, each entry once."""
    journal = Journal()
    count = REPORT_ENTRIES_MOST + 5
    for number in range(count):
        journal.published(identity(number), 1)
    first, second = told(journal), told(journal)
    assert (first.starts_over, first.has_more) == (True, True)
    assert (second.starts_over, second.has_more) == (False, False)
    assert sorted(numbers(first) + numbers(second)) == list(range(count))


def test_whoever_wants_all_gets_all() -> None:
    """A controller that missed something hears everything that is there now, sequences too."""
    journal = Journal()
    journal.published(identity(1), 1)
    journal.holds({KEY: 3})
    told(journal)
    journal.published(identity(2), 2)
    journal.report()
    journal.acknowledge(wants_all=True)
    report = told(journal)
    assert report.starts_over
    assert sorted(numbers(report)) == [1, 2]
    assert [(each.sequence.request_id, each.sequence.choice, each.blocks) for each in report.sequences] == [
        ("r", 1, 3)
    ]


def test_too_much_to_remember_becomes_a_start() -> None:
    """Changes that nobody asks for are not kept without end: the next report starts over."""
    journal = Journal()
    told(journal)
    for number in range(CHANGES_MOST + 1):
        journal.published(identity(number), 1)
        journal.withdrawn(identity(number))
    report = told(journal)
    assert report.starts_over
    assert not report.published
    assert not report.withdrawn


def test_sequences_are_told_when_they_change() -> None:
    """Only those whose number of blocks is another; who is gone is told with none."""
    journal = Journal()
    told(journal)
    journal.holds({KEY: 3, SequenceKey("s"): 1})
    told(journal)
    journal.holds({KEY: 4, SequenceKey("s"): 1})
    assert [(each.sequence.request_id, each.blocks) for each in told(journal).sequences] == [("r", 4)]
    journal.holds({SequenceKey("s"): 1})
    assert [(each.sequence.request_id, each.blocks) for each in told(journal).sequences] == [("r", 0)]
