"""What prompts say: token ids or text, made from a seed.

A segment's contents depend on the seed, its origin and its number, and on nothing else: segments of one name
are the same in every process, and a shorter one is the beginning of a longer one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Protocol, TypeAlias

import numpy as np

from cluster.errors import InvalidRequest
from loadgen.workload import Segment

Prompt: TypeAlias = list[int] | str
"""Token ids, or text."""


class PromptKind(StrEnum):
    """How prompts are written."""

    TOKENS = "tokens"
    """Random token ids: exactly as long as planned."""

    TEXT = "text"
    """Common English words, most of which are one token to most tokenizers: about as long as planned."""


class Source(Protocol):
    """Makes prompts."""

    def write(self, segments: Sequence[Segment]) -> Prompt:
        """The contents of consecutive segments."""
        ...


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Token ids from the middle three quarters of a vocabulary: special tokens tend to be at its ends."""

    seed: int
    vocabulary: int

    def __post_init__(self) -> None:
        if self.vocabulary < 8:
            raise InvalidRequest(f"a vocabulary of {self.vocabulary} tokens is too small to draw from")

    def write(self, segments: Sequence[Segment]) -> list[int]:
        """See `Source`."""
        low, high = self.vocabulary // 8, self.vocabulary - self.vocabulary // 8
        return [
            token
            for segment in segments
            for token in _generator(self.seed, segment).integers(low, high, segment.tokens).tolist()
        ]


@dataclass(frozen=True, slots=True)
class TextSource:
    """Words, each with the blank before it, as byte-pair vocabularies have them."""

    seed: int

    def write(self, segments: Sequence[Segment]) -> str:
        """See `Source`."""
        words = _words()
        return "".join(
            f" {words[place]}"
            for segment in segments
            for place in _generator(self.seed, segment).integers(0, len(words), segment.tokens).tolist()
        )


def source(kind: PromptKind, seed: int, vocabulary: int | None) -> Source:
    """The source of a kind. Raises InvalidRequest where it would need to know the vocabulary."""
    if kind is PromptKind.TEXT:
        return TextSource(seed)
    if vocabulary is None:
        raise InvalidRequest(
            "this endpoint does not tell its vocabulary: give --vocabulary, or --prompts text"
        )
    return TokenSource(seed, vocabulary)


def joined(before: Prompt, after: Prompt) -> Prompt:
    """One behind the other, both of one kind."""
    if isinstance(before, str):
        assert isinstance(after, str)
        return before + after
    assert not isinstance(after, str)
    return before + after


def _generator(seed: int, segment: Segment) -> np.random.Generator:
    return np.random.default_rng([seed, int(segment.origin), segment.number])


@functools.cache
def _words() -> tuple[str, ...]:
    return tuple((files("loadgen") / "words.txt").read_text("utf-8").split())
