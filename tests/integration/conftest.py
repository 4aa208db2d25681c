"""A Redis of a test's own, and controllers that write to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import LocalRedis, local_redis
from tests.registry_controller import Controller


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalRedis]:
    """A Redis of the test's own."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with local_redis(folder) as server:
        yield server


@pytest.fixture
def controllers(server: LocalRedis) -> Iterator[list[Controller]]:
    """Controllers, whose connections are closed at the end."""
    made: list[Controller] = []
    yield made
    for controller in made:
        controller.writer.close()
