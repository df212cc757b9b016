"""A reply: what was asked for, the text as it is made, why it ended and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from zoo.errors import InputError
from zoo.generate.sampling import SamplingOptions
from zoo.generate.stopping import StopStrings
from zoo.spec import ModelSpec
from zoo.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, and how."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingOptions
    stop: Sequence[str] = ()
    """Strings before which the text ends."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the reply."""
    sample: int = 0
    """Number of the sample, for its random stream."""
    adapters: tuple[str, ...] | None = None
    """The model's adapters to compute with; ``None``: those that are active."""

    def check(self, spec: ModelSpec) -> None:
        """Check it before any work.

        Raises:
            InputError: the prompt is empty, does not fit into the context with the new tokens, or has ids that the
                model does not know; or a stop string is empty.
        """
        check_fits(self.prompt_ids, self.max_new_tokens, spec.max_seq_len)
        StopStrings(self.stop)
        if max(self.prompt_ids) >= spec.vocab_size:
            raise InputError(
                f"the tokenizer makes token {max(self.prompt_ids)}, but the model has only {spec.vocab_size}.",
                fix="Tokenizer and weights do not belong together.",
            )


@dataclass
class Stats:
    """What one reply cost. Times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were still in the cache."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0
    drafted_tokens: int = 0
    """Tokens that a drafter proposed."""
    accepted_tokens: int = 0
    """Those of them that the model kept."""

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that were kept; ``None`` where none were drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens run through the model, by time."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, by time; the first one comes from the prefill."""
        return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rates included."""
        return {
            **asdict(self),
            "acceptance_rate": self.acceptance_rate,
            "time_to_first_token": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass
class Reply:
    """A reply as it is made: iterate over it for pieces of text; afterwards it has the whole."""

    pieces: Iterator[str]
    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Generated ids, the one that ended the reply included."""
    finish_reason: FinishReason = "interrupted"
    stats: Stats = field(default_factory=Stats)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            self.text += piece
            yield piece

    def read(self) -> Reply:
        """Run to the end."""
        for _ in self:
            pass
        return self


class ReplyWriter:
    """Turns a reply's tokens into text, one at a time, and sees where it ends."""

    def __init__(self, request: Request, tokenizer: Tokenizer, reply: Reply) -> None:
        self._request = request
        self._reply = reply
        # A special token is no part of the text, so it could not be found there.
        special = [tokenizer.backend.token_to_id(text) for text in request.stop if text in tokenizer.marks]
        self._stop_ids = request.stop_ids | set(special)
        self._decoder = tokenizer.stream()
        self._stopper = StopStrings(request.stop)

    @property
    def over(self) -> bool:
        """Whether the reply has ended."""
        return self._reply.finish_reason != "interrupted"

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now safe to show."""
        self._reply.ids.append(token)
        if token in self._stop_ids:
            self._reply.finish_reason = "stop"
            return self._rest()
        piece = self._stopper.push(self._decoder.push(token))
        if self._stopper.hit is not None:
            self._reply.finish_reason = "stop"
        elif len(self._reply.ids) == self._request.max_new_tokens:
            self._reply.finish_reason = "length"
            piece += self._rest()
        return piece

    def _rest(self) -> str:
        last = self._stopper.push(self._decoder.finish())
        return last + self._stopper.finish()


def check_fits(prompt_ids: Sequence[int], max_new_tokens: int, max_seq_len: int) -> None:
    """Check a request's lengths.

    Raises:
        InputError: the prompt is empty, or does not fit into the context with the new tokens.
    """
    if not prompt_ids:
        raise InputError("the prompt is empty.", fix="Give at least one token to continue.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if len(prompt_ids) >= max_seq_len:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens; this model's context holds {max_seq_len}.")
    if len(prompt_ids) + max_new_tokens > max_seq_len:
        raise InputError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones exceed the context of {max_seq_len}.",
            fix=f"Ask for at most {max_seq_len - len(prompt_ids)} new tokens.",
        )
