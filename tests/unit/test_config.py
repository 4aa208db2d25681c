"""The configuration file: what it accepts, what it refuses, and how it says so."""

import itertools
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import Config, load
from cluster.config_text import commented, default_of
from cluster.errors import ConfigError
from cluster.registry.opening import open_registry


def test_defaults_load_and_survive_a_round_trip(tmp_path: Path) -> None:
    """The defaults are valid, and a written configuration loads to the same value."""
    config = load(None)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dens.threads", "did you mean dense?"),
        ("dense.thread", "did you mean dense.threads?"),
        ("security.tls.certifcate", "did you mean security.tls.certificate?"),
        ("attention.arena_size", "did you mean attention.arena?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(key: str, expected: str) -> None:
    """The message names the wrong key and what was probably meant."""
    with pytest.raises(ConfigError) as caught:
        load(None, {key: 1})
    assert key.split(".")[0] in caught.value.message
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"dense.threads": 0}, "dense.threads"),
        ({"attention.arena": "3Gb"}, "attention.arena"),
        ({"model.dtype": "int3"}, "model.dtype"),
        ({"gateway.port": 70000}, "gateway.port"),
        ({"attention.replicas": 0}, "dense.local_arena"),
        ({"dense.max_batch": 300, "dense.step_tokens": 200}, "dense.max_batch"),
        ({"controller.expiry_ms": 600}, "controller.expiry_ms"),
        ({"lanes.transports": ["tcp"], "attention.host": "10.0.0.1"}, "lanes.fenced_network"),
        ({"security.tls.certificate": "a.pem"}, "certificate and key go together"),
        ({"security.tls.mutual": True}, "mutual needs"),
        ({"dense": 3}, "dense"),
        ({"dense.threads": 2, "dense.threads.x": 3}, "dense.threads"),
    ],
)
def test_a_wrong_value_is_refused_by_name(overrides: dict[str, object], named: str) -> None:
    """Ranges, units and limits that contradict each other are refused, naming the key."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert named in caught.value.message
    for foreign in ("Value error", "Input should", "instance of", "Config"):
        assert foreign not in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"dense.cores": "some"}, "dense.cores: must be 'auto' or a list, not 'some'"),
        ({"dense.threads": "two"}, "dense.threads: must be an integer"),
        ({"dense": 3}, "dense: must be a section with keys below it, not 3"),
        ({"gateway.port": 70000}, "gateway.port: must be less than or equal to 65535, not 70000"),
        ({"lanes.transports": ["post"]}, "lanes.transports.0: must be 'local', 'tcp' or 'grpc', not 'post'"),
        (
            {"attention.tiers": [{"device": "gpu", "arena": 1}]},
            "attention.tiers.0.device: must be 'cpu' or 'cuda', not 'gpu'",
        ),
        ({"attention.tiers": [{"arena": 1}, {"device": "cpu"}]}, "attention.tiers.1.arena: is missing"),
        (
            {"attention.tiers": [{"arena": 1, "devise": "cpu"}]},
            "unknown key attention.tiers.0.devise; did you mean attention.tiers.0.device?",
        ),
        ({"attention.tiers": {"arena": 1}}, "attention.tiers: must be a list, not {'arena': 1}"),
        ({"attention.tiers": [1]}, "attention.tiers.0: must be a section with keys below it, not 1"),
        ({"placement.elastic": True}, "placement.elastic: nodes come and go in a Ray cluster that is joined"),
    ],
)
def test_a_refusal_says_what_would_do_and_what_was_given(overrides: dict[str, object], said: str) -> None:
    """In the words of the file: no name of a form or type that only the validator knows."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert caught.value.message.startswith(said)


def test_sizes_take_binary_and_decimal_units() -> None:
    """`512MiB` and `2GB` are bytes; a refusal lists the units."""
    assert load(None, {"attention.arena": "2GB"}).attention.arena == 2 * 10**9
    with pytest.raises(ConfigError, match=r"kB, KB, MB, GB"):
        load(None, {"attention.arena": "3Gb"})
    assert load(None, {"attention.arena": "512MiB"}).attention.arena == 512 * 2**20
    assert load(None, {"attention.arena": "1.5 GiB"}).attention.arena == 3 * 2**29


def test_tiers_are_arenas_behind_the_first(tmp_path: Path) -> None:
    """The plain keys say the best arena, the list those behind it, sizes in the same units; a printed file
    loads to the same.
    """
    tiers = [{"device": "cpu", "arena": "64GiB"}, {"arena": "1TiB"}]
    config = load(None, {"attention.device": "cuda", "attention.arena": "10GiB", "attention.tiers": tiers})
    held = [(tier.device, tier.arena // 2**30) for tier in config.attention.every_tier]
    assert held == [("cuda", 10), ("cpu", 64), ("cpu", 1024)]
    for text in (commented(config), config.to_yaml()):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert load(path) == config
    assert len(load(None).attention.every_tier) == 1


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """Lists, broken YAML and binary files name the file."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is an error, not the defaults."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_the_digest_covers_what_peers_must_agree_on() -> None:
    """Model, block size and lease, which others renew, change the digest; a log level does not."""
    base = load(None).digest
    assert load(None, {"attention.block_tokens": 16}).digest != base
    assert load(None, {"model.dtype": "bfloat16"}).digest != base
    assert load(None, {"attention.lease_ms": 5000}).digest != base
    assert load(None, {"model.path": "elsewhere"}).digest == base
    assert load(None, {"telemetry.log_level": "debug"}).digest == base


def test_the_file_is_frozen() -> None:
    """Nobody writes into the configuration."""
    config: Config = load(None)
    with pytest.raises(ValueError, match="frozen"):
        config.dense.threads = 4  # type: ignore[misc]  # the point of the test


def test_yaml_is_plain() -> None:
    """The written file needs no Python types to be read."""
    assert yaml.safe_load(load(None).to_yaml())["dense"]["threads"] == 1


def test_the_printed_file_explains_every_key_and_loads_to_itself(tmp_path: Path) -> None:
    """What `anabranch config` prints is the configuration, each key below a comment that says what it is."""
    config = load(None, {"attention.arena": "3MB", "placement.dense_classes": ["h100"], "model.name": "a: b"})
    path = tmp_path / "config.yaml"
    path.write_text(commented(config))
    assert load(path) == config
    lines = [line.strip() for line in commented(config).splitlines() if line]
    unexplained = [
        line for above, line in itertools.pairwise(lines) if not line.startswith("#") and above[0] != "#"
    ]
    assert unexplained == []
    assert "arena: 3000000" in lines


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("attention.arena", "1GiB"),
        ("model.name", "null"),
        ("security.tls.mutual", "false"),
        ("dense.threads", "1"),
    ],
)
def test_a_default_is_named_as_the_file_shows_it(key: str, default: str) -> None:
    """Sizes in their unit, the rest in YAML."""
    assert default_of(key) == default


@pytest.mark.parametrize(
    ("given", "host", "port", "database", "encrypted"),
    [
        ("redis://127.0.0.1", "127.0.0.1", 6379, 0, False),
        ("redis://someone@localhost:6380/3", "localhost", 6380, 3, False),
        ("rediss://registry.example:6381/1", "registry.example", 6381, 1, True),
        ({"url": "redis://[::1]:6390", "deadline_ms": 50}, "::1", 6390, 0, False),
    ],
)
def test_a_registry_is_named_by_its_address(
    given: object, host: str, port: int, database: int, encrypted: bool
) -> None:
    """An address alone is short for the section; it is taken apart as Redis clients do."""
    registry = load(None, {"registry": given}).registry
    parts = registry.parts
    assert (parts.host, parts.port, parts.database, parts.is_encrypted) == (host, port, database, encrypted)
    assert Config().registry.url is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://127.0.0.1", "redis://HOST:PORT/DB is expected"),
        ("redis://127.0.0.1:port", "redis://HOST:PORT/DB is expected"),
        ("redis://127.0.0.1/zero", "redis://HOST:PORT/DB is expected"),
        ("redis://127.0.0.1/0?db=1", "options have keys of their own"),
        ("redis://:hush@127.0.0.1", "use password_file or password_variable"),
        ("redis://registry.example", "use rediss://, or security.insecure"),
        (6379, "registry: must be a section"),
        ({"url": "redis://127.0.0.1", "cluster": "a b"}, "registry.cluster"),
    ],
)
def test_a_registry_that_cannot_be_used_is_refused(given: object, said: str) -> None:
    """By key and with a remedy; a secret in the address is not repeated."""
    with pytest.raises(ConfigError) as caught:
        load(None, {"registry": given})
    assert said in caught.value.message
    assert "registry" in caught.value.message
    assert "hush" not in caught.value.message


@pytest.mark.parametrize("key", ["controller.expiry_ms", "controller.heartbeat_ms", "registry.deadline_ms"])
def test_a_registry_must_be_missed_before_members_are(key: str) -> None:
    """A controller that is cut off from its registry knows it before it takes silence for death; one that
    keeps it in its own memory has nothing to miss.
    """
    tight = {"controller.heartbeat_ms": 400, "controller.expiry_ms": 1000, "registry.deadline_ms": 300}
    shared = {"registry.url": "redis://127.0.0.1"}
    with pytest.raises(ConfigError) as caught:
        load(None, tight | shared)
    assert key in caught.value.message
    assert load(None, tight).registry.url is None
    assert load(None, tight | shared | {"controller.expiry_ms": 1001}).registry.url is not None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis without its client: the error says what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "cluster.registry.redis_server", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'anabranch\[redis\]'"):
        open_registry(load(None, {"registry": "redis://127.0.0.1"}).registry)
