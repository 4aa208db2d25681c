"""How the user calls this program, for messages that say what to type next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

_NAME = "anabranch"


def invocation() -> str:
    """`anabranch` where the shell finds this one, else its path, from here where that is shorter."""
    own = Path(sys.argv[0])
    if own.name != _NAME:
        return f"{sys.executable} -m anabranch.cli"
    found = shutil.which(_NAME)
    if found is not None and Path(found).resolve() == own.resolve():
        return _NAME
    absolute, here = own.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
