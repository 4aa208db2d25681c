"""In the image's build: prints what is in it, Debian's and Python's packages, as a CycloneDX document."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any


def main() -> None:
    """Print it; the same image gives the same document."""
    components = sorted([*_debian(), *_python()], key=lambda each: each["purl"])
    document = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    json.dump(document, sys.stdout, indent=1)


def _debian() -> Iterator[dict[str, Any]]:
    asked = ["dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n"]
    listing = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    for name, version, machine in (line.split("\t") for line in listing.splitlines()):
        yield _component(name, version, f"pkg:deb/debian/{name}@{version}?arch={machine}")


def _python() -> Iterator[dict[str, Any]]:
    for each in distributions():
        name = each.metadata["Name"]
        yield _component(name, each.version, f"pkg:pypi/{name.lower().replace('_', '-')}@{each.version}")


def _component(name: str, version: str, url: str) -> dict[str, Any]:
    return {"type": "library", "name": name, "version": version, "purl": url}


if __name__ == "__main__":
    main()
