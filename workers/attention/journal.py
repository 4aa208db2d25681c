"""What of an attention worker's memory changed since the controller was last told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

from anabranch.v1 import control_pb2
from anabranch.wire import sequence_message
from cluster.blocks import BlockHash
from cluster.types import SequenceKey

REPORT_ENTRIES_MOST = 8192
"""Entries of one report, about 350 KB: one suffices for nearly every arena."""
CHANGES_MOST = 65_536
"""Changes kept for a controller that does not ask; beyond them the next report starts over."""


class Journal:
    """Published blocks and what sequences hold, and which of both a report has yet to tell. Thread-safe, with
    a lock of its own: heartbeats must not wait for a turn behind a long computation.

        changed --report--> under way --acknowledge--> told
           ^                    |
           +---- wants all -----+     a lost answer: the same report again

    Changes are noted by name and told as they stand when the report is made, so that what came and went in
    between costs one entry.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._published: dict[BlockHash, int] = {}
        self._held: dict[SequenceKey, int] = {}
        self._changed_blocks: dict[BlockHash, None] = {}
        self._changed_sequences: dict[SequenceKey, None] = {}
        self._starts_over = True
        self._number = 0
        self._under_way: control_pb2.PoolReport | None = None

    def published(self, identity: BlockHash, prefix_blocks: int) -> None:
        """A block may be shared, the last one of a prefix of so many."""
        with self._lock:
            self._published[identity] = prefix_blocks
            self._note_block(identity)

    def withdrawn(self, identity: BlockHash) -> None:
        """A published block was evicted, or is private again."""
        with self._lock:
            del self._published[identity]
            self._note_block(identity)

    def holds(self, blocks_of: Mapping[SequenceKey, int]) -> None:
        """How many blocks each sequence holds now; whoever is not named holds none."""
        with self._lock:
            changed = dict(self._held.items() ^ blocks_of.items())
            self._held = dict(blocks_of)
            if not self._starts_over:
                self._changed_sequences.update(dict.fromkeys(changed))
                self._forget_too_much()

    def report(self) -> control_pb2.PoolReport:
        """The next report, or the last one again while it is not acknowledged."""
        with self._lock:
            if self._under_way is None:
                self._under_way = self._next()
            return self._under_way

    def acknowledge(self, *, wants_all: bool) -> None:
        """The last report was taken; or it was not, and the next one must start over."""
        with self._lock:
            self._under_way = None
            if wants_all:
                self._start_over()

    def _next(self) -> control_pb2.PoolReport:
        self._number += 1
        report = control_pb2.PoolReport(number=self._number, starts_over=self._starts_over)
        if self._starts_over:
            self._starts_over = False
            self._changed_blocks = dict.fromkeys(self._published)
            self._changed_sequences = dict.fromkeys(self._held)
        for identity in list(itertools.islice(self._changed_blocks, REPORT_ENTRIES_MOST)):
            del self._changed_blocks[identity]
            prefix_blocks = self._published.get(identity)
            if prefix_blocks is None:
                report.withdrawn.append(identity)
            else:
                report.published.add(hash=identity, prefix_blocks=prefix_blocks)
        room = REPORT_ENTRIES_MOST - len(report.published) - len(report.withdrawn)
        for key in list(itertools.islice(self._changed_sequences, room)):
            del self._changed_sequences[key]
            report.sequences.add(sequence=sequence_message(key), blocks=self._held.get(key, 0))
        report.has_more = bool(self._changed_blocks or self._changed_sequences)
        return report

    def _note_block(self, identity: BlockHash) -> None:
        if not self._starts_over:
            self._changed_blocks[identity] = None
            self._forget_too_much()

    def _forget_too_much(self) -> None:
        if len(self._changed_blocks) + len(self._changed_sequences) > CHANGES_MOST:
            self._start_over()

    def _start_over(self) -> None:
        self._starts_over = True
        self._changed_blocks.clear()
        self._changed_sequences.clear()
