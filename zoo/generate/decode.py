"""Cached decoding: a session keeps keys and values, so that only what is new runs through the model.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from zoo.errors import InputError
from zoo.generate.sampling import SamplingOptions, TokenSampler
from zoo.generate.stopping import StopStrings
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


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


class Session:
    """One sequence of tokens and the cache that belongs to it.

    Each reply starts from the longest prefix that the prompt shares with what the cache holds, which serves a chat's
    next turn and further samples of one prompt alike.

    Args:
        stop_ids: tokens that end a reply.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._weight = model.embed.weight
        self._cached: list[int] = []
        self._cache: KVCache | None = None

    def reply(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingOptions,
        stop: Sequence[str] = (),
        sample: int = 0,
    ) -> Reply:
        """Continue ``prompt_ids``. Nothing runs before the reply is iterated over.

        Args:
            stop: strings before which the text ends.
            sample: number of the sample, for its random stream.

        Raises:
            InputError: the prompt is empty, or it and the new tokens do not fit into the context.
        """
        prompt = list(prompt_ids)
        check_fits(prompt, max_new_tokens, self.model.spec.max_seq_len)
        _check_ids(prompt, self.model.spec.vocab_size)
        stopper = StopStrings(stop)
        sampler = TokenSampler(sampling, device=self._weight.device, stream=sample)
        reply = Reply(iter(()))
        reply.pieces = self._pieces(prompt, max_new_tokens, sampler, stopper, reply)
        return reply

    def _pieces(
        self, prompt: list[int], max_new_tokens: int, sampler: TokenSampler, stopper: StopStrings, reply: Reply
    ) -> Iterator[str]:
        decoder = self.tokenizer.stream()
        for token in self._tokens(prompt, max_new_tokens, sampler, reply):
            reply.stats.peak_memory = peak_memory(self._weight.device)
            reply.ids.append(token)
            if token in self.stop_ids:
                reply.finish_reason = "stop"
                break
            if piece := stopper.push(decoder.push(token)):
                yield piece
            if stopper.hit is not None:
                reply.finish_reason = "stop"
                return
        if reply.finish_reason != "stop":
            reply.finish_reason = "length"
        last = stopper.push(decoder.finish())
        if tail := last + stopper.finish():
            yield tail

    def _tokens(self, prompt: list[int], max_new_tokens: int, sampler: TokenSampler, reply: Reply) -> Iterator[int]:
        """Up to ``max_new_tokens`` ids, the cache kept in step with them."""
        stats = reply.stats
        started = time.perf_counter()
        cache = self._prepare(prompt, len(prompt) + max_new_tokens)
        stats.prompt_tokens, stats.reused_tokens = len(prompt), cache.length
        seen, fresh = list(prompt), prompt[cache.length :]
        for i in range(max_new_tokens):
            token = sampler(self._logits(fresh, cache), seen)
            elapsed = time.perf_counter() - started
            if i == 0:
                stats.prefill_seconds = elapsed
            stats.decode_seconds = elapsed - stats.prefill_seconds
            stats.new_tokens = i + 1
            seen.append(token)
            fresh = [token]
            yield token

    @torch.inference_mode()
    def _logits(self, ids: list[int], cache: KVCache) -> torch.Tensor:
        tokens_BT = torch.tensor([ids], device=self._weight.device)
        logits_V = self.model(tokens_BT, cache=cache, last_only=True)[0, -1]
        self._cached += ids
        return logits_V

    def _prepare(self, prompt: list[int], capacity: int) -> KVCache:
        """The cache cut back to what it shares with the prompt (at least the last token must run), large enough."""
        shared = 0
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if self._cache is None:
            self._cache = KVCache(
                self.model.spec, capacity=capacity, dtype=self._weight.dtype, device=self._weight.device
            )
        self._cache.truncate(shared)
        self._cache.reserve(capacity)
        del self._cached[shared:]
        return self._cache


def check_fits(prompt_ids: Sequence[int], max_new_tokens: int, max_seq_len: int) -> None:
    """Check a request before any work.

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


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, or for the CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {max(ids)}, but the model has only {vocab_size}.",
            fix="Tokenizer and weights do not belong together.",
        )
