"""An attention worker without its servers: what a dense worker's local shards use directly."""

from __future__ import annotations

import threading

import torch

from cluster.clock import Clock, monotonic
from cluster.config import AttentionConfig, TierConfig
from cluster.emulation import EmulatedTimes
from cluster.emulation_settings import EmulationConfig
from cluster.errors import ConfigError
from cluster.telemetry import logger
from cluster.types import Epoch, KvGeometry, WorkerId
from workers.attention.arena import Arena
from workers.attention.journal import Journal
from workers.attention.local_peer import LocalPeer
from workers.attention.session import AttendSession, AttentionPace
from workers.attention.shard_blocks import Sharing
from workers.attention.store import Store
from workers.devices import open_device
from workers.kernels.select import select
from workers.kernels.signature import CacheLayout, Kernel
from workers.kernels.warm_up import warm_up_attend

_log = logger("attention")


_LOOK_S = 0.25
"""How often leases and the account are looked at; a lease may be shorter in tests."""


_VACATED_BYTES = 64 * 2**20
"""Memory returned in one turn of the store."""


class AttentionCore:
    """One arena with its store and kernel, and the thread that looks after the store.

    Use with `with`, or call `close`: the thread runs until then.
    """

    def __init__(
        self,
        config: AttentionConfig,
        tier: TierConfig,
        geometry: KvGeometry,
        worker: WorkerId,
        epoch: Epoch,
        clock: Clock = monotonic,
        emulation: EmulationConfig | None = None,
    ) -> None:
        """`tier`: the arena's size, and where it lies; `emulation`: of another device.

        Raises ConfigError when the arena is smaller than a block or does not fit the device, when the
        device is not there, or when the kernel does not run on it.
        """
        blocks = tier.arena // geometry.block_bytes
        if blocks < 1:
            raise ConfigError(
                f"an arena of {tier.arena} bytes is smaller than a block of {geometry.block_bytes}"
            )
        device = open_device(tier.device, f"device of {worker}")
        self._kernel = _kernel(config.kernel, tier)
        self.arena = _arena(geometry, blocks, device, self._kernel.layout)
        if device.type == "cuda":
            warm_up_attend(self._kernel, self.arena.layer(0), geometry.query_heads)
        self.journal = Journal()
        sharing = Sharing(self.arena.copy_block, self.journal) if config.prefix_sharing else None
        self.store = Store(worker, epoch, geometry, blocks, config.lease_ms, clock, sharing)
        self._slice_rows = config.slice_rows
        self._pace = AttentionPace(EmulatedTimes(emulation, geometry.layers)) if emulation else None
        self._pause_s = min(_LOOK_S, config.lease_ms / 8000)
        self._give_back_s = config.give_back_s
        self.account = self.store.audit()
        """As of a moment ago: for heartbeats, which must not wait for a turn behind a long computation."""
        self._busy_lock = threading.Lock()
        self.busy_seconds = 0.0
        """Time spent appending and attending, over all lanes."""
        self._closing = threading.Event()
        self._reaper = threading.Thread(target=self._look_after_store, name="store", daemon=True)
        self._reaper.start()

    def session(self) -> AttendSession:
        """The attention side of a new lane."""
        return AttendSession(
            self.store, self.arena, self._kernel, self._slice_rows, self._count_busy, self._pace
        )

    def peer(self) -> LocalPeer:
        """This worker as a dense worker in the same process sees it."""
        return LocalPeer(self.store, self.session)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._reaper.join()
        if self._pace is not None:
            self._pace.padding.tell("attention")

    def give_back(self) -> int:
        """Return the memory of blocks that have been free since the last call; how many bytes went."""
        returned = 0
        while piece := self._give_back_a_piece():
            returned += piece
        with self.store.turns:
            self.store.allocator.note_free()
        return returned

    def __enter__(self) -> AttentionCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_back_a_piece(self) -> int:
        """So that attention gets its turn in between."""
        most = max(1, _VACATED_BYTES // self.arena.geometry.block_bytes)
        with self.store.turns:
            return sum(self.arena.vacate(*run) for run in self.store.allocator.vacant(most))

    def _count_busy(self, seconds: float) -> None:
        with self._busy_lock:
            self.busy_seconds += seconds

    def _look_after_store(self) -> None:
        given_s = monotonic()
        while not self._closing.wait(self._pause_s):
            try:
                if 0 < self._give_back_s <= monotonic() - given_s:
                    given_s = monotonic()
                    self.give_back()
                self._expire()
            except Exception as error:  # noqa: BLE001  a bug must be seen, and not keep every later lease
                _log.error("store_care_failed", error=error)

    def _expire(self) -> None:
        for key in self.store.expire():
            _log.warning("lease_expired", request_id=key.request_id, choice=key.choice)
        self.account = self.store.account()
        self.journal.holds(self.store.blocks_held())


def _kernel(name: str, tier: TierConfig) -> Kernel:
    try:
        return select(name, tier.device)
    except ValueError as error:
        raise ConfigError(f"attention.kernel: {error}") from error


def _arena(geometry: KvGeometry, blocks: int, device: torch.device, layout: CacheLayout) -> Arena:
    try:
        return Arena(geometry, blocks, device, layout)
    except (torch.OutOfMemoryError, OSError) as error:
        size_bytes = blocks * geometry.block_bytes
        raise ConfigError(f"an arena of {size_bytes} bytes does not fit the {device.type} device") from error
