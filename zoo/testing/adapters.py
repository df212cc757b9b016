"""What every adapter has to do on every model. Subclass `AdapterContract`, and pytest runs its checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from zoo.adapters.attach import AttachedAdapter, attach
from zoo.adapters.choose import choose_adapter
from zoo.adapters.proof import randomize, without_gradient
from zoo.attention.sdpa import SDPA
from zoo.errors import InputError
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.spec import ModelSpec
from zoo.testing.contract import Contract, require_gpu

__all__ = ["AdapterContract", "digests", "randomize"]


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor's bytes."""
    return {
        name: hashlib.sha256(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


SPEC = ModelSpec.from_dict(
    {
        **{"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ffn": 48, "vocab_size": 64, "max_seq_len": 32},
        **{"norm": "layer", "norm_eps": 1e-5, "norm_bias": True, "rope": {"n_dims": 4}},
        **dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), True),
    }
)
"""A model that has all that an adapter may look for: biases, norms, rotation."""


class AdapterContract(Contract, standard=True):
    """The adapter on a model, by default a small decoder; `make_model` may give it any other.

    Attributes:
        options: the options to test it with.
        start_tolerance: largest difference of logits that a fresh adapter may make, by their dtype; else none at all.
        cache_tolerance: largest difference that decoding with a cache may make, as a part of the largest logit.
        without_gradient: names of trainable parameters, or ends of them, that mathematics gives no gradient.
    """

    kind = "adapter"
    start_tolerance: ClassVar[dict[torch.dtype, float]] = {}
    cache_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.bfloat16: 0.05}
    without_gradient: ClassVar[tuple[str, ...]] = ()

    def make_model(self) -> nn.Module:
        """A small model with random weights, the same at every call."""
        model = GPT(SPEC, SDPA())
        init_weights(model, torch.Generator().manual_seed(0))
        return model

    def tokens(self, model: nn.Module) -> Tensor:
        """Some input (B, T), always the same."""
        embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        ids = torch.randint(embedding.num_embeddings, (2, 12), generator=torch.Generator().manual_seed(1))
        return ids.to(next(model.parameters()).device)

    def logits(self, model: nn.Module) -> Tensor:
        """The result (B, T, V) for some input, always the same."""
        result: Any = model(self.tokens(model))
        logits: Tensor = getattr(result, "logits", result)
        return logits

    def cached_logits(self, model: nn.Module, lengths: Sequence[int]) -> Tensor | None:
        """As `logits`, for pieces of these lengths that follow each other through a cache; ``None``: it takes none.

        Override it together with `logits`, or for models whose caches are not made by ``new_cache``, as zoo's are.
        """
        new_cache: Any = getattr(model, "new_cache", None)
        if new_cache is None:
            return None
        tokens_BT = self.tokens(model)
        cache = new_cache(tokens_BT.shape[1], batch=tokens_BT.shape[0])
        return torch.cat([model(piece, cache=cache) for piece in tokens_BT.split(list(lengths), dim=1)], dim=1)

    def attach(self, model: nn.Module, *, name: str = "default", seed: int = 3) -> AttachedAdapter:
        """The adapter on the model."""
        torch.manual_seed(seed)
        return attach(model, choose_adapter(self.component, self.options, self.registry()), name=name)

    def loss(self, model: nn.Module) -> Tensor:
        """A scalar that depends on every logit in its own way."""
        logits = self.logits(model).float()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
        return (logits.log_softmax(-1) * weights).sum() / logits.shape[-1]

    def assert_as_at_start(self, found: Tensor, expected: Tensor) -> None:
        """To the bit, or within `start_tolerance`."""
        assert (found - expected).abs().max() <= self.start_tolerance.get(found.dtype, 0.0)

    def test_a_fresh_adapter_changes_nothing(self) -> None:
        model = self.make_model().eval()
        with torch.no_grad():
            before = self.logits(model)
            self.attach(model)
            self.assert_as_at_start(self.logits(model), before)

    def test_the_plan_is_what_is_trained(self) -> None:
        handle = self.attach(self.make_model())
        assert handle.plan.shapes == {name: tuple(p.shape) for name, p in handle.trainable().items()}
        trained = {id(p) for p in handle.root.parameters() if p.requires_grad}
        assert trained == {id(p) for p in handle.trainable().values()}

    def test_every_parameter_learns(self) -> None:
        """After a pass without gradients, which must leave nothing behind; twice, as accumulation does."""
        model = self.make_model()
        handle = self.attach(model)
        model.eval()
        with torch.no_grad():
            self.logits(model)
        model.train()
        for _ in range(2):
            silent = without_gradient(handle, lambda: self.loss(model))
            assert not [name for name in silent if not name.endswith(self.without_gradient)]

    def test_nothing_else_moves(self) -> None:
        model = self.make_model().train()
        handle = self.attach(model)
        randomize(handle)
        trained = {id(p) for p in handle.trainable().values()}
        frozen = {n: p for n, p in (*model.named_parameters(), *model.named_buffers()) if id(p) not in trained}
        before, state = digests(frozen), digests(handle.state_dict())
        self.loss(model).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad.sign())
        assert digests(frozen) == before
        moved = digests(handle.state_dict())
        assert all(moved[n] != state[n] for n in handle.trainable() if not n.endswith(self.without_gradient))

    def test_evaluation_is_deterministic(self) -> None:
        model = self.make_model()
        handle = self.attach(model)
        randomize(handle)
        model.eval()
        with torch.no_grad():
            assert torch.equal(self.logits(model), self.logits(model))

    def test_cached_equals_uncached(self) -> None:
        """A prompt, then token by token, as in generation: an adapter may not depend on how a sequence is cut."""
        model = self.make_model().eval()
        handle = self.attach(model)
        randomize(handle)
        with torch.no_grad():
            whole = self.logits(model)
            cached = self.cached_logits(model, [5] + [1] * (whole.shape[1] - 5))
            if cached is None:
                pytest.skip(f"{type(model).__name__} takes no cache: override cached_logits for a model that does")
            difference = (cached - whole).abs().max() / whole.abs().max().clamp(min=1)
            assert difference <= self.cache_tolerance[whole.dtype]

    def test_merging(self) -> None:
        model = self.make_model().eval()
        handle = self.attach(model)
        randomize(handle)
        if reasons := handle.unmergeable():
            with pytest.raises(InputError, match="can not be merged"):
                handle.merge()
            assert all(reasons)
            return
        before = digests(dict(model.named_parameters()))
        with torch.no_grad():
            apart = self.logits(model)
            model.train().eval()  # must not merge
            handle.merge()
            merged = self.logits(model)
            tolerance = 1e-5 if apart.dtype == torch.float32 else 0.2
            assert (merged - apart).abs().max() <= tolerance * apart.abs().max().clamp(min=1)
            with pytest.raises(InputError, match="already"):
                handle.merge()
            handle.unmerge()
            assert digests(dict(model.named_parameters())) == before
            assert torch.equal(self.logits(model), apart)

    def test_disabled(self) -> None:
        model = self.make_model().eval()
        with torch.no_grad():
            before = self.logits(model)
            handle = self.attach(model)
            randomize(handle)
            adapted = self.logits(model)
            assert not torch.equal(adapted, before)
            if not handle.adapter.keeps_original:
                with pytest.raises(InputError, match="keeps no copy"), handle.disabled():
                    pass
                return
            with handle.disabled():
                assert torch.equal(self.logits(model), before)
            assert torch.equal(self.logits(model), adapted)

    def test_state(self) -> None:
        model, other = self.make_model().eval(), self.make_model().eval()
        handle, second = self.attach(model), self.attach(other, seed=4)
        randomize(handle)
        second.load_state_dict(handle.state_dict())
        with torch.no_grad():
            assert torch.equal(self.logits(other), self.logits(model))

    def test_a_state_that_does_not_fit(self) -> None:
        handle = self.attach(self.make_model())
        before, state = digests(handle.state_dict()), {n: t + 1 for n, t in handle.state_dict().items()}
        key = next(iter(state))
        missing = {n: t for n, t in state.items() if n != key}
        for wrong in (missing, state | {"spare": state[key]}, state | {key: state[key][..., None]}):
            with pytest.raises(InputError, match="spare" if "spare" in wrong else key):
                handle.load_state_dict(wrong)
        assert digests(handle.state_dict()) == before

    def test_detaching(self) -> None:
        model = self.make_model().eval()
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        with torch.no_grad():
            before = self.logits(model)
            handle = self.attach(model)
            if handle.adapter.keeps_original:
                randomize(handle)
            handle.detach()
            assert torch.equal(self.logits(model), before)
            self.assert_as_at_start((self.attach(model), self.logits(model))[1], before)
        self.attach(model, name="other").detach()
        left = [name for name, _ in model.named_parameters(remove_duplicate=False) if ".parts." not in name]
        assert len(left) == len(names)

    def test_two_on_one_model(self) -> None:
        """Each can be switched off alone, and a name is taken once."""
        model = self.make_model().eval()
        first = self.attach(model, name="first")
        randomize(first)
        with torch.no_grad():
            alone = self.logits(model)
            second = self.attach(model, name="second", seed=5)
            if not first.plan.unfrozen:  # what both train, both change
                randomize(second, seed=6)
                assert not torch.equal(self.logits(model), alone)
                second.deactivate()
            self.assert_as_at_start(self.logits(model), alone)
            with pytest.raises(InputError, match="'first' already"):
                self.attach(model, name="first")

    def test_on_a_gpu(self) -> None:
        """Parameters are made where the model is, and learn there."""
        self.load()
        require_gpu()
        model = self.make_model().to("cuda")
        handle = self.attach(model)
        assert {p.device.type for p in handle.trainable().values()} == {"cuda"}
        silent = without_gradient(handle, lambda: self.loss(model))
        assert not [name for name in silent if not name.endswith(self.without_gradient)]
