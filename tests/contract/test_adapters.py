"""The contract of adapters: every built-in one on every family, in float32 and bfloat16, and mutants that must fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests import reference
from zoo.api import load
from zoo.models.gpt import GPT
from zoo.registry import Registry
from zoo.testing.adapters import AdapterContract

FAMILIES = (
    "gpt2", "gpt_neox", "llama-gqa", "llama-tied", "qwen2", "qwen3", "stablelm-12b", "phi", "phi3", "smollm3",
    "mistral", "gemma", "gemma2", "olmo", "olmo2", "falcon", "gpt_bigcode",
)  # fmt: skip
KEY_BIASES = ("attn.k.bias", "attn.k.v2_bias")
"""Without rotation a key's bias adds the same to all scores of a query, which a softmax does not see."""
BIASED = ("gpt2", "gpt_neox", "qwen2", "phi", "gpt_bigcode")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GPT]:
    """A tiny float32 model of every variant, filled on demand."""
    return {}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Operations on tiny tensors take longer on several threads, which wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class OnEveryFamily(AdapterContract):
    """Runs the suite on tiny models with random parameters."""

    model: GPT
    dtype: torch.dtype

    @pytest.fixture(autouse=True, params=FAMILIES)
    def family(
        self, request: pytest.FixtureRequest, models: dict[str, GPT], tmp_path: Path, registry: Registry
    ) -> None:
        """Chooses the model."""
        self.choose(request.param, models, tmp_path, registry)

    def choose(self, variant: str, models: dict[str, GPT], tmp_path: Path, registry: Registry) -> None:
        """Takes the model of a variant, which is made once."""
        if variant not in models:
            reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
            models[variant] = load(tmp_path, precision="32-true", device="cpu", registry=registry).model
        self.model = models[variant]

    @pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def choose_dtype(self, request: pytest.FixtureRequest) -> None:
        """Chooses the dtype."""
        self.dtype = request.param

    def make_model(self) -> nn.Module:
        """A copy."""
        return deepcopy(self.model).to(self.dtype)


class TestLoRA(OnEveryFamily):
    """The default targets."""

    component = "lora"
    options: ClassVar = {"r": 4}


class TestLoRAEverywhere(OnEveryFamily):
    """Linears, the embedding and the head, with biases and a norm beside."""

    component = "lora"
    options: ClassVar = {"r": 3, "targets": ("all-linear", "embed", "head"), "bias": "lora_only", "rslora": True}
    without_gradient = KEY_BIASES


class TestDoRA(OnEveryFamily):
    """Norms of the outputs."""

    component = "lora"
    options: ClassVar = {"r": 4, "alpha": 4, "dora": True, "targets": ("all-linear",)}
    start_tolerance: ClassVar = {torch.float32: 1e-5, torch.bfloat16: 0.1}


class TestPiSSA(OnEveryFamily):
    """Principal singular vectors, with what is taken off the weight kept apart."""

    component = "lora"
    options: ClassVar = {"r": 4, "init": "pissa", "targets": ("attn.q", "attn.v", "mlp.down"), "alpha": 3}
    start_tolerance: ClassVar = {torch.float32: 1e-5, torch.bfloat16: 0.02}


class TestLoRAOfParts(OnEveryFamily):
    """Parts of the outputs, of other ranks or without an update."""

    component = "lora"
    options: ClassVar = {"r": 4, "targets": ("attn.q", "attn.v"), "parts": {"attn.q": (3, 0), "attn.v": (0, 1, 2, 1)}}


class TestLoRAOfOneA(OnEveryFamily):
    """Projections that share an A, as where they are fused; its rank may be above that of one of them."""

    component = "lora"
    options: ClassVar = {"r": 10, "targets": ("attn.q", "attn.k", "attn.v"), "share": (("attn.q", "attn.k", "attn.v"),)}


class TestLLaMAAdapter(OnEveryFamily):
    """Prompts."""

    component = "llama-adapter"
    options: ClassVar = {"prompt_length": 5}


class TestLLaMAAdapterV2(OnEveryFamily):
    """Prompts, norms, scales and biases."""

    component = "llama-adapter-v2"
    options: ClassVar = {"prompt_length": 5}
    without_gradient = KEY_BIASES


class TestLLaMAAdapterV2OnInputs(OnEveryFamily):
    """The form that merges."""

    component = "llama-adapter-v2"
    options: ClassVar = {"prompts": False, "scale_on": "input", "norms": False}
    without_gradient = KEY_BIASES


class TestIA3(OnEveryFamily):
    """Factors."""

    component = "ia3"


class TestFull(OnEveryFamily):
    """Everything."""

    component = "full"
    without_gradient = KEY_BIASES


class TestNorm(OnEveryFamily):
    """Norms, where they have parameters."""

    @pytest.fixture(autouse=True, params=[family for family in FAMILIES if family != "olmo"])
    def family(
        self, request: pytest.FixtureRequest, models: dict[str, GPT], tmp_path: Path, registry: Registry
    ) -> None:
        self.choose(request.param, models, tmp_path, registry)

    component = "norm"


class TestBitFit(OnEveryFamily):
    """Biases, where there are any."""

    @pytest.fixture(autouse=True, params=BIASED)
    def family(
        self, request: pytest.FixtureRequest, models: dict[str, GPT], tmp_path: Path, registry: Registry
    ) -> None:
        self.choose(request.param, models, tmp_path, registry)

    component = "bitfit"
    without_gradient = KEY_BIASES


class TestLoRAOnTransformers(AdapterContract):
    """A model that zoo did not make, with a cache of its own."""

    component = "lora"
    options: ClassVar = {"r": 4, "targets": ("q_proj", "v_proj", "down_proj")}

    def make_model(self) -> nn.Module:
        return reference.tiny_model(*reference.VARIANTS["llama-gqa"])

    def cached_logits(self, model: nn.Module, lengths: Sequence[int]) -> Tensor:
        """Through transformers' cache."""
        held, logits = None, []
        for piece in self.tokens(model).split(list(lengths), dim=1):
            result: Any = model(piece, past_key_values=held, use_cache=True)
            held = result.past_key_values
            logits.append(result.logits)
        return torch.cat(logits, dim=1)
