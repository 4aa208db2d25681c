"""Real processes: registry or controller stopped under load, and what new processes find meanwhile."""

import itertools
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from anabranch import Client
from cluster.registry.interface import ControllerRecord, MemberRecord
from cluster.registry.opening import open_registry
from cluster.types import Epoch, WorkerId
from tests.controlled import JOINING, ControlledCluster, await_, controlled
from tests.integration.clusters import configured, joining, running
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.redis_server import BINARY, MISSING, LocalRedis, free_port

pytestmark = [pytest.mark.system, pytest.mark.redis, pytest.mark.skipif(BINARY is None, reason=MISSING)]

NEAR_TIE = 1e-3
PROMPT = random_prompt(40, seed=3)
TOKENS = 160
ROLES = ("attention-0", "dense-0", "gateway-0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    """What transformers says after the prompt."""
    return reference_tokens(model, [PROMPT], TOKENS)[0]


def _assert_same(tokens: Sequence[int], reference: Reference) -> None:
    """Token for token up to the first near-tie."""
    assert len(tokens) == TOKENS
    for index, (token, expected, gap) in enumerate(
        zip(tokens, reference.tokens, reference.gaps, strict=True)
    ):
        if gap < NEAR_TIE:
            return
        assert token == expected, f"token {index}"


def _generate(client: Client, then: Callable[[], None] = lambda: None) -> list[int]:
    """All tokens; `then` is called once, when some have come."""
    tokens: list[int] = []
    for event in client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True):
        before = len(tokens)
        tokens += getattr(event, "token_ids", ())
        if before < 4 <= len(tokens):
            then()
    return tokens


def _joined(cluster: ControlledCluster) -> dict[str, int]:
    """Three processes that only join; returns their lives."""
    for name in ROLES:
        cluster.launch(name, JOINING)
    cluster.await_ready(*ROLES)
    return cluster.epochs()


@pytest.mark.parametrize("how", ["frozen", pytest.param("killed", marks=pytest.mark.system)])
def test_a_registry_that_stops_changes_no_token(
    model: Path, reference: Reference, tmp_path: Path, server: LocalRedis, how: str
) -> None:
    """SIGSTOP or SIGKILL of Redis in the middle of a stream: its tokens and those of a new request are the
    reference's, nobody leaves; when Redis is back, empty or not, it holds everybody again.
    """
    with controlled(tmp_path, model, server.config()) as cluster:
        for name in ROLES:
            cluster.launch(name)
        cluster.await_ready(*ROLES)
        lives = cluster.epochs()

        def stop() -> None:
            if how == "frozen":
                server.signal(signal.SIGSTOP)
            else:
                server.kill()

        with cluster.client("gateway-0") as client:
            _assert_same(_generate(client, stop), reference)
            cluster.await_logged("controller", '"registry_state"')
            _assert_same(_generate(client), reference)
        assert cluster.epochs() == lives
        if how == "frozen":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        cluster.await_logged("controller", '"registry_up"', times=2)
        assert cluster.log("controller").count('"registry_state"') == 1
        assert {name.decode() for name in _names(server)} == set(ROLES)


def _names(server: LocalRedis) -> set[bytes]:
    with server.client() as client:
        return {key.rpartition(b":")[2] for key in client.scan_iter(match="*:member:*")}


def _looks(cluster: ControlledCluster, count: int) -> list[dict[str, int]]:
    """Who lived at each of so many looks, one after the other."""
    seen: list[dict[str, int]] = []

    def look() -> bool:
        seen.append(cluster.epochs())
        return len(seen) >= count

    await_(look)
    return seen


def test_nobody_is_taken_for_dead_while_the_registry_is_away(
    model: Path, tmp_path: Path, server: LocalRedis
) -> None:
    """A member silent for three times the expiry stays while Redis is frozen, and leaves afterwards."""
    with controlled(tmp_path, model, server.config()) as cluster:
        _joined(cluster)
        server.signal(signal.SIGSTOP)
        cluster.await_logged("controller", '"registry_state"')
        cluster.signal("dense-0", signal.SIGSTOP)
        assert all(set(each) == set(ROLES) for each in _looks(cluster, 150))
        server.signal(signal.SIGCONT)
        await_(lambda: "dense-0" not in cluster.epochs())


def test_a_restarted_controller_knows_who_lived(model: Path, tmp_path: Path, server: LocalRedis) -> None:
    """SIGKILL of the controller: the next one names the same ids and epochs before any of them spoke to it,
    waits longer than the expiry for them, and then hears from the same processes.
    """
    with controlled(tmp_path, model, server.config()) as cluster:
        lives = _joined(cluster)
        await_(lambda: _names(server) == {name.encode() for name in ROLES})
        for name in ROLES:
            cluster.signal(name, signal.SIGSTOP)
        cluster.kill("controller")
        cluster.start_controller()
        assert all(each == lives for each in _looks(cluster, 75))  # for 1.5 s, the expiry being one
        assert cluster.log("controller").count('"membership_restored"') == 1
        for name in ROLES:
            cluster.signal(name, signal.SIGCONT)
        for name in ROLES:
            cluster.await_logged(name, '"registered"', times=2)
        cluster.await_ready(*ROLES)
        assert cluster.epochs() == lives
        cluster.kill("dense-0")
        await_(lambda: set(cluster.epochs()) == {"attention-0", "gateway-0"})


def test_a_controller_that_starts_elsewhere_is_found(model: Path, tmp_path: Path, server: LocalRedis) -> None:
    """Members learn its address from the registry."""
    with controlled(tmp_path, model, server.config()) as cluster:
        lives = _joined(cluster)
        await_(lambda: _names(server) == {name.encode() for name in ROLES})
        cluster.kill("controller")
        cluster.start_controller(free_port())
        for name in ROLES:
            cluster.await_logged(name, '"registered"', times=2)
        assert cluster.epochs() == lives


@pytest.mark.system
def test_new_processes_find_the_cluster_while_the_controller_is_away(
    model: Path, reference: Reference, tmp_path: Path, server: LocalRedis
) -> None:
    """With the controller killed in the middle of a stream no token changes; a gateway and workers that
    start then serve as well, and are members as soon as there is a controller.
    """
    with controlled(tmp_path, model, server.config()) as cluster:
        for name in ROLES:
            cluster.launch(name)
        cluster.await_ready(*ROLES)
        lives = cluster.epochs()
        await_(lambda: _names(server) == {name.encode() for name in ROLES})  # written a heartbeat later
        with cluster.client("gateway-0") as client:
            _assert_same(_generate(client, lambda: cluster.kill("controller")), reference)
        newcomers = ("attention-1", "dense-1", "gateway-1")
        for name in newcomers:
            cluster.launch(name)
        for name in newcomers:
            cluster.await_logged(name, '"membership_from_registry"')
        for name in newcomers[:2]:
            cluster.await_logged(name, '"serving"')
        with cluster.client("gateway-1") as client:
            _assert_same(_generate(client), reference)
        cluster.start_controller()
        cluster.await_ready(*ROLES, *newcomers)
        assert cluster.epochs() | lives == cluster.epochs()


def _longest_pause(client: Client, then: Callable[[], None] = lambda: None) -> float:
    """Between two tokens of a stream, in seconds; `then` is called once, when some have come."""
    came_s: list[float] = []
    for event in client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=400, ignore_eos=True):
        if getattr(event, "token_ids", ()):
            came_s.append(time.monotonic())
            if len(came_s) == 4:
                then()
    return max(after - before for before, after in itertools.pairwise(came_s))


@pytest.mark.system
@pytest.mark.parametrize("what", ["controller", "registry killed", "registry frozen"])
def test_no_stream_waits_for_what_it_does_not_need(
    model: Path, tmp_path: Path, server: LocalRedis, what: str
) -> None:
    """When controller or registry goes in the middle of a stream, its longest pause is at most 200 ms longer
    than that of an undisturbed one: in one of three attempts, since others may be the machine's.
    """

    def strike() -> None:
        if what == "controller":
            cluster.kill("controller")
        elif what == "registry killed":
            server.kill()
        else:
            server.signal(signal.SIGSTOP)

    def repair() -> None:
        if what == "controller":
            cluster.start_controller()
        elif what == "registry killed":
            server.start()
        else:
            server.signal(signal.SIGCONT)
        cluster.await_ready(*ROLES)

    extra_s: list[float] = []
    with controlled(tmp_path, model, server.config()) as cluster:
        for name in ROLES:
            cluster.launch(name)
        cluster.await_ready(*ROLES)
        with cluster.client("gateway-0") as client:
            while len(extra_s) < 3 and min(extra_s, default=1.0) > 0.2:
                undisturbed_s = _longest_pause(client)
                extra_s.append(_longest_pause(client, strike) - undisturbed_s)
                repair()
    assert min(extra_s) <= 0.2, f"longer by {extra_s} s"


def test_a_cluster_under_ray_writes_who_lives_and_leaves_nobody(tmp_path: Path, server: LocalRedis) -> None:
    """The whole controller: its members are in Redis while it serves, and not when it has stopped; what an
    earlier one left there is not believed, since its processes ended with its Ray.
    """
    registry = open_registry(server.config())
    dead = MemberRecord(WorkerId("dense-7"), Epoch(7), b"")
    registry.claim(ControllerRecord(Epoch(1), "127.0.0.1:1", "", b""), take_over=True)
    registry.publish(Epoch(1), 1, [dead], ())
    config = configured(tmp_path, attention__replicas=1, registry=server.config().model_dump())
    with running(config, joining()) as cluster:
        cluster.await_ready()
        lives = {member.worker_id: member.epoch for member in cluster.controller.fleet().membership.members}
        assert set(lives) == set(ROLES)
        await_(lambda: {each.worker: each.epoch for each in registry.read().members} == lives)
        found = registry.read().controller
        assert found is not None
        assert found.address == cluster.controller.address
    assert registry.read().members == ()
    assert registry.read().past[dead.worker] == (dead.epoch,)
    registry.close()
