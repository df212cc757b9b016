"""Decoding of one sequence: a session keeps keys and values, so that only what is new runs through the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from zoo.generate.cached import CachedTokens
from zoo.generate.compile import CompiledDecoding
from zoo.generate.reply import Reply, ReplyWriter, Request, Stats
from zoo.generate.sampling import SamplingOptions, TokenSampler
from zoo.generate.speculative import Speculation, speculate
from zoo.models.decoder import Decoder
from zoo.models.memory import peak_memory
from zoo.text.tokenizer import Tokenizer


class Session:
    """One sequence of tokens and the cache that belongs to it.

    Each reply starts from the longest prefix that the prompt shares with what the cache holds, which serves a chat's
    next turn and further samples of one prompt alike.

    Args:
        stop_ids: tokens that end a reply.
        step: runs single tokens compiled, if given.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, stop_ids: frozenset[int], step: CompiledDecoding | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._cached = CachedTokens(model, step)

    def reply(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingOptions,
        stop: Sequence[str] = (),
        sample: int = 0,
        speculation: Speculation | None = None,
    ) -> Reply:
        """Continue ``prompt_ids``. Nothing runs before the reply is iterated over.

        Args:
            stop: strings before which the text ends.
            sample: number of the sample, for its random stream.
            speculation: who drafts tokens, if anyone.

        Raises:
            InputError: the prompt is empty, or it and the new tokens do not fit into the context.
        """
        request = Request(
            prompt_ids=list(prompt_ids),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            stop_ids=self.stop_ids,
            sample=sample,
        )
        request.check(self.model.spec)
        reply = Reply(iter(()))
        reply.pieces = self._pieces(request, reply, speculation)
        return reply

    def _pieces(self, request: Request, reply: Reply, speculation: Speculation | None) -> Iterator[str]:
        writer = ReplyWriter(request, self.tokenizer, reply)
        for token in self._tokens(request, reply.stats, speculation):
            reply.stats.peak_memory = peak_memory(self._cached.device)
            if piece := writer.push(token):
                yield piece
            if writer.over:
                return

    def _tokens(self, request: Request, stats: Stats, speculation: Speculation | None) -> Iterator[int]:
        """``max_new_tokens`` ids, the cache kept in step with them."""
        started = time.perf_counter()
        prompt, n_new = list(request.prompt_ids), request.max_new_tokens
        sampler = TokenSampler(request.sampling, stream=request.sample)
        fresh = self._cached.start(prompt, len(prompt) + n_new)
        stats.prompt_tokens, stats.reused_tokens = len(prompt), len(prompt) - len(fresh)
        if speculation is None:
            tokens = decode(self._cached, fresh, prompt, sampler)
        else:
            tokens = speculate(self._cached, fresh, prompt, sampler, speculation, n_new, stats)
        for token in islice(tokens, n_new):
            elapsed = time.perf_counter() - started
            if stats.new_tokens == 0:
                stats.prefill_seconds = elapsed
            stats.decode_seconds = elapsed - stats.prefill_seconds
            stats.new_tokens += 1
            yield token


def decode(cached: CachedTokens, fresh: list[int], seen: list[int], sampler: TokenSampler) -> Iterator[int]:
    """Tokens without end. ``fresh`` is what of ``seen`` is still to run; ``seen`` grows by each token."""
    while True:
        token = sampler(cached.run(fresh)[-1], seen)
        seen.append(token)
        fresh = [token]
        yield token
