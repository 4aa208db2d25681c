"""`python requirements.py VARIANT TORCH_VERSION`, in the image's build: what pip installs before the program.

Read from the pyproject.toml beside this file. `cpu` asks for PyTorch's CPU build, `cuda` for the one that
needs a driver and brings the rest along.
"""

import sys
import tomllib
from pathlib import Path

_EXTRAS = ("convert", "kuberay", "kubernetes", "redis")
_BESIDE = ("pip",)
"""`anabranch model fetch` downloads with it."""


def main(variant: str, torch_version: str) -> None:
    """Print one requirement per line."""
    local = {"cpu": "+cpu", "cuda": ""}
    if variant not in local:
        sys.exit(f"VARIANT is cpu or cuda, not {variant!r}")
    project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())["project"]
    extras = [line for name in _EXTRAS for line in project["optional-dependencies"][name]]
    torch = f"torch=={torch_version}{local[variant]}"
    lines = [torch, *project["dependencies"], *extras, *_BESIDE]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
