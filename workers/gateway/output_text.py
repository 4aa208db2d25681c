"""The text of one output as its tokens arrive: detokenized, and searched for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.gateway.request_plan import RequestPlan
from workers.gateway.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer

_CONTEXT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens brought: the text that became certain, how many of the tokens were used (those
    after a stop string are not), and the stop string that ended the output, if one did.
    """

    text: str
    tokens_used: int
    matched_stop: str | None = None


class OutputText:
    """Text of one choice. What is printed depends only on the tokens, never on how they were cut into
    deltas: that is why a resumed stream can go on where another gateway stopped.

    Stop strings are looked for in the text of tokens after the first `min_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, plan: RequestPlan) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, context=plan.prompt_token_ids[-_CONTEXT_TOKENS:]
        )
        self._matcher = StopMatcher(plan.stop, plan.include_stop) if plan.stop else None
        self._include_stop = plan.include_stop
        self._min_tokens = plan.sampling.min_tokens
        self._tokens = 0

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Append tokens."""
        if self._matcher is None:
            self._tokens += len(token_ids)
            return Piece(self._detokenizer.push(token_ids), len(token_ids))
        text = ""
        for used, token_id in enumerate(token_ids, start=1):
            self._tokens += 1
            delta = self._detokenizer.push([token_id])
            if self._tokens <= self._min_tokens:
                text += delta
                continue
            result = self._matcher.push(delta)
            text += result.text
            if result.matched is not None:
                return Piece(text, used, result.matched)
        return Piece(text, len(token_ids))

    def flush(self, matched_token_id: int | None = None) -> Piece:
        """The end: what was held back, and the stop token's own text where it was asked for."""
        rest = self._detokenizer.flush()
        matched = None
        if self._matcher is not None and self._tokens > self._min_tokens:
            result = self._matcher.push(rest)
            rest, matched = result.text + self._matcher.flush(), result.matched
        if self._include_stop and matched is None and matched_token_id is not None:
            rest += self._tokenizer.decode([matched_token_id], skip_special_tokens=False)
        return Piece(rest, 0, matched)
