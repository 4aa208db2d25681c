"""Identities of sealed blocks: a chain of hashes, so that equal identity means an equal prefix.

SHA-256 over (parent, token ids); the root of a chain covers tenant, block size, element type, model, RoPE and
layout version. KV under one identity is equal up to rounding, whoever computed it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NewType

import numpy as np

from cluster.types import LAYOUT_VERSION, KvGeometry

BlockHash = NewType("BlockHash", bytes)
"""`HASH_BYTES` long; the identity of a block, and so of everything before it."""

HASH_BYTES = 32
HASHES_MOST = 8192
"""Blocks asked for in one `FindPrefix`: a prefix of 262,144 tokens in blocks of 32."""


def root(geometry: KvGeometry, tenant: str) -> BlockHash:
    """The parent of every first block of a tenant: nothing is shared across tenants, models or layouts."""
    shape = (geometry.layers, geometry.kv_heads, geometry.head_size, geometry.block_tokens)
    text = f"anabranch {LAYOUT_VERSION} {geometry.dtype} {shape} {geometry.digest} {len(tenant)}:{tenant}"
    return BlockHash(hashlib.sha256(text.encode()).digest())


def child(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The identity of a full block of `token_ids` behind `parent`."""
    return BlockHash(hashlib.sha256(parent + np.asarray(token_ids, dtype="<u4").tobytes()).digest())


def chain(parent: BlockHash, token_ids: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """The identities of the full blocks of `token_ids`, which begin behind `parent`."""
    hashes: list[BlockHash] = []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = child(parent, token_ids[start : start + block_tokens])
        hashes.append(parent)
    return hashes
