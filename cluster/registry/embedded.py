"""The registry in the controller's own memory: the default. It is never away, and ends with its process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from cluster.blocks import BlockHash
from cluster.clock import Clock, monotonic
from cluster.errors import Fenced
from cluster.policies.directory import HeldBlock
from cluster.registry.interface import (
    PAST_EPOCHS_MOST,
    ControllerRecord,
    MemberRecord,
    RegistryView,
)
from cluster.types import Epoch, WorkerId


class EmbeddedRegistry:
    """Owns the same facts as the shared one, under the same rules; see `Registry`."""

    def __init__(self, lease_s: float, blocks_most: int, clock: Clock = monotonic) -> None:
        self._lease_s = lease_s
        self._blocks_most = blocks_most
        self._clock = clock
        self._lock = threading.Lock()
        self._controller: ControllerRecord | None = None
        self._controller_until_s = 0.0
        self._version, self._version_until_s = 0, 0.0
        self._members: dict[WorkerId, tuple[MemberRecord, float]] = {}
        self._past: dict[WorkerId, deque[Epoch]] = {}
        self._blocks: dict[BlockHash, HeldBlock] = {}
        self._blocks_until_s = 0.0

    def claim(self, controller: ControllerRecord, *, take_over: bool) -> None:
        """See `Registry`."""
        with self._lock:
            held = self._present_controller()
            if held is not None and held.epoch != controller.epoch and not take_over:
                raise Fenced(f"the registry has another controller, {held.epoch:016x} at {held.address}")
            self._controller = controller
            self._controller_until_s = self._clock() + self._lease_s

    def publish(
        self,
        writer: Epoch,
        version: int,
        present: Sequence[MemberRecord],
        gone: Sequence[tuple[WorkerId, Epoch]],
    ) -> frozenset[WorkerId]:
        """See `Registry`."""
        with self._lock:
            self._require(writer)
            for worker, epoch in gone:
                if self._epoch_of(worker) == epoch:
                    del self._members[worker]
                    self._retire(worker, epoch)
            refused = frozenset(record.worker for record in present if not self._register(record))
            self._version, self._version_until_s = version, self._clock() + self._lease_s
            return refused

    def version(self) -> int:
        """See `Registry`."""
        with self._lock:
            return self._present_version()

    def read(self) -> RegistryView:
        """See `Registry`."""
        with self._lock:
            members = [self._members[worker][0] for worker in sorted(self._members) if self._epoch_of(worker)]
            past = {worker: tuple(epochs) for worker, epochs in self._past.items()}
            return RegistryView(self._present_version(), self._present_controller(), tuple(members), past)

    def publish_blocks(self, writer: Epoch, blocks: Sequence[HeldBlock], *, starts_over: bool = False) -> int:
        """See `Registry`."""
        with self._lock:
            self._require(writer)
            if starts_over:
                self._blocks = {}
            kept = self._present_blocks()
            for block in blocks:
                if not block.holders:
                    kept.pop(block.identity, None)
                elif len(kept) < self._blocks_most or block.identity in kept:
                    kept[block.identity] = block
            self._blocks_until_s = self._clock() + self._lease_s
            return len(kept)

    def find_blocks(self, identities: Sequence[BlockHash]) -> list[HeldBlock]:
        """See `Registry`."""
        with self._lock:
            kept, found = self._present_blocks(), []
            for identity in identities:
                if identity not in kept:
                    break
                found.append(kept[identity])
            return found

    def read_blocks(self) -> Iterator[list[HeldBlock]]:
        """See `Registry`. All in one part."""
        with self._lock:
            kept = list(self._present_blocks().values())
        if kept:
            yield kept

    def close(self) -> None:
        """Nothing is open."""

    def _present_controller(self) -> ControllerRecord | None:
        return self._controller if self._clock() < self._controller_until_s else None

    def _present_version(self) -> int:
        return self._version if self._clock() < self._version_until_s else 0

    def _present_blocks(self) -> dict[BlockHash, HeldBlock]:
        """Those whose lease has not run out; what is put there is kept."""
        if self._clock() >= self._blocks_until_s:
            self._blocks = {}
        return self._blocks

    def _require(self, writer: Epoch) -> None:
        held = self._present_controller()
        if held is None or held.epoch != writer:
            raise Fenced("the registry has no controller, or another one")

    def _epoch_of(self, worker: WorkerId) -> Epoch | None:
        record, until_s = self._members.get(worker, (None, 0.0))
        return record.epoch if record is not None and self._clock() < until_s else None

    def _register(self, record: MemberRecord) -> bool:
        """Whether the life may be a member."""
        if record.epoch in self._past.get(record.worker, ()):
            return False
        held = self._epoch_of(record.worker)
        if held is not None and held != record.epoch:
            self._retire(record.worker, held)
        self._members[record.worker] = (record, self._clock() + self._lease_s)
        return True

    def _retire(self, worker: WorkerId, epoch: Epoch) -> None:
        self._past.setdefault(worker, deque(maxlen=PAST_EPOCHS_MOST)).append(epoch)
