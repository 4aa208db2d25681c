"""The directory's copy in the registry, for the time when no controller answers. Written by the registry
writer's thread alone; reports and questions do not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, ResourceExhausted
from cluster.policies.directory import HeldBlock
from cluster.registry.interface import Registry
from cluster.telemetry import logger
from cluster.types import Epoch
from controller.directory_service import DirectoryKeeper

_log = logger("registry")

_PART = 500
"""Blocks taken from the directory at a time, while reports wait for it; one call to the registry."""
_REST_S = 300.0
"""After a registry had no room. Filling it up again at once would take it from others again."""


class DirectoryCopy:
    """Keeps the registry's blocks equal to the directory, as many a round as `round_s` seconds suffice for:
    the rest is written later, so that neither the registry nor the writer is busy with hints alone.

        reading --all read--> following <-------------+
           |                   |  |  lost track       | empties the copy, and writes everything
           +----refused----+   |  +-----> behind -----+
                           v   v            ^
                          resting --later---+

    Reading: what an earlier controller wrote becomes the directory's first hints. Behind: the registry was
    away, or lost blocks, or more changed than was kept. Resting: it has no room, and the copy, a hint, makes
    room for the membership, which is none.
    """

    def __init__(self, directory: DirectoryKeeper, round_s: float, clock: Clock = monotonic) -> None:
        self._directory = directory
        self._round_s = round_s
        self._clock = clock
        self._unread: Iterator[list[HeldBlock]] | None = None
        self._resume_s = clock()
        self._is_refused = False
        self.kept: int | None = None
        """Blocks in the registry, as it said last; None while it was not asked."""

    def inherit(self, registry: Registry) -> None:
        """Begin with what is in there, which the next rounds read."""
        self._directory.follow(from_nothing=False)
        self._unread, self.kept = registry.read_blocks(), None

    @property
    def is_reading(self) -> bool:
        """Whether some of what is in there has still to be read."""
        return self._unread is not None

    def lose_track(self) -> None:
        """Nothing is certain of what is in there: the next round begins with an empty copy."""
        self._unread = None
        self._directory.unfollow()

    def write(self, registry: Registry, writer: Epoch, *, is_refresh: bool) -> None:
        """One round; with `is_refresh` leases are renewed, and what is there is counted. A registry without
        room is no error here. Raises what it raises otherwise.
        """
        if self._clock() < self._resume_s:
            return
        until_s = self._clock() + self._round_s
        try:
            if self._unread is None or self._read(self._unread, until_s):
                self._write(registry, writer, until_s, is_refresh=is_refresh)
        except ResourceExhausted as error:
            self.give_way(registry, writer, error)

    def give_way(self, registry: Registry, writer: Epoch, error: ResourceExhausted) -> None:
        """The registry has no room: leave it what the copy takes, and rest. Raises nothing."""
        self.lose_track()
        self._resume_s = self._clock() + _REST_S
        if not self._is_refused:
            _log.warning("directory_not_copied", problem=error.message, pause_s=_REST_S)
        self._is_refused = True
        try:
            self.kept = registry.publish_blocks(writer, (), starts_over=True)
        except AnabranchError as refusal:  # a full disk takes no removal either
            _log.debug("copy_not_removed", problem=refusal.message)

    def _read(self, unread: Iterator[list[HeldBlock]], until_s: float) -> bool:
        """Whether all has been read."""
        for part in unread:
            self._directory.restore(part)
            if self._clock() >= until_s:
                return False
        self._unread = None
        return True

    def _write(self, registry: Registry, writer: Epoch, until_s: float, *, is_refresh: bool) -> None:
        is_behind = not self._directory.is_followed
        if is_behind:
            self._directory.follow(from_nothing=True)
            self.kept = registry.publish_blocks(writer, (), starts_over=True)
        elif is_refresh:
            before, self.kept = self.kept, registry.publish_blocks(writer, ())
            if before not in (None, self.kept):
                self.lose_track()
                return
        while changed := self._directory.take_changed(_PART):
            self.kept = registry.publish_blocks(writer, changed)
            if self._clock() >= until_s:
                return
        self._is_refused = False
