"""Half-open ranges of token positions: (first, end), sorted by first, disjoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import inf

Range = tuple[int, int]


def join(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same positions as the fewest ranges: touching and overlapping ones become one."""
    joined: list[Range] = []
    for first, end in sorted(ranges):
        assert first <= end, (first, end)
        if first == end:
            continue
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return tuple(joined)


def subtract(ranges: Sequence[Range], removed: Iterable[Range]) -> tuple[Range, ...]:
    """`ranges` without the positions of `removed`; edges between touching ranges stay."""
    left = list(ranges)
    for gone_first, gone_end in removed:
        pieces = [
            piece
            for first, end in left
            for piece in ((first, min(end, gone_first)), (max(first, gone_end), end))
            if piece[0] < piece[1]
        ]
        left = pieces if gone_first < gone_end else left
    return tuple(left)


def end_of_room(ranges: Sequence[Range], position: int) -> int:
    """End of the range that contains `position`; `position` itself if none does."""
    index = bisect_right(ranges, (position, inf)) - 1
    return max(position, ranges[index][1]) if index >= 0 else position


def first_gap(ranges: Sequence[Range], first: int, end: int) -> Range | None:
    """The first run of positions in first..end that no range contains, or None."""
    while first < end:
        index = bisect_right(ranges, (first, inf))
        covered = ranges[index - 1][1] if index else first
        if covered <= first:
            return first, min(end, ranges[index][0]) if index < len(ranges) else end
        first = covered
    return None


def insert(ranges: Sequence[Range], added: Range) -> tuple[Range, ...]:
    """`ranges` with `added`, which swallows those it contains and must not cut another."""
    first, end = added
    kept = [item for item in ranges if not (first <= item[0] and item[1] <= end)]
    assert all(item[1] <= first or end <= item[0] for item in kept), (ranges, added)
    return tuple(sorted([*kept, added]))
