"""An attention worker without its servers: what a dense worker's local shards use directly."""

from __future__ import annotations

import threading

import torch

from cluster.clock import Clock, monotonic
from cluster.config import AttentionConfig
from cluster.errors import ConfigError
from cluster.telemetry import logger
from cluster.types import Epoch, KvGeometry, WorkerId
from workers.attention.arena import Arena
from workers.attention.local_peer import LocalPeer
from workers.attention.session import AttendSession
from workers.attention.store import Store
from workers.kernels.select import select

_log = logger("attention")


_LOOK_S = 0.25
"""How often leases and the account are looked at; a lease may be shorter in tests."""


class AttentionCore:
    """Arena, store and kernel of one attention worker, and the thread that looks after its store.

    Use with `with`, or call `close`: the thread runs until then.
    """

    def __init__(
        self,
        config: AttentionConfig,
        arena_bytes: int,
        geometry: KvGeometry,
        worker: WorkerId,
        epoch: Epoch,
        clock: Clock = monotonic,
    ) -> None:
        """Raises ConfigError when the arena is smaller than one block, or the device is not there."""
        blocks = arena_bytes // geometry.block_bytes
        if blocks < 1:
            raise ConfigError(
                f"an arena of {arena_bytes} bytes is smaller than a block of {geometry.block_bytes}"
            )
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("attention.device: cuda, but this process sees no CUDA device")
        self._kernel = select(config.kernel, config.device)
        self.arena = Arena(geometry, blocks, torch.device(config.device), self._kernel.layout)
        self.store = Store(worker, epoch, geometry, blocks, config.lease_ms, clock)
        self._slice_rows = config.slice_rows
        self._pause_s = min(_LOOK_S, config.lease_ms / 8000)
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
        return AttendSession(self.store, self.arena, self._kernel, self._slice_rows, self._count_busy)

    def peer(self) -> LocalPeer:
        """This worker as a dense worker in the same process sees it."""
        return LocalPeer(self.store, self.session)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._reaper.join()

    def __enter__(self) -> AttentionCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_busy(self, seconds: float) -> None:
        with self._busy_lock:
            self.busy_seconds += seconds

    def _look_after_store(self) -> None:
        while not self._closing.wait(self._pause_s):
            for key in self.store.expire():
                _log.warning("lease_expired", request_id=key.request_id, choice=key.choice)
            self.account = self.store.account()
