"""The identities of a sequence's blocks, which grow with its tokens. The pool's threads only read them."""

from __future__ import annotations

from collections.abc import Sequence

from cluster import blocks
from cluster.blocks import BlockHash
from cluster.types import KvGeometry
from workers.peer import ShardPrefix


class BlockChain:
    """The identities of one sequence's full blocks. Only grows, since a sequence's tokens only do."""

    def __init__(self, geometry: KvGeometry, tenant: str) -> None:
        self.block_tokens = geometry.block_tokens
        self.hashes: list[BlockHash] = []
        self._tenant = tenant
        self._root = blocks.root(geometry, tenant)

    def grow(self, token_ids: Sequence[int]) -> None:
        """Identities of the full blocks of `token_ids`, the sequence's from position 0 on."""
        known = len(self.hashes) * self.block_tokens
        parent = self.hashes[-1] if self.hashes else self._root
        self.hashes += blocks.chain(parent, token_ids[known:], self.block_tokens)

    def begin_as(self, other: BlockChain, tokens: int) -> None:
        """The first `tokens` are those of another chain of the same tenant: its identities are known here."""
        if not self.hashes and other._root == self._root:
            self.hashes = other.hashes[: tokens // self.block_tokens]

    def prefix(self, first: int) -> ShardPrefix:
        """What a worker needs to publish a shard that begins at `first`."""
        index, offset = divmod(first, self.block_tokens)
        is_known = offset == 0 and 0 < index <= len(self.hashes)
        return ShardPrefix(self._tenant, self.hashes[index - 1] if is_known else None)
