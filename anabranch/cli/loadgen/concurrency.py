"""Lists of numbers on a command line."""

from __future__ import annotations

from cluster.errors import InvalidRequest


def numbers(text: str) -> tuple[int, ...]:
    """`1,4,16`. Raises InvalidRequest for what is no list of numbers."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise InvalidRequest(f"--concurrency {text!r} is no list of numbers, like 1,4,16") from error
