"""The folder of a private Ray: private, and cleared away when its owner was killed."""

from __future__ import annotations

import stat
from pathlib import Path

from controller.ray_folder import RayFolder


def test_only_the_owner_may_enter(tmp_path: Path) -> None:
    """Whatever rights Ray gives its own folder, nobody else gets that far."""
    folder = RayFolder(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.files.parent == folder.path
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A folder whose lock nobody holds goes with everything in it; one in use stays, and so does what is
    not ours.
    """
    used = RayFolder(tmp_path)
    used.files.mkdir()
    abandoned = tmp_path / "anabranch-ray-abandoned"
    (abandoned / "r").mkdir(parents=True)
    (abandoned / "owner.lock").touch()
    (tmp_path / "anabranch-ray-unmarked").mkdir()
    latest = RayFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {used.path, latest.path, tmp_path / "anabranch-ray-unmarked"}
    assert used.files.is_dir()
    latest.remove()
    used.remove()
