"""The controller's directory: reports come with heartbeats, questions from dense workers. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from anabranch.v1 import control_pb2
from anabranch.wire import sequence_key
from cluster.blocks import HASH_BYTES, HASHES_MOST, BlockHash
from cluster.errors import InvalidRequest
from cluster.policies.directory import Directory, HeldBlock, Life, Report
from cluster.types import Epoch, SequenceKey, WorkerId
from controller.membership import MembershipTable


class DirectoryKeeper:
    """Owns the directory, and names only lives that membership names now.

    A restarted controller begins with what the registry's copy says of them, and asks every worker to start
    over: its report then replaces that.
    """

    def __init__(self, table: MembershipTable) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._directory = Directory()

    def take(self, request: control_pb2.HeartbeatRequest) -> bool:
        """Apply the report of a heartbeat, if it has one; False where the next one must start over.

        Raises InvalidRequest for identities of a wrong size.
        """
        if not request.HasField("pool"):
            return True
        report = read_report(request)
        with self._lock:
            return self._directory.apply(report)

    def find(self, request: control_pb2.FindPrefixRequest) -> Iterator[control_pb2.PrefixRun]:
        """The runs of `FindPrefix`. Raises InvalidRequest."""
        if not 0 < len(request.block_hashes) <= HASHES_MOST:
            raise InvalidRequest(f"{len(request.block_hashes)} hashes: name 1 to {HASHES_MOST} at once")
        hashes = list(_hashes(request.block_hashes))
        with self._lock:
            runs = self._directory.find(hashes, request.blocks_before)
        for run in runs:
            holders = list(filter(self._is_living, run.holders))
            if not holders:
                return
            yield control_pb2.PrefixRun(
                blocks=run.blocks,
                holders=[control_pb2.Holder(worker_id=life.worker, epoch=life.epoch) for life in holders],
            )

    def sequences_at(self, life: Life) -> Mapping[SequenceKey, int]:
        """Blocks that each sequence holds at one life."""
        with self._lock:
            return self._directory.sequences_at(life)

    def blocks_at(self, life: Life) -> int:
        """Blocks that all sequences hold at one life; those they share count for each."""
        with self._lock:
            return self._directory.blocks_at(life)

    def sweep(self) -> None:
        """Forget the lives that membership no longer names. To be called now and then."""
        with self._lock:
            self._directory.retain(self._is_living)

    @property
    def is_followed(self) -> bool:
        """Whether changes are noted for a copy."""
        return self._directory.is_followed

    def follow(self, *, from_nothing: bool) -> None:
        """Note changes for a copy from now on; see `Directory.follow`."""
        with self._lock:
            self._directory.follow(from_nothing=from_nothing)

    def unfollow(self) -> None:
        """Note no changes any more."""
        with self._lock:
            self._directory.unfollow()

    def take_changed(self, most: int) -> list[HeldBlock]:
        """The earliest changes that were not taken yet, as they stand."""
        with self._lock:
            return self._directory.take_changed(most)

    def restore(self, blocks: Iterable[HeldBlock]) -> None:
        """Take from a copy what lives hold that membership names and that have not reported here yet."""
        with self._lock:
            self._directory.restore(blocks, self._is_living)

    def _is_living(self, life: Life) -> bool:
        return self._table.holds(life.worker, life.epoch)


def read_report(request: control_pb2.HeartbeatRequest) -> Report:
    """What a heartbeat says of its worker's pool. Raises InvalidRequest for identities of a wrong size."""
    pool = request.pool
    hashes = _hashes(block.hash for block in pool.published)
    lengths = (block.prefix_blocks for block in pool.published)
    return Report(
        Life(WorkerId(request.worker_id), Epoch(request.epoch)),
        pool.number,
        pool.starts_over,
        list(zip(hashes, lengths, strict=True)),
        list(_hashes(pool.withdrawn)),
        [(sequence_key(each.sequence), each.blocks) for each in pool.sequences],
    )


def _hashes(given: Iterable[bytes]) -> Iterator[BlockHash]:
    for each in given:
        if len(each) != HASH_BYTES:
            raise InvalidRequest(f"a block's hash has {HASH_BYTES} bytes, not {len(each)}")
        yield BlockHash(each)
