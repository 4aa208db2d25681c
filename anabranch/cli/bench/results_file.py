"""The file benches write: their results beside each other, with the machine, the date and the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from anabranch.cli.bench.records import Results, records
from cluster.errors import ConfigError

_ROOT = Path(__file__).parents[3]
_LIBRARIES = ("torch", "numpy", "grpcio", "protobuf")


def stamp(results: Results) -> Results:
    """The same results; every record in them tells the commit and the command it comes from."""
    told = {"commit": commit(), "command": command()}
    return dict(_stamped(results, told))


def write(path: Path, results: Results) -> None:
    """Put results into a file, in place of earlier ones of the same bench; those of others stay.

    Raises ConfigError when the file is none of ours, or from another machine: figures of two machines do not
    belong side by side.
    """
    whole = read(path) if path.exists() else {}
    here = machine()
    there = whole.get("machine", here)
    if there != here:
        raise ConfigError(f"{path} was measured on another machine ({there}); write to another file")
    whole |= {"machine": here, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole | results, indent=1) + "\n")


def read(path: Path) -> Results:
    """What a bench wrote. Raises ConfigError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or not any(True for _ in records(found)):
        raise ConfigError(f"{path}: holds no results of `anabranch bench`")
    return found


def machine() -> Results:
    """What the figures depend on and the code does not say."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in _LIBRARIES},
        **_gpu(),
    }


def provenance() -> Results:
    """Where figures come from, now."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "command": command(), "date": date, "machine": machine()}


def commit() -> str:
    """The checkout's commit, with `+` where tracked files differ from it; empty outside a checkout."""
    head = _git("rev-parse", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ran.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> Results:
    """The CUDA device this process has opened, and what compiles for it; nothing where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    triton = importlib.metadata.version("triton")
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton}


def _stamped(value: Any, told: Results) -> Any:
    if isinstance(value, list):
        return [_stamped(item, told) for item in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _stamped(item, told) for key, item in value.items()}
    return inner | told if any(True for name, _ in records(inner) if name == "") else inner
