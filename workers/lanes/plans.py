"""A step's rows as a difference from the last step's, and back.

Decoding moves most rows on by one token and changes nothing else, so a difference is a fraction of the
plan. Each side keeps one base per micro-batch; where the bases differ the receiver answers NeedFull, the
sender calls `PlanEncoder.forget` and sends the same layer again: the plan is then whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidRequest, NeedFull
from cluster.types import ShardId
from workers.lanes.messages import PlanRow, StepPlanDifference

MICRO_BATCHES_MOST = 16
"""Micro-batches a lane knows; each has a base plan on both sides and a reply buffer on the dense side."""

Rows = tuple[PlanRow, ...]


def advance(row: PlanRow, token_ids: tuple[int, ...]) -> PlanRow:
    """The row after its chunk: start and, for a tail, visible_end move on by its count.

    Raises InvalidRequest when a tail gets no token or another shard gets some.
    """
    if bool(row.token_ids) != bool(token_ids):
        raise InvalidRequest(f"shard {row.shard}: only a tail advances with token ids")
    return PlanRow(
        shard=row.shard,
        generation=row.generation,
        start=row.start + row.count,
        count=len(token_ids) or row.count,
        visible_first=row.visible_first,
        visible_end=row.visible_end + (row.count if token_ids else 0),
        token_ids=token_ids,
    )


class PlanEncoder:
    """The dense side's memory of what each micro-batch's attention worker was last told."""

    def __init__(self) -> None:
        self._bases: dict[int, tuple[int, Rows]] = {}

    def encode(self, step: int, micro_batch: int, rows: Sequence[PlanRow]) -> StepPlanDifference:
        """The rows of a step, at most one per shard, relative to the last encoded step if one is known."""
        new = tuple(rows)
        base = self._bases.get(micro_batch)
        self._bases[micro_batch] = (step, new)
        if base is None:
            return _whole(step, new)
        return _difference(step, base, new) or _whole(step, new)

    def forget(self, micro_batch: int) -> None:
        """Send the next plan whole: the receiver answered NeedFull, or the lane is new."""
        self._bases.pop(micro_batch, None)


class PlanDecoder:
    """The attention side's memory of the last plan of each micro-batch of one lane."""

    def __init__(self) -> None:
        self._bases: dict[int, tuple[int, Rows]] = {}

    def decode(self, micro_batch: int, difference: StepPlanDifference) -> Rows:
        """The rows in order. Raises NeedFull when the base is not the last plan of this micro-batch,
        InvalidRequest when the difference does not fit its base; either leaves the base as it was.
        """
        if not 0 <= micro_batch < MICRO_BATCHES_MOST:
            raise InvalidRequest(f"micro-batch {micro_batch} of at most {MICRO_BATCHES_MOST}")
        if difference.base_step is None:
            base: Rows = ()
        else:
            base_step, base = self._bases.get(micro_batch, (None, ()))
            if base_step != difference.base_step:
                raise NeedFull(
                    f"micro-batch {micro_batch} stands at step {base_step}, not {difference.base_step}"
                )
        rows = _apply(base, difference)
        self._bases[micro_batch] = (difference.step, rows)
        return rows


def _whole(step: int, rows: Rows) -> StepPlanDifference:
    return StepPlanDifference(step, None, (), (), rows)


def _difference(step: int, base: tuple[int, Rows], new: Rows) -> StepPlanDifference | None:
    """None where the kept rows change their order, which a difference cannot say."""
    base_step, base_rows = base
    old = {row.shard: row for row in base_rows}
    shards = {row.shard for row in new}
    kept = [row.shard for row in base_rows if row.shard in shards]
    if kept != [row.shard for row in new[: len(kept)]]:
        return None
    advanced: list[tuple[ShardId, tuple[int, ...]]] = []
    changed: list[PlanRow] = []
    for row in new:
        before = old.get(row.shard)
        if before is None:
            changed.append(row)
        elif row != before:
            if bool(row.token_ids) == bool(before.token_ids) and row == advance(before, row.token_ids):
                advanced.append((row.shard, row.token_ids))
            else:
                changed.append(row)
    removed = tuple(shard for shard in old if shard not in shards)
    return StepPlanDifference(step, base_step, removed, tuple(advanced), tuple(changed))


def _apply(base: Rows, difference: StepPlanDifference) -> Rows:
    rows = {row.shard: row for row in base}
    named = [*difference.removed, *(shard for shard, _ in difference.advanced)]
    touched = [*named, *(row.shard for row in difference.changed)]
    if len(set(touched)) != len(touched) or not rows.keys() >= set(named):
        raise InvalidRequest("a plan difference names a shard twice, or one its base lacks")
    for shard in difference.removed:
        del rows[shard]
    for shard, token_ids in difference.advanced:
        rows[shard] = advance(rows[shard], token_ids)
    for row in difference.changed:
        rows[row.shard] = row
    return tuple(rows.values())
