"""The temporary folder of a private Ray cluster: whose it is, and when it may go."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path

_PARENT = Path("/tmp")  # noqa: S108  (a folder of our own in it; paths of sockets must be short)
_PREFIX = "anabranch-ray-"
_LOCK = "owner.lock"


class RayFolder:
    """A folder that only this user may enter, marked as in use by a lock that ends with this process.

    Ray opens its own folder, `files`, to everybody; the folder around it keeps them out.
    """

    def __init__(self, parent: Path = _PARENT) -> None:
        """Make the folder, and remove those of processes that were killed."""
        _remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        draft = self.path / "draft"
        self._lock = draft.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self.path / _LOCK)  # nobody sees the file before it is locked

    @property
    def files(self) -> Path:
        """Where Ray may write."""
        return self.path / "r"

    def remove(self) -> None:
        """Remove the folder with everything in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(parent: Path) -> None:
    for lock_file in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock_file.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_file.parent, ignore_errors=True)
        except OSError:
            continue  # it is in use, somebody else's, or just went
