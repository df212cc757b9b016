"""Speculative decoding (arXiv 2211.17192): cheap drafts, verified by the model in one forward, with nothing lost.

Shape letters: T tokens, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.generate.cached import CachedTokens
from zoo.generate.reply import Stats
from zoo.generate.sampling import TokenSampler
from zoo.models.decoder import Decoder
from zoo.models.rope import rotation_border
from zoo.text.tokenizer import Tokenizer

DEFAULT_DRAFT_TOKENS = 5


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and the distributions that they were drawn from."""

    tokens: list[int]
    probs_KV: Tensor
    """float32, on the CPU."""


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, ids: Sequence[int], k: int, sampler: TokenSampler) -> Draft:
        """At most ``k`` tokens to follow ``ids``; none where it has no idea.

        Args:
            sampler: the reply's own: a draft is drawn after the same steps, from the same random stream.
        """


@dataclass(frozen=True)
class Speculation:
    """Who drafts, and how many tokens ahead."""

    drafter: Drafter
    draft_tokens: int = DEFAULT_DRAFT_TOKENS

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise InputError(f"draft_tokens must be at least 1, not {self.draft_tokens}.")


class NgramDrafter:
    """Proposes what followed the last tokens when they stood in the text before. Good where texts repeat themselves.

    Args:
        longest, shortest: how many last tokens must have stood together; longer matches are tried first.
    """

    def __init__(self, vocab_size: int, *, longest: int = 3, shortest: int = 2) -> None:
        self._vocab_size = vocab_size
        self._lengths = range(longest, shortest - 1, -1)

    def propose(self, ids: Sequence[int], k: int, sampler: TokenSampler) -> Draft:
        """What followed the latest match: certain of itself, so its distributions are point masses."""
        tokens = list(self._continuation(list(ids))[:k])
        index = torch.tensor(tokens, dtype=torch.int64)
        return Draft(tokens, F.one_hot(index, self._vocab_size).float())

    def _continuation(self, ids: list[int]) -> list[int]:
        for n in self._lengths:
            last = ids[-n:]
            for end in range(len(ids) - 1, n - 1, -1):
                if ids[end - 1] == last[-1] and ids[end - n : end] == last:
                    return ids[end:]
        return []


class ModelDrafter:
    """A smaller model of the same vocabulary.

    Args:
        tokenizer: the draft model's.
        target, target_tokenizer: whom it drafts for.

    Raises:
        InputError: the tokenizers have different tokens.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, target: Decoder, target_tokenizer: Tokenizer) -> None:
        ours, theirs = tokenizer.backend.get_vocab(), target_tokenizer.backend.get_vocab()
        if ours != theirs:
            raise InputError(
                f"the draft model has another vocabulary: {len(ours.items() ^ theirs.items())} entries differ.",
                fix="Take a smaller model of the same family, with the same tokenizer.",
            )
        self._cached = CachedTokens(model)
        self._vocab_size = target.spec.vocab_size

    def propose(self, ids: Sequence[int], k: int, sampler: TokenSampler) -> Draft:
        """Draws ``k`` tokens, fewer where its own context ends."""
        spec = self._cached.model.spec
        k = min(k, spec.max_seq_len - len(ids))
        tokens: list[int] = []
        probs = [torch.empty(0, self._vocab_size)]
        if k < 1 or max(ids) >= spec.vocab_size:  # tables may be padded to different sizes
            return Draft(tokens, probs[0])
        fresh = self._cached.start(ids, len(ids) + k)
        for _ in range(k):
            logits_V = self._of_target_size(self._cached.run(fresh)[-1])
            probs_V = sampler.probabilities(logits_V, [*ids, *tokens])
            fresh = [sampler.draw(probs_V)]
            tokens += fresh
            probs.append(probs_V[None])
        return Draft(tokens, torch.cat(probs))

    def _of_target_size(self, logits_V: Tensor) -> Tensor:
        kept = logits_V[: self._vocab_size]
        return F.pad(kept, (0, self._vocab_size - len(kept)), value=-torch.inf)


def speculate(
    cached: CachedTokens,
    fresh: list[int],
    seen: list[int],
    sampler: TokenSampler,
    speculation: Speculation,
    max_new_tokens: int,
    stats: Stats,
) -> Iterator[int]:
    """``max_new_tokens`` ids, distributed as those of `zoo.generate.decode.decode`; arguments as there."""
    border = rotation_border(cached.model.spec)
    new = [sampler(cached.run(fresh)[-1], seen)]
    while True:
        seen += new
        max_new_tokens -= len(new)
        yield from new
        if max_new_tokens == 0:
            return
        k = min(speculation.draft_tokens, max_new_tokens - 1)  # one more comes from the model itself
        if border is not None and len(seen) <= border:
            k = min(k, border - len(seen))  # beyond it, the model would judge all of them by other rotations
        draft = speculation.drafter.propose(seen, k, sampler)
        logits_TV = cached.run([seen[-1], *draft.tokens], last_only=False)
        new = verify(draft, logits_TV, seen, sampler)
        cached.truncate(len(seen) + len(new) - 1)
        stats.drafted_tokens += len(draft.tokens)
        stats.accepted_tokens += len(new) - 1


def verify(draft: Draft, logits_TV: Tensor, seen: Sequence[int], sampler: TokenSampler) -> list[int]:
    """The drafted tokens up to the first that is refused, and one more from the model.

    A token drawn from q is kept with probability min(1, p/q), else replaced by one from max(0, p - q), which makes the
    result distributed as p. Greedy, p is a point mass: only the likeliest token is kept.

    Args:
        logits_TV: the model's, before each of the K drafted tokens and after the last: T = K + 1.
    """
    kept: list[int] = []
    for token, q_V, logits_V in zip(draft.tokens, draft.probs_KV, logits_TV[:-1], strict=True):
        p_V = sampler.probabilities(logits_V, [*seen, *kept])
        if sampler.uniform() * float(q_V[token]) >= float(p_V[token]):
            rest_V = (p_V - q_V).clamp(min=0)
            # Where p and q are equal but for rounding, nothing may be left.
            return [*kept, sampler.draw(rest_V if rest_V.any() else p_V)]
        kept.append(token)
    return [*kept, sampler(logits_TV[-1], [*seen, *kept])]
