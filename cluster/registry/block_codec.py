"""How the shared registry writes down who holds a block. Pure.

    length of the prefix in blocks (4 bytes), then for each holder: epoch (8), bytes of its name (4), name

Little-endian. With the identity, 32 bytes, that is some sixty bytes a block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache

from cluster.blocks import BlockHash
from cluster.errors import Internal
from cluster.policies.directory import HeldBlock, Life
from cluster.types import Epoch, WorkerId

_LENGTH = struct.Struct("<I")
_HOLDER = struct.Struct("<QI")
_COMBINATIONS_MOST = 8192
"""Holders remembered in both forms: many blocks have the same, mostly one of them."""


def pack(block: HeldBlock) -> bytes:
    """What is kept beside the identity; nothing for a block that nobody holds."""
    return _LENGTH.pack(block.prefix_blocks) + _packed(block.holders) if block.holders else b""


def unpack(identity: BlockHash, held: bytes) -> HeldBlock:
    """The block again. Raises Internal for what `pack` did not write."""
    try:
        (prefix_blocks,) = _LENGTH.unpack_from(held)
        return HeldBlock(identity, prefix_blocks, _unpacked(held[_LENGTH.size :]))
    except (struct.error, UnicodeDecodeError) as error:
        raise Internal("the registry names a block's holders in a form unknown here") from error


@lru_cache(_COMBINATIONS_MOST)
def _packed(holders: tuple[Life, ...]) -> bytes:
    names = [life.worker.encode() for life in holders]
    parts = zip(holders, names, strict=True)
    return b"".join(_HOLDER.pack(life.epoch, len(name)) + name for life, name in parts)


@lru_cache(_COMBINATIONS_MOST)
def _unpacked(held: bytes) -> tuple[Life, ...]:
    return tuple(_lives(held))


def _lives(held: bytes) -> Iterator[Life]:
    at = 0
    while at < len(held):
        epoch, size = _HOLDER.unpack_from(held, at)
        at += _HOLDER.size + size
        yield Life(WorkerId(held[at - size : at].decode()), Epoch(epoch))
