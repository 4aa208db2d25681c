"""The picture of a request's shards: a bar a worker, readable without colours."""

from __future__ import annotations

from anabranch.answers import ShardUsage
from anabranch.cli.shard_picture import shard_picture


def usage(worker: str, first: int, end: int) -> ShardUsage:
    """A shard that is full."""
    return ShardUsage(0, worker, 1, first, end, end - first, 1, 1)


def test_each_position_is_drawn_at_its_worker() -> None:
    """Two halves: each worker's bar is filled where it holds something, and nowhere else; no escape codes."""
    shards = [usage("attention-0", 0, 500), usage("attention-1", 500, 1000)]
    lines = shard_picture(shards, 1000, is_terminal=False).plain.splitlines()
    assert lines[1:] == [
        f"attention-0  {'#' * 32}{'.' * 32}  500 tokens",
        f"attention-1  {'.' * 32}{'#' * 32}  500 tokens",
    ]
    assert lines[0].endswith("1,000")


def test_a_terminal_sees_colours() -> None:
    """On a terminal every worker's part has a colour of its own."""
    shards = [usage("attention-0", 0, 500), usage("attention-1", 500, 1000)]
    picture = shard_picture(shards, 1000, is_terminal=True)
    styles = {str(span.style) for span in picture.spans} - {"dim"}
    assert len(styles) == 2
