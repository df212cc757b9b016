"""Many prompts at once: rows of one cache, padded on the left, each as if it ran alone.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoo.errors import InputError, ZooError
from zoo.generate.reply import Reply, ReplyWriter, Request
from zoo.generate.sampling import TokenSampler
from zoo.models.decoder import Decoder
from zoo.models.masks import CAUSAL, Mask
from zoo.models.memory import peak_memory
from zoo.models.rope import rotation_border
from zoo.text.tokenizer import Tokenizer

PREFILL_TOKENS = 4096
"""Tokens of all rows together that run through the model at once: bounds the memory that prompts take."""

Outcome = tuple[int, Reply | ZooError]
"""Number of a request, and its finished reply or what went wrong with this one."""


def run_requests(
    model: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], *, batch_size: int
) -> Iterator[Outcome]:
    """Answer all requests, prompts of like length together; yields each as it finishes.

    Raises:
        InputError: a request can not be served (before any work), or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    for request in requests:
        request.check(model.spec)
    # The longest first: what does not fit into memory fails at once. Equal prompts become neighbours.
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), list(requests[i].prompt_ids)))
    for group in _groups(order, requests, batch_size, rotation_border(model.spec)):
        yield from _Batch(model, [_Row(number, requests[number], tokenizer) for number in group]).run()


def _groups(
    order: Sequence[int], requests: Sequence[Request], batch_size: int, border: int | None
) -> Iterator[Sequence[int]]:
    """Which requests run together. One that may outgrow ``border`` runs alone: it would change others' rotations."""
    together = []
    for i in order:
        if border is not None and len(requests[i].prompt_ids) + requests[i].max_new_tokens > border:
            yield [i]
        else:
            together.append(i)
    for start in range(0, len(together), batch_size):
        yield together[start : start + batch_size]


class _Row:
    """One request on its way: its tokens, its text, its random stream."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer) -> None:
        self.number = number
        self.request = request
        self.seen = list(request.prompt_ids)
        self.reply = Reply(iter(()))
        self.error: ZooError | None = None
        self._writer = ReplyWriter(request, tokenizer, self.reply)
        self._sampler = TokenSampler(request.sampling, stream=request.sample)

    @property
    def over(self) -> bool:
        return self.error is not None or self._writer.over

    def step(self, logits_V: Tensor) -> None:
        """Draw the next token."""
        try:
            token = self._sampler(logits_V, self.seen)
        except ZooError as error:  # numbers that overflowed in this row are no reason to lose the others
            self.error = error
            return
        self.seen.append(token)
        self.reply.text += self._writer.push(token)


class _Batch:
    """Rows that decode together; those that finish leave."""

    def __init__(self, model: Decoder, rows: list[_Row]) -> None:
        self._model = model
        self._rows = rows
        self._device = model.device
        self._started = time.perf_counter()
        self._prefill_seconds = 0.0

    def run(self) -> Iterator[Outcome]:
        logits_BV = self._prefill()
        while True:
            for row, logits_V in zip(self._rows, logits_BV, strict=True):
                row.step(logits_V)
            self._prefill_seconds = self._prefill_seconds or time.perf_counter() - self._started
            yield from [self._outcome(row) for row in self._rows if row.over]
            staying = [i for i, row in enumerate(self._rows) if not row.over]
            if not staying:
                return
            if len(staying) < len(self._rows):
                self._rows = [self._rows[i] for i in staying]
                self._select(staying)
            if self._cache.continues(1):
                logits_BV = self._forward([[row.seen[-1]] for row in self._rows])
            else:
                logits_BV = self._prefill()

    def _prefill(self) -> Tensor:
        """Logits after all that each row has seen. A prompt that several rows have in common runs once."""
        prompts = list(dict.fromkeys(tuple(row.seen) for row in self._rows))
        longest = max(map(len, prompts))
        capacity = longest + max(row.request.max_new_tokens for row in self._rows)
        self._cache = self._model.new_cache(capacity, batch=len(prompts))
        self._pad([longest - len(prompt) for prompt in prompts])
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]  # any id: padding is hidden
        width = max(1, PREFILL_TOKENS // len(prompts)) if rotation_border(self._model.spec) is None else longest
        for start in range(0, longest, width):
            logits_BV = self._forward([row[start : start + width] for row in padded])
        if len(prompts) < len(self._rows):
            numbers = {prompt: number for number, prompt in enumerate(prompts)}
            owners = [numbers[tuple(row.seen)] for row in self._rows]
            self._select(owners)
            logits_BV = logits_BV[owners]
        return logits_BV

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> Tensor:
        tokens_BT = torch.tensor(ids, device=self._device)
        index_T = torch.arange(tokens_BT.shape[1], device=self._device) + self._cache.length
        positions_BT = (index_T - self._padding_B[:, None]).clamp(min=0)
        logits = self._model(tokens_BT, positions_BT=positions_BT, mask=self._mask, cache=self._cache, last_only=True)
        return logits[:, -1]

    def _select(self, rows: list[int]) -> None:
        self._cache.select(rows)
        self._pad(self._padding_B[rows].tolist())

    def _pad(self, lengths: list[int]) -> None:
        self._padding_B = torch.tensor(lengths, device=self._device)
        self._mask = Mask(padding_B=self._padding_B) if any(lengths) else CAUSAL

    def _outcome(self, row: _Row) -> Outcome:
        stats = row.reply.stats
        stats.prompt_tokens, stats.new_tokens = len(row.request.prompt_ids), len(row.reply.ids)
        stats.prefill_seconds = self._prefill_seconds
        stats.decode_seconds = time.perf_counter() - self._started - self._prefill_seconds
        stats.peak_memory = peak_memory(self._device)
        return row.number, row.error or row.reply
