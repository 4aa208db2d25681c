"""Text to tokens and back: a model folder's tokenizer, streaming detokenization and stop strings.

Tokens become text in two steps, each a small automaton fed with deltas of any size:

    token ids --IncrementalDetokenizer--> printable text --StopMatcher--> text the client may see
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from cluster.config_reader import ConfigReader
from cluster.errors import BrokenModelFolder
from workers.gateway.chat_template import ChatTemplate, Message, read_chat_templates

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders print for bytes that are not (yet) a character
_INCOMPLETE_LIMIT = 3  # bytes an unfinished UTF-8 character can have
_WINDOW_TOKENS = 16  # tokens decoded again at each push before the window is cut
_WINDOW_TOKENS_LIMIT = 64  # the same where no clean cut turns up: endless bytes that are no text
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of one model folder; equal to what transformers loads from the same folder.

    tokenizer.json says everything about ids (its post-processor decides on BOS and EOS);
    tokenizer_config.json adds the chat template and the names of special tokens. Threads may share it.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_optional(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        special_tokens = _special_tokens(config, _read_optional(folder / "special_tokens_map.json"))
        self._register_special_tokens(special_tokens.values())
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        templates = read_chat_templates(folder, config)
        self.has_chat_template = bool(templates)
        self._chat = ChatTemplate(templates, special_tokens, origin=str(folder))

    def _register_special_tokens(self, contents: Iterable[str]) -> None:
        """Named tokens are special even where tokenizer.json forgot to say so, as transformers has it."""
        known = [text for text in contents if self._tokenizer.token_to_id(text) is not None]
        added = {
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        }
        missing = [tokenizers.AddedToken(text, normalized=False) for text in known if text not in added]
        self._tokenizer.add_special_tokens(missing)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which `decode` leaves out by default."""
        return self._special_ids

    def token_id(self, token: str) -> int | None:
        """The id of the token spelt `token` in the vocabulary, or None."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of `token_id`, or None; not text: bytes are written as stand-ins."""
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` applies the model's post-processor (BOS, EOS)."""
        # As a batch of one: only batches release the interpreter lock, without which a long prompt would stop
        # every stream of a gateway, and its heartbeats.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """Token ids of the prompt for `messages`; templates write BOS themselves, so none is added."""
        return self.encode(self.render_chat(messages, tools=tools), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that form no character become U+FFFD, unknown ids nothing."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt text for `messages`, by the model's chat template.

        Raises `InvalidRequest` where the model has no template or its template refuses the messages.
        """
        return self._chat.render(messages, add_generation_prompt, tools)


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text that is printed once and never taken back.

    `context` is what came before, usually the prompt's last ids: with it a tokenizer that drops the space
    before the first word (SentencePiece) keeps the space between prompt and answer.

    The window holds the newest tokens and is decoded anew at each push, since what a token prints
    depends on its neighbours; the last characters are held back while they may be half a character:

        window     [ context or printed | not yet clean ]
        its text   [ ---- printed ---- | held: at most 3 U+FFFD ]

    The texts of all pushes and of `flush` together equal `decode` of all ids at once, however the ids
    are split. One exception: a byte-fallback decoder spoils a whole run of byte tokens when a bad one
    joins it, but characters of the run that were complete have been printed by then and stay; and there
    a U+FFFD that the model itself spells in bytes counts as a bad one.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._skip_special_tokens = skip_special_tokens
        self._window = [token for token in context if self._prints(token)][-_WINDOW_TOKENS:]
        self._text = self._decode()
        self._printed = len(self._text) - _held_characters(self._text)
        # Tokens of the window up to the last place where nothing was held.
        self._clean = len(self._window) if self._printed == len(self._text) else 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Append `token_ids`; returns what became printable, possibly nothing."""
        return "".join([self._push_one(token_id) for token_id in token_ids if self._prints(token_id)])

    def flush(self) -> str:
        """The end: returns what was held back, an unfinished character as U+FFFD."""
        rest = self._text[self._printed :]
        self._printed = len(self._text)
        return rest

    def _prints(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.token(token_id) is not None

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        self._text = self._decode()
        held = _held_characters(self._text)
        if held and len(self._window) - self._clean <= _INCOMPLETE_LIMIT:
            return ""  # the next token may change all of this: byte fallback decodes runs as a whole
        end = len(self._text) - held
        delta = self._text[self._printed : end]
        self._printed = max(self._printed, end)
        if held == 0:
            if len(self._window) > _WINDOW_TOKENS:
                self._forget(self._clean)
            self._clean = len(self._window)
        elif len(self._window) > _WINDOW_TOKENS_LIMIT:
            self._forget(len(self._window) - _WINDOW_TOKENS)
            self._clean = 0
        return delta

    def _forget(self, count: int) -> None:
        """Drop the window's first `count` tokens; what is printed is counted from the text's end."""
        unprinted = len(self._text) - self._printed
        del self._window[:count]
        self._text = self._decode()
        self._printed = len(self._text) - unprinted

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)


def _held_characters(text: str) -> int:
    """How many characters at the end of `text` the next token may still change."""
    trailing = len(text) - len(text.rstrip(_REPLACEMENT))
    return min(trailing, _INCOMPLETE_LIMIT)


@dataclass(frozen=True, slots=True)
class StopResult:
    """What a `StopMatcher` lets through: `text` to print, and the stop string that ended it, if one did."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Watches a stream of text for stop strings, which may span deltas.

        searching --push--> searching      prints all but the longest end that could begin a stop string
        searching --match--> stopped       prints up to the stop string (through it with `include_stop`)
        stopped --push--> stopped          prints nothing

    Of several stop strings the one that is complete first wins, of those ending together the longest:
    the outcome does not depend on how the text was cut into deltas.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        assert all(stop_strings), "an empty stop string would match everywhere; admission refuses it"
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self._longest = max((len(stop) for stop in self._stop_strings), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, delta: str) -> StopResult:
        """Append `delta`; returns what may be printed now and the stop string that matched, if any."""
        if self.matched is not None:
            return StopResult("", self.matched)
        text = self._held + delta
        found = self._find(text)
        if found is not None:
            start, stop = found
            self.matched, self._held = stop, ""
            return StopResult(text[: start + len(stop)] if self._include_stop else text[:start], stop)
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return StopResult(text[: len(text) - held])

    def flush(self) -> str:
        """The stream ended without a match: returns what was held back."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and stop string of the match that ends first; the longest of those."""
        matches = [(text.find(stop), stop) for stop in self._stop_strings if stop in text]
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _held_length(self, text: str) -> int:
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise BrokenModelFolder(f"{path} is missing: a model folder needs the tokenizer in this format")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise BrokenModelFolder(f"{path} is not a readable tokenizer: {error}") from error
    # Some folders carry the padding or truncation of their training; a prompt is encoded as it is.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_optional(path: Path) -> dict[str, object]:
    """The JSON object in `path`; empty where there is no such file."""
    return ConfigReader.open(path).values if path.is_file() else {}


def _special_tokens(*sources: Mapping[str, object]) -> dict[str, str]:
    """Texts of named special tokens; the first source that has one wins. Entries are a text or an object."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        for source in sources:
            entry = source.get(name)
            content = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(content, str):
                found.setdefault(name, content)
    return found
