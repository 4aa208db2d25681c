"""Models from a hub and from an object store, over real HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli import model
from anabranch.cli.models.describe import describe
from anabranch.cli.models.progress import SilentProgress
from anabranch.cli.models.remote import remote_model
from anabranch.cli.models.store import ModelState, ModelStore
from anabranch.cli.models.web import Web
from cluster.clock import ManualClock
from cluster.errors import (
    AnabranchError,
    BrokenModelFolder,
    ConfigError,
    DeadlineExceeded,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
    UnsupportedModel,
)
from tests.model_server import COMMIT, ModelServer, model_server
from tests.models import tiny_model

REPOSITORY = "someone/Tiny-Model"
CARD = "---\nlicense: mit\n---\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two files of weights, with a card, and with what no server of ours reads."""
    folder = tiny_model(tmp_path_factory.mktemp("made") / "tiny", tokenizer=True, shard_size="200KB")
    (folder / "README.md").write_text(CARD)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """An empty hub."""
    with model_server() as server:
        yield server


def _fetch(
    cache: Path, source: str, hub: ModelServer | None = None, name: str | None = None, **environment: str
) -> Path:
    remote = remote_model(source, environment | ({"HF_ENDPOINT": hub.url} if hub else {}))
    return ModelStore(cache).fetch_remote(remote, name or remote.name, SilentProgress())


def _same(folder: Path, made: Path) -> bool:
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}
    return found == {path.name: path.read_bytes() for path in made.iterdir() if path.name in found}


def test_a_repository_at_a_commit_becomes_a_folder(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """Whole, without what nobody reads; known by its name from then on; and fetched once. The token stays
    with the hub where large files lie elsewhere.
    """
    with model_server() as elsewhere:
        server.put_repository(tiny, REPOSITORY, elsewhere)
        server.key = "Bearer hidden"
        source = f"{REPOSITORY}@{COMMIT}"
        folder = _fetch(tmp_path, source, server, HF_TOKEN="hidden")
        assert {asked.authorization for asked in elsewhere.asked} == {None}
        assert len(elsewhere.asked) >= 2
        server.asked.clear()
        elsewhere.asked.clear()
        assert _fetch(tmp_path, source, server, HF_TOKEN="hidden") == folder
        assert (server.names_asked(), elsewhere.asked) == ([COMMIT], [])
    assert folder == tmp_path / "models" / "Tiny-Model"
    assert _same(folder, tiny)
    assert not (folder / "pytorch_model.bin").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"Tiny-Model", ".Tiny-Model.lock"}
    store = ModelStore(tmp_path)
    assert store.resolve("Tiny-Model") == folder
    assert describe(folder).licence == "mit"
    (listed,) = (each for each in store.list_models() if each.state is ModelState.FETCHED)
    assert (listed.name, listed.description) == ("Tiny-Model", source)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BrokenModelFolder, match=f"anabranch model fetch {source}"):
        store.resolve("Tiny-Model")


def test_a_branch_is_refused_with_the_commit_it_is_at(
    tmp_path: Path, tiny: Path, server: ModelServer
) -> None:
    """What moves is no pin; the message is the command that is."""
    server.put_repository(tiny, REPOSITORY)
    with pytest.raises(ConfigError, match=f"fetch {REPOSITORY}@{COMMIT}"):
        _fetch(tmp_path, f"{REPOSITORY}@main", server)


def test_what_a_hub_does_not_have_or_show_is_said(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """A misspelt repository, and a private one without its token."""
    server.put_repository(tiny, REPOSITORY)
    with pytest.raises(NotFound, match=f"someone/Tinny@{COMMIT}.*spelled"):
        _fetch(tmp_path, f"someone/Tinny@{COMMIT}", server)
    server.key = "Bearer hidden"
    with pytest.raises(Unauthenticated, match="HF_TOKEN"):
        _fetch(tmp_path, f"{REPOSITORY}@{COMMIT}", server)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-"])
def test_a_file_that_is_not_what_the_hub_says_is_refused(
    tmp_path: Path, tiny: Path, server: ModelServer, name: str
) -> None:
    """Small files by git's hash, large ones by SHA-256: no folder appears. Mended, it is fetched."""
    server.put_repository(tiny, REPOSITORY)
    (place,) = (path for path in server.files if path.rpartition("/")[2].startswith(name))
    whole = server.files[place]
    server.files[place] = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    with pytest.raises(BrokenModelFolder, match=f"{name}.*is not the file with"):
        _fetch(tmp_path, f"{REPOSITORY}@{COMMIT}", server)
    assert not (tmp_path / "models" / "Tiny-Model").exists()
    server.files[place] = whole
    assert _same(_fetch(tmp_path, f"{REPOSITORY}@{COMMIT}", server), tiny)


def test_a_download_goes_on_where_it_broke(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """Within an attempt, and in the next one after an attempt was given up: no byte is sent twice."""
    server.put_repository(tiny, REPOSITORY)
    server.breaks = [100_000, 50_000]
    assert _same(_fetch(tmp_path / "a", f"{REPOSITORY}@{COMMIT}", server), tiny)
    assert [asked.offset for asked in server.asked if asked.offset] == [100_000, 150_000]
    once_bytes, server.sent_bytes = server.sent_bytes, 0
    server.breaks = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(Unavailable, match="cannot be read"):
        _fetch(tmp_path / "b", f"{REPOSITORY}@{COMMIT}", server)
    server.breaks = []
    assert _same(_fetch(tmp_path / "b", f"{REPOSITORY}@{COMMIT}", server), tiny)
    listing_bytes = len(server.files[f"/api/models/{REPOSITORY}/revision/{COMMIT}"])
    assert server.sent_bytes == once_bytes + listing_bytes


def test_what_cannot_be_served_is_refused_before_its_weights_come(
    tmp_path: Path, tiny: Path, server: ModelServer
) -> None:
    """The configuration is read first."""
    server.put_folder(tiny, "models/strange")
    strange = json.loads((tiny / "config.json").read_text()) | {"architectures": ["StrangeForCausalLM"]}
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps(strange))
    (odd / "model.safetensors").write_bytes(b"x" * 1000)
    server.put_folder(odd, "models/odd")
    with pytest.raises(UnsupportedModel, match="Strange"):
        _fetch(tmp_path / "cache", f"{server.url}/models/odd")
    assert server.names_asked() == ["SHA256SUMS", "config.json"]


def test_a_folder_of_an_object_store(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """Every file that its sums list, asked for with the query and the authorization that were given, neither
    of which is kept; other sums are another model.
    """
    server.put_folder(tiny, "models/tiny")
    server.key = "Basic hidden"
    source = f"{server.url}/models/tiny/?sig=hidden"
    folder = _fetch(tmp_path, source, name="mine", ANABRANCH_MODEL_AUTHORIZATION="Basic hidden")
    assert folder == tmp_path / "models" / "mine"
    assert _same(folder, tiny)
    assert {asked.query for asked in server.asked} == {"sig=hidden"}
    assert "hidden" not in (folder / "provenance.json").read_text()
    server.files["/models/tiny/README.md"] = b"---\nlicense: other\n---\n"
    with pytest.raises(Unauthenticated) as caught:
        _fetch(tmp_path, source, name="mine", ANABRANCH_MODEL_AUTHORIZATION="Basic wrong")
    assert "sig" not in caught.value.message
    assert _same(_fetch(tmp_path, source, name="mine", ANABRANCH_MODEL_AUTHORIZATION="Basic hidden"), tiny)
    (tmp_path / "new").mkdir()
    for path in tiny.iterdir():
        (tmp_path / "new" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "new" / "README.md").write_text("---\nlicense: other\n---\n")
    server.put_folder(tmp_path / "new", "models/tiny")
    _fetch(tmp_path, source, name="mine", ANABRANCH_MODEL_AUTHORIZATION="Basic hidden")
    assert describe(folder).licence == "other"


def test_a_hub_that_tells_no_hashes_is_not_believed(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """As a mirror may not: nothing could be checked."""
    server.put_repository(tiny, REPOSITORY)
    place = f"/api/models/{REPOSITORY}/revision/{COMMIT}"
    facts = json.loads(server.files[place])
    facts["siblings"] = [{"rfilename": each["rfilename"]} for each in facts["siblings"]]
    server.files[place] = json.dumps(facts).encode()
    with pytest.raises(BrokenModelFolder, match="does not tell the hash of"):
        _fetch(tmp_path, f"{REPOSITORY}@{COMMIT}", server)


def test_a_download_has_a_deadline(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """Also where every answer brings something."""
    server.put_folder(tiny, "models/tiny")
    clock = ManualClock()
    web = Web(None, 60.0, clock)
    with pytest.raises(DeadlineExceeded, match="not read within 60 s"):
        web.download(f"{server.url}/models/tiny/config.json", tmp_path / "part", lambda _: clock.advance(61))


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        (b"0" * 64 + b"  ../config.json\n", r"a line of SHA256SUMS"),
        (b"0" * 64 + b"  provenance.json\n", r"a line of SHA256SUMS"),
        (b"not a sum\n", r"a line of SHA256SUMS"),
        (b"0" * 64 + b"  weights.bin\n", r"no config\.json"),
        (b"\xff\xfe", "is no text"),
        (None, r"sha256sum \* > SHA256SUMS"),
    ],
    ids=["above", "record", "words", "no model", "bytes", "absent"],
)
def test_sums_that_are_none(tmp_path: Path, server: ModelServer, sums: bytes | None, words: str) -> None:
    """Nothing is written outside of the folder, and what is wrong is said."""
    server.files = {} if sums is None else {"/tiny/SHA256SUMS": sums}
    with pytest.raises(AnabranchError, match=words):
        _fetch(tmp_path, f"{server.url}/tiny")


@pytest.mark.parametrize("source", ["tinny", "someone/tiny", "ftp://host/tiny", "https://host", "/tmp/tiny"])
def test_sources_that_name_nothing(source: str) -> None:
    """Each form is shown."""
    with pytest.raises(ModelError, match=r"OWNER/NAME@COMMIT.*https://"):
        remote_model(source, {})


def test_the_command_fetches_by_url(tmp_path: Path, tiny: Path, server: ModelServer) -> None:
    """It prints the folder; a name of the catalogue is not to be had for another model."""
    server.put_folder(tiny, "models/tiny")
    environment = {"ANABRANCH_CACHE": str(tmp_path)}
    words = ["fetch", f"{server.url}/models/tiny", "--name", "mine"]
    done = CliRunner().invoke(model.app, words, env=environment)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(tmp_path / "models" / "mine")]
    words[-1] = "smollm2-135m-instruct"
    done = CliRunner().invoke(model.app, words, env=environment)
    assert isinstance(done.exception, ModelError)
    assert "--name" in done.exception.message
