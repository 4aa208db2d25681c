"""A registry whose disk is full: a Redis that appends to a file on a disk of two mebibytes."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.registry.opening import open_registry
from tests.controlled import await_, controlled
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.redis_server import local_redis

pytestmark = [pytest.mark.system, pytest.mark.redis]

NEAR_TIE = 1e-3
PROMPT = random_prompt(30, seed=4)
TOKENS = 24
ROLES = ("attention-0", "dense-0", "gateway-0")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two mebibytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """A file that takes what is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def test_a_full_disk_of_the_registry_stops_nothing(disk: Path, tmp_path: Path) -> None:
    """The registry refuses writes, of members and of blocks: that is logged once, requests are served with
    the reference's tokens, and who leaves is noticed; with room again, who lives is written.
    """
    model = tiny_model(tmp_path / "model", "llama", tokenizer=True)
    reference = reference_tokens(model, [PROMPT], TOKENS)[0]
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with (
        local_redis(disk, options=options) as server,
        controlled(tmp_path, model, server.config()) as cluster,
    ):
        for name in (*ROLES, "attention-1"):
            cluster.launch(name)
        cluster.await_ready(*ROLES, "attention-1")
        registry = open_registry(server.config())
        await_(lambda: len(registry.read().members) == 4)
        filler = _fill(disk)
        cluster.await_logged("controller", '"refuses writes"')
        with cluster.client("gateway-0") as client:
            stream = client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            tokens = [token for event in stream for token in getattr(event, "token_ids", ())]
        for token, expected, gap in zip(tokens, reference.tokens, reference.gaps, strict=True):
            if gap < NEAR_TIE:
                break
            assert token == expected
        cluster.kill("attention-1")
        await_(lambda: set(cluster.epochs()) == set(ROLES))
        assert len(registry.read().members) == 4
        filler.unlink()
        cluster.await_logged("controller", '"registry_up"', times=2)
        await_(lambda: {record.worker for record in registry.read().members} == set(ROLES))
        assert cluster.log("controller").count('"registry_state"') == 1
        assert cluster.log("controller").count('"directory_not_copied"') == 1
        registry.close()
