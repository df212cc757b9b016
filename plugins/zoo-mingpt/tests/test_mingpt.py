"""A module that zoo did not write, in zoo: adapters by the contract, files, merging, training and generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import zoo_mingpt
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.testing import assert_close
from zoo_mingpt.family import spec_from_config
from zoo_mingpt.model import MinGPT

import zoo
from zoo.convert.export import choose_writer, export_model
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.merging import merge_adapter
from zoo.models.decoder import WholeSequence
from zoo.plugins import PluginSelection, load_zoo
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry
from zoo.testing.adapters import AdapterContract, randomize
from zoo.text.tokenizer import Tokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyz.,'\n"
TINY: dict[str, Any] = {"vocab_size": len(LETTERS), "max_seq_len": 32}
CONFIG = {"vocab_size": len(LETTERS), "block_size": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "targets": ("qkv", "narrow", "head"), "parts": {"qkv": (4, 0, 2)}},
    "llama-adapter": {"prompt_length": 5},
    "llama-adapter-v2": {"prompt_length": 5},
    "ia3": {"targets": ("qkv",), "feedforward": ("narrow",)},
    "full": {},
    "norm": {},
    "bitfit": {},
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    """What zoo itself registers and what this plugin does, whether it is installed or only on the path."""
    items: list[Component | ModelEntry] = []
    origin = Origin(distribution="zoo-mingpt")
    zoo_mingpt.zoo_register_families(Registrar("family", origin, items))
    zoo_mingpt.zoo_register_models(ModelRegistrar(origin, items))
    registry = load_zoo(PluginSelection(only=frozenset())).registry
    for item in items:
        registry.add(item)
    return registry


def make(dtype: torch.dtype = torch.float32) -> MinGPT:
    """A tiny one with every parameter random, the same at every call."""
    torch.manual_seed(0)
    model = MinGPT(n_layers=3, n_heads=3, d_model=48, dropout=0.0, **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(len(LETTERS), (batch, length), generator=torch.Generator().manual_seed(1))


class OnMinGPT(AdapterContract):
    @pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def choose_dtype(self, request: pytest.FixtureRequest) -> None:
        self.dtype = request.param

    def make_model(self) -> nn.Module:
        return make(self.dtype)

    def logits(self, model: nn.Module) -> Tensor:
        logits: Tensor = model(ids())[0]
        return logits

    def cached_logits(self, model: nn.Module, lengths: Sequence[int]) -> Tensor:
        """The module has no cache: zoo keeps the tokens, and runs all of them."""
        decoder = WholeSequence(model, spec_from_config({"n_layer": 3, "n_head": 3, "n_embd": 48, **CONFIG}))
        cache = decoder.new_cache(12, batch=2)
        return torch.cat([decoder(piece, cache=cache) for piece in ids().split(list(lengths), dim=1)], dim=1)


class TestLoRA(OnMinGPT):
    component = "lora"
    options: ClassVar = OPTIONS["lora"]


class TestLLaMAAdapter(OnMinGPT):
    component = "llama-adapter"
    options: ClassVar = OPTIONS["llama-adapter"]


class TestLLaMAAdapterV2(OnMinGPT):
    component = "llama-adapter-v2"
    options: ClassVar = OPTIONS["llama-adapter-v2"]


class TestIA3(OnMinGPT):
    component = "ia3"
    options: ClassVar = OPTIONS["ia3"]


class TestFull(OnMinGPT):
    component = "full"


class TestNorm(OnMinGPT):
    component = "norm"


class TestBitFit(OnMinGPT):
    component = "bitfit"


def randomised(registry: Registry) -> MinGPT:
    """A gpt-nano with every parameter random, the same at every call."""
    model: MinGPT = zoo.build("gpt-nano", registry=registry, seed=3, **TINY)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, registry: Registry) -> Path:
    """A directory with a randomised gpt-nano and a tokenizer of single letters."""
    tokens = Tokens(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    zoo.save(randomised(registry), tmp_path / "model", like="gpt-nano", tokenizer=tokenizer, registry=registry, **TINY)
    return tmp_path / "model"


def test_what_was_saved_is_loaded(saved: Path, registry: Registry) -> None:
    lm = zoo.load(saved, registry=registry, device="cpu")
    assert type(lm.model) is MinGPT
    assert_close(lm.model(ids())[0], randomised(registry)(ids())[0], atol=0.0, rtol=0.0)
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["block_size"]) == ("mingpt", 3, 32)
    assert lm.generate("once upon", max_new_tokens=8, temperature=0.0) == greedy(lm.model, "once upon", 8)


def greedy(model: nn.Module, prompt: str, n_tokens: int) -> str:
    """By hand."""
    tokens = [LETTERS.index(letter) for letter in prompt]
    for _ in range(n_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return "".join(LETTERS[token] for token in tokens[len(prompt) :])


def test_a_batch_and_a_continuation(saved: Path, registry: Registry) -> None:
    """Guards the padding that the module does not know, and tokens that are kept in place of keys and values."""
    lm = zoo.load(saved, registry=registry, device="cpu")
    prompts = ["a", "once upon a", "the"]
    replies = lm.generate_batch(prompts, max_new_tokens=6, temperature=0.0)
    assert [reply.text for reply in replies] == [greedy(lm.model, prompt, 6) for prompt in prompts]
    drafted = lm.generate("the the the", max_new_tokens=9, temperature=0.0, drafter=lm.drafter())
    assert drafted == greedy(lm.model, "the the the", 9)
    with pytest.raises(InputError, match="32"):
        lm.generate("a" * 40, max_new_tokens=4)


@pytest.mark.parametrize("adapter", OPTIONS)
def test_adapters_train_and_come_back(adapter: str, saved: Path, registry: Registry, tmp_path: Path) -> None:
    """Guards the whole life of an adapter on somebody's module: learning, its directory, generation with it."""
    torch.manual_seed(0)
    lm = zoo.load(saved, registry=registry, device="cpu")
    handle = lm.adapt(adapter, **OPTIONS[adapter])
    optimizer = torch.optim.AdamW(handle.trainable().values(), lr=0.02)
    losses = []
    for _ in range(20):
        _, loss = lm.model(ids(4, 16), ids(4, 16).roll(-1, dims=1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    handle.save(tmp_path / "adapter")
    again = zoo.load(saved, adapters=[tmp_path / "adapter"], registry=registry, device="cpu")
    assert_close(again.model(ids())[0], lm.model(ids())[0], atol=0.0, rtol=0.0)
    text = again.generate("once", max_new_tokens=8, temperature=0.0)
    assert text == greedy(lm.model, "once", 8)


def test_merging(saved: Path, registry: Registry, tmp_path: Path) -> None:
    lm = zoo.load(saved, registry=registry, device="cpu")
    handle = lm.adapt("lora", **OPTIONS["lora"])
    randomize(handle)
    handle.save(tmp_path / "adapter")
    merged = merge_adapter(open_checkpoint(saved, registry), tmp_path / "adapter", tmp_path / "out", registry=registry)
    assert merged.difference < 1e-4
    plain = zoo.load(tmp_path / "out", registry=registry, device="cpu")
    assert_close(plain.model(ids())[0], lm.model(ids())[0], atol=1e-4, rtol=1e-4)


def test_bad_input(saved: Path, registry: Registry, tmp_path: Path) -> None:
    """Guards what only zoo's decoder can do, and files and specs that are not this module's."""
    options: list[dict[str, Any]] = [{"quantize": "int8"}, {"attention": "eager"}, {"compile": True}]
    for option in options:
        with pytest.raises(InputError, match=f"--{next(iter(option))} can not be used"):
            zoo.load(saved, registry=registry, device="cpu", **option)
    with pytest.raises(InputError, match="has only"):
        zoo.build("gpt-nano", registry=registry, tie_embeddings=True, **TINY)
    model = zoo.build("gpt-nano", registry=registry, **TINY)
    with pytest.raises(InputError, match=r"tokens.weight is \(31, 48\)"):
        zoo.save(model, tmp_path / "other", like="gpt-nano", registry=registry)
    with pytest.raises(InputError, match=r"attention\.qkv"):
        zoo.adapt(model, "lora", targets=["attn.q"])
    for name, why in (("x.gguf", "'mingpt' as GGUF"), ("x", "no learned positions")):
        _, writer = choose_writer("gguf" if name.endswith("gguf") else "litgpt", tmp_path / name, registry)
        with pytest.raises(InputError, match=why):
            export_model(open_checkpoint(saved, registry), tmp_path / name, writer=writer)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"n_embd": 96}))
    with pytest.raises(FileFormatError, match="has shape"):
        zoo.load(saved, registry=registry, device="cpu")
