"""The kinds of values that the configuration file has."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_TEXT = rf"^\d+(\.\d+)? *({'|'.join(filter(None, _UNITS))})?$"


def parse_bytes(value: object) -> object:
    """`"512MiB"`, `"2GB"` to an integer of bytes; integers pass; anything else is left for the validator."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"a size such as 512MiB or 2GB is expected; units: {', '.join(filter(None, _UNITS))}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _TEXT}]}),
]
Port = Annotated[int, Field(ge=0, le=65535)]
Device = Literal["cpu", "cuda"]
Cores = Literal["auto"] | tuple[Annotated[int, Field(ge=0)], ...]
Serves = Literal["both", "prefill", "decode"]
