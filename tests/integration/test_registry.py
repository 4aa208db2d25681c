"""One suite for every registry: in memory, and in a real Redis, plain and with password and TLS."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from cluster.blocks import BlockHash
from cluster.clock import ManualClock
from cluster.errors import ConfigError, Fenced, Unauthenticated, Unavailable
from cluster.policies.directory import HeldBlock, Life
from cluster.registry.embedded import EmbeddedRegistry
from cluster.registry.interface import ControllerRecord, MemberRecord, Registry
from cluster.registry.opening import open_registry
from cluster.registry.settings import RegistryConfig
from cluster.types import Epoch, WorkerId
from tests import certificates
from tests.redis_server import BINARY, MISSING, LocalRedis, any_redis, engine_answers, is_given, local_redis

WRITER = Epoch(0xA)
CONTROLLER = ControllerRecord(WRITER, "127.0.0.1:8600", "wire 2", b"\x00welcome")
DENSE, ATTENTION = WorkerId("dense-0"), WorkerId("attention-0")
HOLDER = Life(ATTENTION, Epoch(5))
LEASE_S = 3600.0
SHORT_S = 0.2
BLOCKS_MOST = 1200
KINDS = ("embedded", *(pytest.param(kind, marks=pytest.mark.redis) for kind in ("redis", "secure")))
LOCAL = pytest.mark.skipif(BINARY is None, reason=MISSING)
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Subject:
    """A registry under test, and how time passes for it."""

    registry: Registry
    wait_until: Callable[[Callable[[], bool]], None]


Make = Callable[[float], Subject]
"""A fresh, empty registry with this lease in seconds."""


def _embedded(lease_s: float) -> Subject:
    clock = ManualClock()

    def wait_until(holds: Callable[[], bool]) -> None:
        for _ in range(10):
            if holds():
                return
            clock.advance(lease_s / 4)
        raise AssertionError("never")

    return Subject(EmbeddedRegistry(lease_s, BLOCKS_MOST, clock), wait_until)


def _wait_until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, "never"
        threading.Event().wait(SHORT_S / 10)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RegistryConfig]]:
    """A Redis of each kind."""
    if BINARY is None and not is_given() and not engine_answers():
        pytest.skip(MISSING)
    with any_redis(tmp_path_factory.mktemp("redis")) as plain:
        if BINARY is None:
            yield {"redis": plain}
            return
        folder = tmp_path_factory.mktemp("secure")
        tls = certificates.authority(folder).tls("redis")
        with local_redis(folder, "se cret:@/", tls) as secure:
            yield {"redis": plain, "secure": secure.config()}


@pytest.fixture(
    params=["embedded", *(pytest.param(kind, marks=pytest.mark.redis) for kind in ("redis", "secure"))]
)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """A registry of each kind; those in Redis under a name of their own."""
    if request.param == "embedded":
        yield _embedded
        return
    servers = request.getfixturevalue("servers")
    if request.param not in servers:
        pytest.skip("a server with password and TLS needs redis-server on this machine")
    opened: list[Registry] = []

    def in_redis(lease_s: float) -> Subject:
        name = f"{request.node.name[:40].translate({91: 46, 93: 46})}{time.monotonic_ns()}"
        config = servers[request.param].model_copy(
            update={"cluster": name, "lease_s": lease_s, "blocks_most": BLOCKS_MOST}
        )
        opened.append(open_registry(config))
        return Subject(opened[-1], _wait_until)

    yield in_redis
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(make: Make) -> Registry:
    """A claimed registry with a long lease."""
    made = make(LEASE_S).registry
    made.claim(CONTROLLER, take_over=True)
    return made


def _member(worker: WorkerId, epoch: int, body: bytes = b"body") -> MemberRecord:
    return MemberRecord(worker, Epoch(epoch), body)


def test_an_empty_registry_knows_nothing(make: Make) -> None:
    """Nobody wrote: version 0, no controller, no members."""
    registry = make(LEASE_S).registry
    assert registry.version() == 0
    view = registry.read()
    assert (view.version, view.controller, view.members, dict(view.past)) == (0, None, (), {})


def test_what_is_published_is_read(registry: Registry) -> None:
    """Members in order of names, byte for byte, with the version and the controller that wrote them."""
    members = (_member(ATTENTION, 2**64 - 1, bytes(range(256))), _member(DENSE, 1, b""))
    assert registry.publish(WRITER, 7, members[::-1], ()) == frozenset()
    view = registry.read()
    assert view.members == members
    assert view.version == registry.version() == 7
    assert view.controller == CONTROLLER


def test_another_life_replaces_the_earlier_one_for_ever(registry: Registry) -> None:
    """One life per worker; the late renewal of the replaced one is refused, and changes nothing."""
    registry.publish(WRITER, 1, [_member(DENSE, 1)], ())
    registry.publish(WRITER, 2, [_member(DENSE, 2, b"new")], ())
    late = [_member(DENSE, 1), _member(ATTENTION, 5)]
    assert registry.publish(WRITER, 3, late, ()) == {DENSE}
    view = registry.read()
    assert view.members == (_member(ATTENTION, 5), _member(DENSE, 2, b"new"))
    assert view.past[DENSE] == (1,)


def test_a_life_that_is_gone_stays_gone(registry: Registry) -> None:
    """Who left cannot renew; that a replaced life is gone does not touch its successor."""
    registry.publish(WRITER, 1, [_member(DENSE, 1), _member(ATTENTION, 3)], ())
    registry.publish(WRITER, 2, [_member(DENSE, 2)], [(ATTENTION, Epoch(3))])
    registry.publish(WRITER, 3, (), [(DENSE, Epoch(1))])
    assert registry.publish(WRITER, 4, [_member(ATTENTION, 3)], ()) == {ATTENTION}
    assert registry.read().members == (_member(DENSE, 2),)


def test_leases_run_out_and_are_renewed(make: Make) -> None:
    """Who is written again stays; who is not is forgotten after the lease, and the controller with it."""
    subject = make(SHORT_S)
    registry = subject.registry
    registry.claim(CONTROLLER, take_over=True)
    registry.publish(WRITER, 1, [_member(DENSE, 1), _member(ATTENTION, 2)], ())

    def only_dense_is_left() -> bool:
        registry.claim(CONTROLLER, take_over=True)
        registry.publish(WRITER, 2, [_member(DENSE, 1)], ())
        return registry.read().members == (_member(DENSE, 1),)

    subject.wait_until(only_dense_is_left)
    subject.wait_until(lambda: registry.read().members == () and registry.read().controller is None)
    subject.wait_until(lambda: registry.version() == 0)


def test_only_the_controller_that_claimed_last_writes(registry: Registry) -> None:
    """A second controller takes over; what the first writes afterwards is refused, whatever it is."""
    registry.publish(WRITER, 1, [_member(DENSE, 1)], ())
    successor = ControllerRecord(Epoch(0xB), "127.0.0.2:8600", "wire 2", b"")
    with pytest.raises(Fenced):
        registry.claim(successor, take_over=False)
    registry.claim(successor, take_over=True)
    for write in (
        lambda: registry.claim(CONTROLLER, take_over=False),
        lambda: registry.publish(WRITER, 2, (), [(DENSE, Epoch(1))]),
    ):
        with pytest.raises(Fenced):
            write()
    view = registry.read()
    assert (view.controller, view.version, view.members) == (successor, 1, (_member(DENSE, 1),))


def test_nobody_writes_before_a_claim(make: Make) -> None:
    """Without a controller nothing is taken: a Redis that lost its memory is claimed again first."""
    with pytest.raises(Fenced):
        make(LEASE_S).registry.publish(WRITER, 1, [_member(DENSE, 1)], ())


def test_thousands_of_members(registry: Registry) -> None:
    """What takes more than one call is written and read as a whole."""
    members = [_member(WorkerId(f"attention-{index:04}"), index + 1) for index in range(1201)]
    registry.publish(WRITER, 5, members, ())
    assert registry.read().members == tuple(members)
    assert registry.version() == 5


def _block(number: int, *holders: Life) -> HeldBlock:
    """The block with so many before it in one chain; held by one worker where nothing is said."""
    return HeldBlock(BlockHash(number.to_bytes(32, "big")), number + 1, holders or (HOLDER,))


def _gone(number: int) -> HeldBlock:
    return _block(number)._replace(holders=())


def _identities(*numbers: int) -> list[BlockHash]:
    return [_block(number).identity for number in numbers]


def test_an_empty_registry_keeps_no_block(make: Make) -> None:
    """Nothing is found, nothing read, and to ask for nothing is no error."""
    registry = make(LEASE_S).registry
    assert registry.find_blocks(_identities(0, 1)) == registry.find_blocks([]) == []
    assert list(chain.from_iterable(registry.read_blocks())) == []


def test_blocks_are_found_up_to_the_first_that_is_missing(registry: Registry) -> None:
    """Identity, length and holders, in the order asked for; holders in the order written, whatever their
    names and lives. Members are not touched.
    """
    holders = (Life(WorkerId("wörker 1"), Epoch(2**64 - 1)), Life(WorkerId(""), Epoch(1)), HOLDER)
    registry.publish(WRITER, 3, [_member(DENSE, 1)], ())
    assert registry.publish_blocks(WRITER, [_block(0), _block(1, *holders), _block(3)]) == 3
    assert registry.find_blocks(_identities(0, 1, 2, 3)) == [_block(0), _block(1, *holders)]
    assert registry.find_blocks(_identities(3)) == [_block(3)]
    assert registry.find_blocks(_identities(2, 3)) == []
    assert registry.read().members == (_member(DENSE, 1),)


def test_blocks_change_go_and_start_over(registry: Registry) -> None:
    """The last word on a block holds; one that nobody holds is gone, also if it never was there; what starts
    over leaves nothing of before.
    """
    registry.publish_blocks(WRITER, [_block(0), _block(1), _block(2)])
    other = Life(ATTENTION, Epoch(9))
    assert registry.publish_blocks(WRITER, [_block(0, HOLDER, other), _gone(1), _gone(7)]) == 2
    kept = sorted(chain.from_iterable(registry.read_blocks()))
    assert kept == [_block(0, HOLDER, other), _block(2)]
    assert registry.publish_blocks(WRITER, [_block(5)], starts_over=True) == 1
    assert list(chain.from_iterable(registry.read_blocks())) == [_block(5)]
    assert registry.publish_blocks(WRITER, (), starts_over=True) == 0
    assert list(chain.from_iterable(registry.read_blocks())) == []


def test_no_more_blocks_than_there_is_place_for(registry: Registry) -> None:
    """What takes more than one call is written and read as a whole; beyond the limit new blocks are left out,
    those that are there still change, and one that goes makes place.
    """
    blocks = [_block(number) for number in range(BLOCKS_MOST + 100)]
    assert registry.publish_blocks(WRITER, blocks) == BLOCKS_MOST
    read = sorted({block for part in registry.read_blocks() for block in part})
    assert read == registry.find_blocks([block.identity for block in blocks]) == blocks[:BLOCKS_MOST]
    changed = _block(3, Life(ATTENTION, Epoch(9)))
    assert registry.publish_blocks(WRITER, [changed]) == BLOCKS_MOST
    assert registry.find_blocks([changed.identity]) == [changed]
    assert registry.publish_blocks(WRITER, [_gone(3), blocks[-1], blocks[-2]]) == BLOCKS_MOST
    assert registry.find_blocks([blocks[-1].identity]) == [blocks[-1]]
    assert registry.find_blocks([blocks[-2].identity]) == []


def test_only_the_controller_that_claimed_last_writes_blocks(make: Make) -> None:
    """Neither before a claim, nor after another controller took over, be it only to empty them."""
    registry = make(LEASE_S).registry
    with pytest.raises(Fenced):
        registry.publish_blocks(WRITER, [_block(0)])
    registry.claim(CONTROLLER, take_over=True)
    registry.publish_blocks(WRITER, [_block(0)])
    registry.claim(ControllerRecord(Epoch(0xB), "127.0.0.2:8600", "wire 2", b""), take_over=True)
    for blocks, starts_over in (([_gone(0)], False), ([], True)):
        with pytest.raises(Fenced):
            registry.publish_blocks(WRITER, blocks, starts_over=starts_over)
    assert registry.find_blocks(_identities(0)) == [_block(0)]


def test_the_lease_of_all_blocks_is_renewed_at_once(make: Make) -> None:
    """Blocks stay while any is written, or none; without that all are forgotten after the lease."""
    subject = make(SHORT_S)
    registry = subject.registry
    registry.claim(CONTROLLER, take_over=True)
    registry.publish_blocks(WRITER, [_block(0)])
    registry.publish(WRITER, 1, [_member(DENSE, 1)], ())

    def only_blocks_are_left() -> bool:
        registry.claim(CONTROLLER, take_over=True)
        assert registry.publish_blocks(WRITER, ()) == 1
        return registry.read().members == ()

    subject.wait_until(only_blocks_are_left)
    assert registry.find_blocks(_identities(0)) == [_block(0)]
    subject.wait_until(lambda: registry.find_blocks(_identities(0)) == [])
    assert list(chain.from_iterable(registry.read_blocks())) == []


@pytest.mark.redis
@LOCAL
def test_every_key_has_a_time_to_live_and_the_clusters_name(tmp_path: Path) -> None:
    """Nothing is left for ever in a Redis that others use too, and two clusters do not meet."""
    with local_redis(tmp_path) as server, server.client() as client:
        for name in ("one", "two"):
            registry = open_registry(server.config(cluster=name))
            registry.claim(CONTROLLER, take_over=True)
            registry.publish(WRITER, 1, [_member(DENSE, 1)], ())
            registry.publish(WRITER, 2, [_member(DENSE, 2), _member(ATTENTION, 1)], ())
            registry.publish(WRITER, 3, (), [(ATTENTION, Epoch(1))])
            registry.publish_blocks(WRITER, [_block(0)])
            assert registry.read().version == 3
            registry.close()
        keys = [key.decode(errors="replace") for key in client.scan_iter()]
        assert {key.split("}")[0] for key in keys} == {"anabranch:1:{one", "anabranch:1:{two"}
        assert len(keys) >= 2 * 7
        assert [key for key in client.scan_iter() if client.pttl(key) <= 0] == []


@pytest.mark.redis
@LOCAL
def test_a_wrong_password_is_named_but_not_shown(tmp_path: Path) -> None:
    """The error says who refuses; neither it nor the configuration holds a password, right or wrong."""
    with local_redis(tmp_path, password="right-secret") as server:
        (tmp_path / "wrong").write_text("wrong-secret")
        config = server.config(password_file=str(tmp_path / "wrong"))
        for refused in (config, server.config(password_file=None)):
            registry = open_registry(refused)
            with pytest.raises(Unauthenticated, match=f"127.0.0.1:{server.port}") as raised:
                registry.read()
            registry.close()
            told = f"{raised.value.message} {refused!r} {refused.model_dump_json()} {registry!r}"
            assert "secret" not in told


@pytest.mark.redis
@LOCAL
def test_the_password_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that the configuration names is read where the process runs."""
    monkeypatch.setenv("REGISTRY_PASSWORD_OF_THIS_TEST", "right-secret")
    with local_redis(tmp_path, password="right-secret") as server:
        registry = open_registry(
            server.config(password_file=None, password_variable="REGISTRY_PASSWORD_OF_THIS_TEST")
        )
        assert registry.version() == 0
        registry.close()


@pytest.mark.redis
@LOCAL
def test_a_server_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    """With TLS a certificate of another authority is no registry."""
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    tls = certificates.authority(tmp_path / "theirs").tls("redis")
    certificates.authority(tmp_path / "ours")
    with local_redis(tmp_path, tls=tls) as server:
        registry = open_registry(server.config(authority=str(tmp_path / "ours" / "authority.pem")))
        with pytest.raises(Unavailable, match="certificate"):
            registry.read()
        registry.close()


def test_a_server_that_is_not_there_is_away(tmp_path: Path) -> None:
    """Nobody listens: Unavailable, at once, naming the place."""
    registry = open_registry(LocalRedis(tmp_path, port=1).config())
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        registry.version()
    registry.close()


def test_a_password_file_that_is_missing_is_named(tmp_path: Path) -> None:
    """ConfigError with key and path, before anything is connected."""
    with pytest.raises(ConfigError, match=r"registry\.password_file: .*nowhere"):
        open_registry(LocalRedis(tmp_path, port=1).config(password_file=str(tmp_path / "nowhere")))
