"""What a reply may take: in proportion to the work, and never for longer than minutes."""

from __future__ import annotations

import pytest

from cluster.config import LaneConfig
from workers.dense.lane_set import LaneSet


@pytest.mark.parametrize(
    ("floor_ms", "predicted_s", "allowance_ms"),
    [
        (2000, 0.0, 2000),
        (2000, 0.5, 7000),
        # 256 rows over a quarter of a million tokens, 9 heads of 64: 155 s at the rate of a slow core.
        (2000, 155.0, 182_000),
        (2000, 1e9, 182_000),
        # As configured, but what 32 bits hold, and not for days.
        (2**40, 0.0, 600_000),
    ],
)
def test_a_reply_has_minutes_at_most(floor_ms: int, predicted_s: float, allowance_ms: int) -> None:
    """The floor and ten times the prediction, up to bounds that end a worker which hangs."""
    lanes = LaneSet(LaneConfig(deadline_floor_ms=floor_ms))
    assert lanes.allowance_ms(predicted_s) == allowance_ms
