"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

GGUF stores vocabulary, merges and token kinds, but names the pre-tokenizer only: its rules are written
down here. They matter: without SmolLM's rule that each digit is a word of its own, numbers are split as
the model never saw them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from cluster.errors import UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token kinds that are matched as a whole before any splitting; control tokens print nothing."""


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {"smollm": _smollm}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a GGUF file says about its tokenizer."""

    model: str
    """The algorithm by GGUF's name; `gpt2` is byte-level BPE."""
    pre_tokenizer: str
    tokens: Sequence[str]
    """Spelling by id."""
    kinds: Sequence[int]
    """GGUF token kind by id."""
    merges: Sequence[str]
    """Pairs separated by a space, best first."""
    named_ids: Mapping[str, int]
    """`bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as given."""
    add_bos: bool
    chat_template: str | None
    context_length: int


def write_tokenizer(facts: TokenizerFacts, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; raises `UnsupportedModel`."""
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts.context_length,
        "clean_up_tokenization_spaces": False,
        **{name: facts.tokens[token_id] for name, token_id in sorted(facts.named_ids.items())},
    }
    if facts.chat_template is not None:
        config["chat_template"] = facts.chat_template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(facts: TokenizerFacts) -> Tokenizer:
    """The tokenizer that `facts` describe; raises `UnsupportedModel` for other than known byte-level BPE."""
    if facts.model != "gpt2" or facts.pre_tokenizer not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"tokenizer {facts.model!r} with pre-tokenizer {facts.pre_tokenizer!r} cannot be converted;"
            f" known are 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    vocabulary = {token: token_id for token_id, token in enumerate(facts.tokens)}
    left_right = [merge.split(" ", 1) for merge in facts.merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in left_right]))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[facts.pre_tokenizer]()
    tokenizer.decoder = decoders.ByteLevel()
    if facts.add_bos:
        bos_id = facts.named_ids["bos_token"]
        bos = facts.tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer.add_special_tokens(_added(facts, _CONTROL))
    tokenizer.add_tokens(_added(facts, _USER_DEFINED))
    return tokenizer


def _added(facts: TokenizerFacts, kind: int) -> list[AddedToken]:
    pairs = zip(facts.tokens, facts.kinds, strict=True)
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False) for token, each in pairs if each == kind
    ]
