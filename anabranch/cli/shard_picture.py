"""Where the shards of a request lie, drawn with letters: a line a worker, positions from left to right."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from anabranch.answers import ShardUsage

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green")
_WIDTH = 64


def shard_picture(shards: Sequence[ShardUsage], tokens: int, is_terminal: bool) -> Text:
    """A bar for each worker: filled where it holds positions of 0..`tokens`; without colours, and in plain
    letters, where it is not for a terminal.
    """
    filled, empty = ("█", "·") if is_terminal else ("#", ".")
    workers = sorted({shard.worker_id for shard in shards})
    name_width = max(map(len, workers), default=0)
    picture = Text(f"{'position':<{name_width}}  0{tokens:>{_WIDTH - 1},}\n")
    for index, worker in enumerate(workers):
        own = [shard for shard in shards if shard.worker_id == worker]
        style = _COLOURS[index % len(_COLOURS)] if is_terminal else ""
        picture.append(f"{worker:<{name_width}}  ")
        for column in range(_WIDTH):
            is_held = any(_holds(shard, column * tokens // _WIDTH) for shard in own)
            picture.append(filled if is_held else empty, style if is_held else "dim" if is_terminal else "")
        picture.append(f"  {sum(shard.committed_tokens for shard in own):,} tokens\n")
    return picture


def _holds(shard: ShardUsage, position: int) -> bool:
    return shard.first_position <= position < shard.first_position + shard.committed_tokens
