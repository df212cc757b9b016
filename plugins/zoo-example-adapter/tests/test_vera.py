"""VeRA keeps the contract of adapters, the contract catches mutants of it, and it computes what `peft` computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the hub

import peft
import pytest
import torch
import transformers
import zoo_example_adapter
from torch import Tensor, nn
from torch.testing import assert_close
from zoo_example_adapter.options import VeRAOptions
from zoo_example_adapter.vera import VeRA, VeRAPart

import zoo
from zoo.errors import InputError, UnknownNameError
from zoo.plan.sites import sites_of_spec
from zoo.plugins import PluginSelection, load_zoo
from zoo.registrar import Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry
from zoo.testing.adapters import AdapterContract, randomize

SMALL: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32, "seed": 0}


def make_registry() -> Registry:
    """What zoo itself registers and what this plugin does, whether it is installed or only on the path."""
    items: list[Component | ModelEntry] = []
    zoo_example_adapter.zoo_register_adapters(Registrar("adapter", Origin(distribution="zoo-example-adapter"), items))
    registry = load_zoo(PluginSelection(only=frozenset())).registry
    for item in items:
        registry.add(item)
    return registry


class TestVeRA(AdapterContract):
    """Every linear of a Llama."""

    component = "vera"
    options: ClassVar = {"r": 8}

    def registry(self) -> Registry:
        return make_registry()

    def make_model(self) -> nn.Module:
        return zoo.build("llama-2-7b", n_kv_heads=2, **SMALL)


class TestBFloat16(TestVeRA):
    """Weights in bfloat16."""

    def make_model(self) -> nn.Module:
        return super().make_model().to(torch.bfloat16)


class TestTiedHead(TestVeRA):
    """A GPT-2's linears and its head, which can not be merged."""

    options: ClassVar = {"r": 8, "targets": ("all-linear", "head")}

    def make_model(self) -> nn.Module:
        return zoo.build("gpt2", **SMALL)


def starts_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    init = VeRAPart.__init__

    def noisy(self: VeRAPart, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        nn.init.normal_(self.vera_b)

    monkeypatch.setattr(VeRAPart, "__init__", noisy)


def matrices_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(self: VeRA, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randn(self.options.r, shape[1]), torch.randn(shape[0], self.options.r)

    monkeypatch.setattr(VeRA, "_random", drawn)


def matrices_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        VeRAPart, "register_buffer", lambda self, name, A, persistent: setattr(self, name, nn.Parameter(A.clone()))
    )


def d_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(self: VeRAPart, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        inner = nn.functional.linear(x, self.A) * self.vera_d.detach()
        return y + nn.functional.linear(inner, self.B) * self.vera_b

    monkeypatch.setattr(VeRAPart, "after", after)


def merged_without_d(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        VeRAPart, "merged", lambda self, weight, bias: (weight + self.vera_b[:, None] * self.B @ self.A, bias)
    )


def prompts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    after = VeRAPart.after
    monkeypatch.setattr(VeRAPart, "after", lambda self, x, y, base: after(self, x, y, base) if x.shape[1] > 1 else y)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    starts_with_noise: "test_a_fresh_adapter_changes_nothing",
    matrices_without_a_seed: "test_state",
    matrices_trained: "test_the_plan_is_what_is_trained",
    d_detached: "test_every_parameter_learns",
    merged_without_d: "test_merging",
    prompts_only: "test_cached_equals_uncached",
}


@pytest.mark.parametrize(("mutate", "test"), MUTANTS.items(), ids=[mutate.__name__ for mutate in MUTANTS])
def test_the_contract_catches(
    mutate: Callable[[pytest.MonkeyPatch], None], test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a contract that this adapter passes because it tests nothing of it."""
    getattr(TestVeRA(), test)()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        getattr(TestVeRA(), test)()


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
def test_it_is_pefts() -> None:
    """Guards the formula, the random matrices of a seed, and the start of d: logits and gradients, all randomised."""
    theirs: Any = peft.get_peft_model(
        tiny_llama(), peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], projection_prng_key=7)
    )
    ours = tiny_llama()
    handle = zoo.adapt(ours, "vera", registry=make_registry(), r=8, targets=["q_proj", "v_proj"], seed=7)
    names = {"vera_lambda_d": "vera_d", "vera_lambda_b": "vera_b"}
    pairs = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            site, kind = name.removeprefix("base_model.model.").removesuffix(".default").rsplit(".", 1)
            pairs[f"{site}.{names[kind]}"] = parameter
    assert pairs.keys() == handle.trainable().keys()
    assert all(torch.equal(p, handle.trainable()[name]) for name, p in pairs.items())
    randomize(handle)
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(handle.trainable()[name])
    ids = torch.randint(64, (2, 12))
    found, expected = ours(ids).logits, theirs.eval()(ids).logits
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, tiny_llama()(ids).logits, atol=1e-3)
    weights = torch.randn(expected.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in handle.trainable().items():
        assert pairs[name].grad.abs().max() > 1e-3
        assert_close(parameter.grad, pairs[name].grad, atol=1e-4, rtol=1e-4)


def test_files(tmp_path: Path) -> None:
    """Guards what is stored: the factors, and the seed that the matrices come from."""
    registry, model, other = make_registry(), zoo.build("gpt2", **SMALL), zoo.build("gpt2", **SMALL)
    handle = zoo.adapt(model, "vera", registry=registry, r=8, seed=5, targets=["attn.q", "mlp.up"])
    randomize(handle)
    assert handle.save(tmp_path) == []
    again = zoo.load_adapter(other, tmp_path, registry=registry)
    assert again.adapter.options == VeRAOptions(r=8, seed=5, targets=("attn.q", "mlp.up"))
    ids = torch.randint(64, (2, 12))
    assert torch.equal(model.eval()(ids), other.eval()(ids))


def test_the_matrices_are_there_once() -> None:
    """Guards the point of VeRA: memory that does not grow with the layers."""
    model = zoo.build("gpt2", **SMALL)
    zoo.adapt(model, "vera", registry=make_registry(), r=8, targets=["attn.q", "attn.v"])
    parts = [module for module in model.modules() if isinstance(module, VeRAPart)]
    assert len(parts) == 4
    assert len({part.A.data_ptr() for part in parts}) == len({part.B.data_ptr() for part in parts}) == 1


def test_the_count() -> None:
    """Guards the plan: D_out + R for each linear, 0.02% of a Llama's weights."""
    sites = sites_of_spec(make_registry().model("llama-2-7b").spec)
    per_layer = 4 * 4096 + 2 * 11008 + 4096 + 7 * 256
    assert VeRAOptions().plan(sites).n_trainable == 32 * per_layer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, InputError, "a rank of 0"),
        ({"targets": ["embed"]}, UnknownNameError, "'embed'"),
        ({"rank": 4}, UnknownNameError, "option of adapter 'vera' is named 'rank'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        zoo.adapt(zoo.build("gpt2", **SMALL), "vera", registry=make_registry(), **options)
