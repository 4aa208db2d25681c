"""`anabranch generate` and `anabranch chat` as a user sees them, against a scripted gateway."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from anabranch.cli.__main__ import app
from cluster import errors
from cluster.config import SecurityConfig
from controller.state import ClusterRecord, StateFolder, process_start
from tests.certificates import authority
from tests.fake_gateway import MODEL, FakeGateway, Script, text, tokens

PROGRAM = [sys.executable, "-m", "anabranch.cli.__main__"]
DEADLINE_S = 30.0


def run(gateway: FakeGateway, *arguments: str, lines: str = "", **environment: str) -> Result:
    """One command against the gateway, in this process; errors of the tree are raised."""
    command = [*arguments, "--address", gateway.address]
    result = CliRunner().invoke(app, command, input=lines, env=environment)
    if isinstance(result.exception, errors.AnabranchError):
        raise result.exception
    return result


class Terminal:
    """What a program wrote to a terminal, read on until a text turns up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = ""

    def await_text(self, wanted: str) -> None:
        """Read until `wanted` was written; what follows it is left for the next call."""
        deadline_s = time.monotonic() + DEADLINE_S
        while wanted not in self._unread:
            left_s = deadline_s - time.monotonic()
            assert select.select([self._descriptor], [], [], max(0, left_s))[0], (wanted, self._unread)
            try:
                self._unread += os.read(self._descriptor, 65536).decode()
            except OSError as error:  # the program has ended
                raise AssertionError((wanted, self._unread)) from error
        self._unread = self._unread.partition(wanted)[2]


def _interrupt(process: subprocess.Popen[bytes], terminal: int) -> int:
    """Press Ctrl-C until the program has ended; returns its status.

    Python's line editor notices one that comes between its prompt and its wait only with the next key.
    """
    for _ in range(10):
        os.write(terminal, b"\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(2)
    raise AssertionError("Ctrl-C does not end the program")


def test_generate_prints_the_text_alone() -> None:
    """Standard output holds the output and the end of its line, nothing else."""
    with FakeGateway() as gateway:
        result = run(gateway, "generate", "The river", "--max-tokens", "4")
    assert (result.exit_code, result.stdout) == (0, text(4) + "\n")
    assert gateway.requests[0].text == "The river"


def test_generate_passes_its_options_on() -> None:
    """Each flag reaches its field; what is not given stays open."""
    flags = ["--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--n", "2"]
    with FakeGateway() as gateway:
        run(gateway, "generate", "x", *flags, "--stop", " sea", "--stop", " and")
        run(gateway, "generate", "x", "--max-tokens", "1")
    full, bare = gateway.requests
    assert (full.n, list(full.stop)) == (2, [" sea", " and"])
    assert (full.sampling.temperature, full.sampling.top_p, full.sampling.seed) == (0.5, 0.9, 3)
    assert not bare.sampling.HasField("temperature")
    assert list(bare.stop) == []


def test_generate_json_tells_everything() -> None:
    """One object: the text, its tokens, how it ended, what it used and where the time went."""
    with FakeGateway(Script(break_after=[3])) as gateway:
        result = run(
            gateway, "generate", "a b", "--max-tokens", "5", "--stop", " sea", "--seed", "3", "--json"
        )
    answer = json.loads(result.stdout)
    assert answer.pop("request_id") == gateway.requests[0].request_id
    assert answer.pop("timings")["decode_seconds"] == 0.5
    assert answer == {
        "model": MODEL,
        "seed": 3,
        "text": text(3),
        "tokens": tokens(3),
        "finish_reason": "stop",
        "matched_stop": " sea",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0},
    }


def test_generate_keeps_several_outputs_apart() -> None:
    """With --n each output has its own line, and its own entry in JSON."""
    with FakeGateway() as gateway:
        plain = run(gateway, "generate", "x", "--n", "2", "--max-tokens", "3")
        as_json = run(gateway, "generate", "x", "--n", "2", "--max-tokens", "3", "--json")
    assert plain.stdout == f"[0] {text(3)}\n[1] {text(3, 1)}\n"
    answer = json.loads(as_json.stdout)
    assert [choice["tokens"] for choice in answer["choices"]] == [tokens(3), tokens(3, 1)]
    assert answer["text"] == text(3)


def test_generate_reads_standard_input_and_speaks_as_a_user() -> None:
    """- is standard input without its last newline; --chat makes it a message, --system goes before."""
    with FakeGateway() as gateway:
        run(gateway, "generate", "-", "--max-tokens", "1", lines="two\nlines\n")
        run(gateway, "generate", "--chat", "hello", "--max-tokens", "1")
        run(gateway, "generate", "hello", "--system", "be brief", "--max-tokens", "1")
    plain, chat, instructed = gateway.requests
    assert plain.text == "two\nlines"
    assert [(message.role, message.content) for message in chat.chat.messages] == [("user", "hello")]
    assert [message.role for message in instructed.chat.messages] == ["system", "user"]


def test_the_api_key_comes_from_flag_or_environment() -> None:
    """Either opens the door; without one the gateway's refusal is told."""
    with FakeGateway(Script(api_key="secret")) as gateway:
        words = ["generate", "x", "--max-tokens", "1"]
        assert run(gateway, *words, "--api-key", "secret").exit_code == 0
        assert run(gateway, *words, ANABRANCH_API_KEY="secret").exit_code == 0
        with pytest.raises(errors.Unauthenticated):
            run(gateway, *words)


def test_tls_with_an_authority(tmp_path: Path) -> None:
    """--authority is all that a client of a TLS cluster needs."""
    tls = authority(tmp_path).tls("server")
    with FakeGateway(security=SecurityConfig(tls=tls)) as gateway:
        result = run(gateway, "generate", "x", "--max-tokens", "2", "--authority", str(tls.authority))
    assert result.stdout == text(2) + "\n"


def test_the_running_cluster_is_found(tmp_path: Path) -> None:
    """Without --address the gateways of cluster.json are asked; without a cluster there is a clear error."""
    config = tmp_path / "cluster.yaml"
    config.write_text(f"state_dir: {tmp_path}\n")
    command = ["generate", "x", "--max-tokens", "2", "--config", str(config)]
    missing = CliRunner().invoke(app, command)
    assert isinstance(missing.exception, errors.NotFound)
    record = ClusterRecord(os.getpid(), process_start(os.getpid()), controller="127.0.0.1:1", model="m")
    StateFolder(tmp_path).write(record)
    assert "is starting" in str(CliRunner().invoke(app, command).exception)
    with FakeGateway() as gateway:
        StateFolder(tmp_path).write(
            ClusterRecord(record.process_id, record.process_started, "127.0.0.1:1", "m", (gateway.address,))
        )
        assert CliRunner().invoke(app, command).stdout == text(2) + "\n"


def test_errors_are_one_line_and_a_status() -> None:
    """What the user can correct ends with 2, all else with 1; standard output stays empty."""
    cases = {errors.InvalidRequest("top_p is 9"): 2, errors.ResourceExhausted("the queue is full"): 1}
    for refusal, status in cases.items():
        with FakeGateway(Script(refusal=refusal)) as gateway:
            command = [*PROGRAM, "generate", "x", "--address", gateway.address]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr == f"anabranch: {refusal.message}\n"


def test_ctrl_c_ends_the_request_at_the_gateway() -> None:
    """What was printed stays, the gateway sees the hang-up, the status is the shell's 130."""
    with FakeGateway(Script(hold_after=3)) as gateway:
        process = subprocess.Popen(
            [*PROGRAM, "generate", "x", "--max-tokens", "9", "--address", gateway.address],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.read(len(text(2))) == text(2)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, rest) == (130, "\n")
        assert gateway.hung_up.wait(DEADLINE_S)


def test_chat_remembers_what_was_said() -> None:
    """Each question carries the conversation so far; /reset and /system begin anew."""
    lines = "Hello!\n\nAnd then?\n/reset\nWho?\n/system Be brief.\nHow?\n/quit\nnever said\n"
    with FakeGateway() as gateway:
        result = run(gateway, "chat", "--max-tokens", "2", lines=lines)
    assert result.exit_code == 0
    assert result.stdout == f"{text(2)}\n" * 4
    said = [
        [(message.role, message.content) for message in request.chat.messages] for request in gateway.requests
    ]
    assert said == [
        [("user", "Hello!")],
        [("user", "Hello!"), ("assistant", text(2)), ("user", "And then?")],
        [("user", "Who?")],
        [("system", "Be brief."), ("user", "How?")],
    ]


def test_chat_tells_its_speed_and_commands_beside_the_answers() -> None:
    """Counts, /help and mistakes go to standard error, so that a pipe gets answers alone."""
    with FakeGateway() as gateway:
        result = run(gateway, "chat", "--max-tokens", "3", lines="Hi\n/help\n/what\n")
    assert re.search(r"3 tokens, [\d.]+ tokens/s, first after [\d.]+ s", result.stderr)
    assert "/system TEXT" in result.stderr
    assert "/what is not a command" in result.stderr
    assert result.stdout == text(3) + "\n"


def test_chat_outlives_an_error() -> None:
    """A refused question is told, forgotten, and counts in the exit status; the next one is answered."""
    with FakeGateway(Script(refusal=errors.ResourceExhausted("the queue is full"))) as gateway:
        result = run(gateway, "chat", lines="one\ntwo\n")
    assert result.exit_code == 1
    assert result.stderr.count("error: the queue is full") == 2
    assert [len(request.chat.messages) for request in gateway.requests] == [1, 1]


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    """During an answer it ends that, and the conversation goes on; at the prompt it ends the program."""
    with FakeGateway(Script(hold_after=3)) as gateway:
        ours, theirs = pty.openpty()
        command = [*PROGRAM, "chat", "--max-tokens", "9", "--address", gateway.address]
        # The first terminal that a session's leader opens is the one whose Ctrl-C it is sent.
        at_terminal = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(theirs), *command]
        process = subprocess.Popen(at_terminal, start_new_session=True)
        try:
            terminal = Terminal(ours)
            terminal.await_text("> ")
            os.write(ours, b"Hello!\n")
            terminal.await_text(text(2).strip())
            os.write(ours, b"\x03")
            terminal.await_text("stopped")
            terminal.await_text("> ")
            gateway.script.hold_after = None
            os.write(ours, b"Go on.\n")
            terminal.await_text("9 tokens")
            terminal.await_text("> ")
            assert _interrupt(process, ours) == 0
        finally:
            process.kill()
            process.wait(DEADLINE_S)
            os.close(ours)
            os.close(theirs)
    assert gateway.hung_up.is_set()
    contents = [message.content for message in gateway.requests[1].chat.messages]
    assert contents == ["Hello!", text(2), "Go on."]
