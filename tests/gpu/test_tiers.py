"""One attention worker with an arena on the device and one in host memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiers import assert_moves_both_ways, model_of_long_sequences


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_blocks_move_between_device_and_host_while_decoding(tmp_path: Path) -> None:
    """What does not fit the device's arena lies on the host, in the same process; blocks go down and up
    again, and the tokens are transformers'.
    """
    model = model_of_long_sequences(tmp_path / "model")
    assert_moves_both_ways(model, tmp_path, "cuda", **{"controller.expiry_ms": 20_000})
