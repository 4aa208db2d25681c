"""One sequence's shards at one attention worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import InvalidRequest
from cluster.types import Generation, SequenceKey
from workers.attention.shard import LayerArrival, Shard


@dataclass(slots=True, eq=False)
class Holding:
    """Shards under one generation and one lease; owned by the store."""

    key: SequenceKey
    generation: Generation
    lease_end_s: float
    shards: list[Shard] = field(default_factory=list)
    first_difference: int | None = None
    """What the take-over to this generation found; see `Adoption`."""

    @property
    def by_position(self) -> list[Shard]:
        """Its shards in the order of their positions."""
        return sorted(self.shards, key=_first_position)

    def arrivals(self, end: int) -> list[LayerArrival]:
        """Of the appends that end by `end`."""
        pending = (shard.pending for shard in self.shards)
        return [append.arrival for append in pending if append is not None and append.end <= end]

    def check_apart(self, first: int, end: int) -> None:
        """Whether no shard has any of first..end. Raises InvalidRequest."""
        for shard in self.shards:
            if shard.first < end and first < shard.end:
                raise InvalidRequest(f"{self.key}: {first}..{end} overlaps shard {shard.shard_id}")


def _first_position(shard: Shard) -> int:
    return shard.first
