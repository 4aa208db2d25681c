"""Attention on another host: network namespaces, real processes, real TCP."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import reference_tokens, tiny_model
from tests.system.hosts import Host, network
from tests.system.two_hosts import PROMPT, TOKENS

pytestmark = pytest.mark.system

NEAR_TIE = 1e-3


@pytest.fixture
def hosts() -> Iterator[tuple[Host, ...]]:
    """Two hosts on a bridge."""
    with network(2) as made:
        yield made


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_attention_on_another_host_gives_the_same_tokens(
    hosts: tuple[Host, ...], tmp_path: Path, transport: str
) -> None:
    """Over a lane between two hosts every token is the reference's, and the far host holds the cache."""
    near, far = hosts
    model = tiny_model(tmp_path / "model", "llama", tokenizer=True)
    command = [sys.executable, "-m", "tests.system.two_hosts", str(model), str(tmp_path), transport]
    command += [near.address, far.namespace, far.address]
    driver = near.start(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=str(Path(__file__).parents[2]),
        env=os.environ,
    )
    try:
        output, _ = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 0, output.decode()[-4000:]
    said = json.loads(output.decode().splitlines()[-1])
    assert said["holders"] == ["attention-0"]
    reference = reference_tokens(model, [PROMPT], TOKENS)[0]
    for token, expected, gap in zip(said["tokens"], reference.tokens, reference.gaps, strict=True):
        if gap < NEAR_TIE:
            break
        assert token == expected
