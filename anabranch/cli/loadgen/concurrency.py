"""Lists of numbers on a command line."""

from __future__ import annotations

from cluster.errors import InvalidRequest


def numbers(text: str, option: str = "--concurrency") -> tuple[int, ...]:
    """`1,4,16`. Raises InvalidRequest for what is no list of whole numbers."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise InvalidRequest(f"{option} {text!r} is no list of numbers, like 1,4,16") from error


def rates(text: str) -> tuple[float, ...]:
    """`0.5,1,2`. Raises InvalidRequest for what is no list of numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError as error:
        raise InvalidRequest(f"--rates {text!r} is no list of numbers, like 0.5,1,2") from error
