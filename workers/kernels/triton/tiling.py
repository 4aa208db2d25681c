"""How work is cut for the device: sizes of tiles, and how many programs to cut a batch into.

The numbers are the best of a sweep on an H100: those whose slowest reading of 4 GiB of cache is fastest, over
head sizes 64 and 128, groups of 1 to 8, contexts of 32k to 256k tokens; and those of a chunk of 4,096 rows.
"""

from __future__ import annotations

import functools

import torch

ROWS_FEW = 16
"""Packed rows of a decoding tile: the least a tensor core takes."""

ROWS_MANY = 64
"""Packed rows of a chunk's tile."""

SPLIT_SLOTS_LEAST = 256
"""Slots a program attends at least: below, its start costs more than it saves."""

_TILE_BYTES = 8 * 2**10
"""Of the keys, or the values, a program holds at once."""

_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 4


def padded(head_size: int) -> int:
    """The power of two a head is computed in."""
    return max(16, 1 << (head_size - 1).bit_length())


def rows_of(packed_rows: int) -> int:
    """Packed rows per tile of a span that has so many."""
    return ROWS_FEW if packed_rows <= ROWS_FEW else ROWS_MANY


def slots_of(head_size: int, element_bytes: int) -> int:
    """Slots a program reads at once."""
    return min(128, max(16, _TILE_BYTES // (padded(head_size) * element_bytes)))


def warps_of(rows: int) -> int:
    """Warps per program."""
    return 2 if rows == ROWS_FEW else 4


def stages_of(rows: int) -> int:
    """Tiles of slots on their way at once: chunks hide more arithmetic, decoding has more programs."""
    return 2 if rows == ROWS_FEW else 3


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """Programs that fill the device."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def split_slots(work_slots: int, programs: int, least: int, step: int) -> int:
    """Slots per split, at least `least` and a multiple of `step`, so that `work_slots`, those of all tiles
    and KV heads, make about `programs` programs.
    """
    wanted = max(least, -(-work_slots // programs))
    return -(-wanted // step) * step
