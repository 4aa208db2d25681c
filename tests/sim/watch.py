"""What processes tell and write, compared as it leaves them."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.types import Generation, SequenceKey, ShardId, ShardRef
from workers.dense.deltas import Delta
from workers.lanes.messages import PlanRow

_Shard = tuple[str, ShardId]
"""The address of a life of an attention worker, and which of its shards."""


class Violation(AssertionError):
    """Something happened that must never happen."""


class Watch:
    """A shard has one writer under a generation, and its gateway was told of it before (DESIGN 6, 6b)."""

    def __init__(self) -> None:
        self.renewed: set[SequenceKey] = set()
        """Sequences that a lease was renewed for since somebody cleared this."""
        self._told: dict[tuple[str, SequenceKey], frozenset[_Shard]] = {}
        """The last map that each life of a dense worker sent of each sequence."""
        self._writers: dict[tuple[_Shard, Generation], str] = {}

    def tells(self, dense: str, delta: Delta) -> None:
        """A life of a dense worker sends news of a sequence; raises Violation for a map that is none."""
        if delta.shard_map is not None:
            check_map(delta.key, delta.shard_map)
            shards = frozenset((f"{ref.worker}@{ref.epoch}", ref.shard) for ref in delta.shard_map)
            self._told[dense, delta.key] = shards

    def writes(self, dense: str, attention: str, rows: Iterable[PlanRow]) -> None:
        """A life of a dense worker sends a plan to one of an attention worker. Raises Violation."""
        for row in rows:
            if not row.token_ids:
                continue
            shard = (attention, row.shard)
            writer = self._writers.setdefault((shard, row.generation), dense)
            if writer != dense:
                raise Violation(f"{dense} writes {shard} under generation {row.generation} of {writer}")
            told = (shards for (teller, _), shards in self._told.items() if teller == dense)
            if not any(shard in shards for shards in told):
                raise Violation(f"{dense} writes {shard}, which is in no map that it sent")


def check_map(key: SequenceKey, shard_map: tuple[ShardRef, ...]) -> None:
    """A map's shards are in order and share no position. Raises Violation."""
    end = 0
    for ref in shard_map:
        if not end <= ref.first < ref.end:
            raise Violation(f"{key}: {ref} begins before {end} in a map, or is empty")
        end = ref.end
