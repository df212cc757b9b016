"""What every sampler has to do: change logits in a way that depends on nothing but what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zoo.generate.sampling import Sampler, SamplingOptions, TokenSampler
from zoo.testing.contract import Contract, not_run

SEEN = (3, 3, 7, 1)
DRAWS = 4000


class SamplerContract(Contract, standard=True):
    """A sampler made with ``options``.

    Attributes:
        keeps_likeliest: whether the likeliest token stays the likeliest while nothing has been seen, as for all steps
            that only reshape a distribution. One that bans or favours tokens says no.
    """

    kind = "sampler"
    keeps_likeliest: ClassVar[bool] = True

    def make_sampler(self) -> Sampler:
        """A new sampler."""
        made: Sampler = self.load()(**self.options)
        return made

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor | None:
        """What it should return, computed in another way."""
        return None

    def logits(self, size: int = 12, seed: int = 0) -> Tensor:
        """Some logits (V,)."""
        return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def test_the_interface(self) -> None:
        """Logits (V,) in float32 become as many, for every size of vocabulary; something stays possible."""
        for size in (8, 12, 300):
            logits_V = self.logits(size)
            changed = self.make_sampler()(logits_V, SEEN)
            assert changed.shape == logits_V.shape and changed.dtype == torch.float32, changed
            assert not changed.isnan().any() and changed.max().isfinite(), "no token is left to draw"

    def test_inputs_are_not_changed(self) -> None:
        """The logits belong to the model, the ids to the caller."""
        logits_V, seen = self.logits(), list(SEEN)
        before = logits_V.clone()
        self.make_sampler()(logits_V, seen)
        assert torch.equal(logits_V, before), "the logits are written to"
        assert seen == list(SEEN), "the ids are written to"

    def test_it_is_a_function(self) -> None:
        """The same logits and ids give the same, whatever was drawn or asked before, and torch's seed stays untouched.

        A sampler with randomness of its own would make ``--seed`` a lie.
        """
        sampler, logits_V = self.make_sampler(), self.logits()
        state = torch.random.get_rng_state()
        first = sampler(logits_V, SEEN)
        assert torch.equal(torch.random.get_rng_state(), state), "it draws from torch's random numbers"
        sampler(self.logits(seed=1), (2,))
        torch.manual_seed(99)
        assert torch.equal(sampler(logits_V, SEEN), first), "it depends on what came before, or on the seed"
        assert torch.equal(self.make_sampler()(logits_V, SEEN), first)

    def test_masked_tokens_stay_masked(self) -> None:
        """What an earlier step excluded must not come back."""
        logits_V = self.logits()
        logits_V[[2, 5]] = -math.inf
        changed = self.make_sampler()(logits_V, SEEN)
        assert changed[2] == changed[5] == -math.inf, "an excluded token can be drawn again"

    def test_greedy_is_greedy(self) -> None:
        """Temperature 0 takes the likeliest of the changed logits, whatever the seed."""
        for seed in range(20):
            logits_V = self.logits(seed=seed)
            greedy = SamplingOptions(temperature=0, seed=seed, extra=(self.make_sampler(),))
            found = TokenSampler(greedy)(logits_V, ())
            assert found == int(self.make_sampler()(logits_V, ()).argmax())
            if self.keeps_likeliest:
                assert found == int(logits_V.argmax()), "another token became the likeliest"

    def test_the_seed_is_respected(self) -> None:
        """One seed, one text; another, another."""

        def drawn(seed: int) -> list[int]:
            options = SamplingOptions(temperature=1, top_k=0, seed=seed, extra=(self.make_sampler(),))
            sampler = TokenSampler(options)
            return [sampler(self.logits(300, seed=i) / 10, ()) for i in range(30)]

        assert drawn(1) == drawn(1)
        if len(self.possible()) > 1:
            assert drawn(1) != drawn(2)

    def possible(self) -> list[int]:
        """Tokens that can be drawn."""
        return self.make_sampler()(self.logits(), ()).isfinite().nonzero()[:, 0].tolist()

    def test_the_distribution(self) -> None:
        """Drawn tokens are as frequent as the changed logits say (chi-square, 6 standard deviations)."""
        sampler, logits_V = self.make_sampler(), self.logits()
        weights = sampler(logits_V, ()).softmax(-1)
        draw = TokenSampler(SamplingOptions(temperature=1, top_k=0, seed=3, extra=(sampler,)))
        counts = torch.bincount(torch.tensor([draw(logits_V, ()) for _ in range(DRAWS)]), minlength=len(logits_V))
        assert not counts[weights == 0].any(), "an excluded token was drawn"
        often = weights * DRAWS >= 5
        freedom = int(often.sum()) - 1
        if freedom < 1:
            return
        chi_square = ((counts - weights * DRAWS)[often] ** 2 / (weights * DRAWS)[often]).sum()
        assert chi_square < freedom + 6 * math.sqrt(2 * freedom) + 6

    def test_it_is_as_expected(self) -> None:
        """Against the definition, written by the author in another way."""
        for seed in range(5):
            logits_V = self.logits(seed=seed)
            exact = self.expected(logits_V, SEEN)
            if exact is None:
                not_run("override expected with the definition")
            torch.testing.assert_close(self.make_sampler()(logits_V, SEEN), exact)
