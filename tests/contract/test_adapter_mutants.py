"""The contract of adapters catches what goes wrong with them: every mutant fails the test that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo.adapters.attach as attach_module
from tests.contract.mutation import TABLE
from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.base import Adapted
from zoo.adapters.llama_adapter import Prompt
from zoo.adapters.lora import LoRALinear, LoRAPart
from zoo.api import build
from zoo.plan.sites import AdapterPlan
from zoo.testing.adapters import AdapterContract

Patch = Callable[[pytest.MonkeyPatch], None]


class LoRA(AdapterContract):
    """Mutated below."""

    component = "lora"

    def make_model(self) -> nn.Module:
        return build("llama-2-7b", n_layers=2, d_model=32, n_heads=4, d_ffn=48, vocab_size=64, max_seq_len=32, seed=0)


class Prompts(LoRA):
    """Mutated below."""

    component = "llama-adapter"


def prompts_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Prompt.forward

    def without(self: Prompt, q: Tensor) -> Tensor:
        kept, self.prompt = self.prompt, nn.Parameter(self.prompt.detach())
        y = forward(self, q)
        self.prompt = kept
        return y

    monkeypatch.setattr(Prompt, "forward", without)


def prompts_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """LitGPT's: keys and values of the first pass, which a validation makes without gradients."""
    forward = Prompt.forward

    def cached(self: Any, q: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            site, prompt = self._site[0], self.prompt
            self.kept = site.prompt_kv(prompt.to(q.dtype))
            self._site = [type("Site", (), {"n_kv_heads": site.n_kv_heads, "scale": site.scale})()]
            self._site[0].prompt_kv = lambda prompt: self.kept
        return forward(self, q)

    monkeypatch.setattr(Prompt, "forward", cached)


def gate_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Prompt.forward

    def without(self: Prompt, q: Tensor) -> Tensor:
        kept, self.gate = self.gate, nn.Parameter(self.gate.detach())
        y = forward(self, q)
        self.gate = kept
        return y

    monkeypatch.setattr(Prompt, "forward", without)


def base_unfrozen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attach_module.attach

    def unfrozen(root: nn.Module, *args: Any, **options: Any) -> AttachedAdapter:
        handle = real(root, *args, **options)
        root.get_parameter("norm.weight").requires_grad_(True)
        return handle

    monkeypatch.setattr("zoo.testing.adapters.attach", unfrozen)


def merged_twice_as_strong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRAPart, "merged", lambda self, weight, bias: (weight + 2 * self.update(), bias))


def merged_on_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """loralib's."""

    def train(self: Adapted, mode: bool = True) -> Adapted:
        if not mode and self.parts:
            part: Any = self.parts[self.active[0]] if self.active else None
            if part is not None:
                self.base.weight.data += part.update()
        return nn.Module.train(self, mode)

    monkeypatch.setattr(Adapted, "train", train)


def dropout_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    after = LoRALinear.after

    def dropped(self: LoRALinear, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return after(self, torch.nn.functional.dropout(x, 0.5, training=True), y, base)

    monkeypatch.setattr(LoRALinear, "after", dropped)


def applied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    after = LoRALinear.after
    monkeypatch.setattr(LoRALinear, "after", lambda self, x, y, base: after(self, x, after(self, x, y, base), base))


def alpha_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    after = LoRALinear.after

    def unscaled(self: LoRALinear, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        kept, self.scaling = self.scaling, 1.0
        y = after(self, x, y, base)
        self.scaling = kept
        return y

    monkeypatch.setattr(LoRALinear, "after", unscaled)


def prompts_counted_from_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a part that makes positions for its queries, without the cache's length."""
    forward = Prompt.forward

    def positioned(self: Prompt, q: Tensor) -> Tensor:
        return forward(self, q) / torch.arange(1, q.shape[1] + 1)[:, None, None]

    monkeypatch.setattr(Prompt, "forward", positioned)


def not_on_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    after = LoRALinear.after
    monkeypatch.setattr(LoRALinear, "after", lambda self, x, y, base: after(self, x, y, base) if x.shape[1] > 1 else y)


def state_without_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = AdapterPlan.__dict__["shapes"]

    def shapes(self: AdapterPlan) -> dict[str, tuple[int, ...]]:
        return dict(list(real.fget(self).items())[1:])

    monkeypatch.setattr(AdapterPlan, "shapes", property(shapes))


MUTANTS: list[tuple[Patch, type[LoRA], str]] = [
    (prompts_detached, Prompts, "test_every_parameter_learns"),
    (prompts_cached, Prompts, "test_every_parameter_learns"),
    (gate_not_trained, Prompts, "test_every_parameter_learns"),
    (base_unfrozen, LoRA, "test_nothing_else_moves"),
    (merged_twice_as_strong, LoRA, "test_merging"),
    (merged_on_eval, LoRA, "test_merging"),
    (dropout_in_evaluation, LoRA, "test_evaluation_is_deterministic"),
    (applied_twice, LoRA, "test_merging"),
    (alpha_ignored, LoRA, "test_merging"),
    (prompts_counted_from_each_call, Prompts, "test_cached_equals_uncached"),
    (not_on_single_tokens, LoRA, "test_cached_equals_uncached"),
    (state_without_a_part, LoRA, "test_the_plan_is_what_is_trained"),
]


@pytest.mark.parametrize(("patch", "contract", "test"), MUTANTS, ids=[patch.__name__ for patch, _, _ in MUTANTS])
def test_is_caught(patch: Patch, contract: type[LoRA], test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(contract(), test)()
    patch(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)) as caught:
        getattr(contract(), test)()
    said = " ".join(f"{type(caught.value).__name__}: {caught.value}".split())
    TABLE.append(("adapter", patch.__name__.replace("_", " "), test, said))


class WithoutCache(LoRA):
    """A model that takes tokens alone."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64))


def test_a_model_without_a_cache_is_skipped_and_the_reason_is_given() -> None:
    """Guards against a check that passes because it could not run."""
    with pytest.raises(pytest.skip.Exception, match="Sequential takes no cache: override cached_logits"):
        WithoutCache().test_cached_equals_uncached()
