"""The choices of a recipe against each other, before anything is built: every refusal has its reason, all at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.contract.mutation import registry_with
from zoo.attention.base import AttentionRequest
from zoo.attention.eager import Eager
from zoo.convert.export import export_model
from zoo.convert.load import load_model
from zoo.errors import InputError, UnavailableError, ZooError
from zoo.families.base import Family
from zoo.registry import Component, DeviceNeeds, Origin, Registry
from zoo.runs.composition import compose
from zoo.testing.models import checkpoint_of, random_model, shrunk
from zoo.train.recipe import Recipe

HERE = "tests.unit.test_composition"


class NoDocuments(Eager):
    """A backend that can not keep packed samples apart."""

    def supports(self, request: AttentionRequest) -> list[str]:
        return ["it knows no documents"] if "documents" in request.mask_features else []


class HalfOnly(Eager):
    """A backend with kernels in half precision."""

    def supports(self, request: AttentionRequest) -> list[str]:
        return [] if request.dtype == torch.bfloat16 else [f"it computes in bfloat16, not {request.dtype}"]


def _component(kind: str, name: str, target: str, **more: Any) -> Component:
    return Component(
        kind=kind, name=name, target=target, help="h", origin=Origin(distribution="others", version="1"), **more
    )


@pytest.fixture(scope="module")
def choices() -> Registry:
    """The built-ins, and others' components."""
    return registry_with(
        _component("attention", "no-documents", f"{HERE}:NoDocuments"),
        _component("attention", "half-only", f"{HERE}:HalfOnly"),
        _component("precision", "cuda-only", "zoo.precision.builtin:BF16_TRUE", needs=DeviceNeeds(accelerator="cuda")),
        _component("family", "mutant", "tests.contract.mutants.family:LEAKY", matches=("mutant",)),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    reference.save_tiny_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, choices: Registry) -> Path:
    """A model that is a module of its family's own."""
    family: Family = replace(choices.load("family", "mutant"), model_type="mutant")
    family = replace(family, write_config=lambda spec: {**write(spec), "model_type": "mutant"})
    spec = shrunk(choices.model("llama-2-7b").spec)
    path = tmp_path_factory.mktemp("own") / "model"
    export_model(checkpoint_of(family, random_model(family, spec), spec, path), path)
    return path


def write(spec: Any) -> dict[str, Any]:
    from zoo.families.llama import LLAMA

    return LLAMA.write_config(spec)


def recipe(model: Path | str, **changes: Any) -> Recipe:
    return Recipe.model_validate({"model": str(model), "data": "rows.jsonl", "out": "run", "device": "cpu", **changes})


def refusal(choices: Registry, model: Path | str, **changes: Any) -> ZooError:
    with pytest.raises((InputError, UnavailableError)) as refused:
        compose(recipe(model, **changes), choices)
    return refused.value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "full", "quantize": "int8"}, "adapter 'full' and quantize 'int8' do not go together: it trains"),
        ({"adapter": "llama-adapter-v2", "quantize": "int8", "precision": "16-true"}, "for inference"),
        ({"attention": "no-documents", "packing": True}, "it knows no documents"),
        ({"attention": "half-only", "precision": "32-true"}, "it computes in bfloat16, not torch.float32"),
        ({"attention": "flex"}, "no backward on CPU"),
        ({"precision": "cuda-only"}, "needs cuda"),
        ({"precision": "fp9"}, "no precision is named 'fp9'"),
        ({"adapter": {"use": "lora", "targets": ["attn.qq"]}}, "no site is named 'attn.qq'"),
        ({"adapter": {"use": "lora", "r": 100000}}, "a rank of 100000 is too large"),
        ({"adapter": "lorra"}, "no adapter is named 'lorra'"),
        ({"quantize": "int9"}, "no quantizer is named 'int9'"),
    ],
)
def test_a_refused_combination_has_its_reason(
    changes: dict[str, Any], said: str, model: Path, choices: Registry
) -> None:
    """Guards against work that is lost because two choices, each fine alone, do not go together."""
    assert said in str(refusal(choices, model, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "int8"}, "quantize 'int8' and the family 'llama' do not go together"),
        ({"attention": "sdpa"}, "attention 'sdpa' and the family 'llama' do not go together"),
        ({"adapter": "llama-adapter"}, "needs attention layers that prompts can enter"),
    ],
)
def test_what_a_family_of_its_own_can_not_do(changes: dict[str, Any], said: str, own: Path, choices: Registry) -> None:
    """Guards modules that are not zoo's decoder; and linear adapters go with them, without a weight being made."""
    assert said in str(refusal(choices, own, **changes))
    told = [str(line) for line in compose(recipe(own, adapter={"use": "lora", "r": 2, "targets": ["head"]}), choices)]
    assert any(line.startswith("attention: auto -> own") for line in told)


def test_pretraining_has_no_weights_to_quantize(choices: Registry) -> None:
    """Guards against a choice that is ignored in silence."""
    asked = {"task": "pretrain", "max_steps": 1, "adapter": "full", "quantize": "int8"}
    assert "pretraining begins with random ones" in str(refusal(choices, "gpt2", **asked))


def test_all_that_is_wrong_is_said_at_once(model: Path, choices: Registry) -> None:
    """Guards against one round for each mistake. Input errors outrank what is not available: exit code 2."""
    error = refusal(choices, model, precision="16-true", quantize="int9", adapter={"use": "lora", "r": 0})
    assert error.exit_code == 2
    assert [line.split(" ")[2] for line in str(error).splitlines()[1:]] == ["no", "precision", "a"]
    alone = refusal(choices, model, precision="16-true", attention="flex", quantize="int8")
    assert alone.exit_code == 3


def test_nothing_is_built(model: Path, choices: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a check that costs what it is to save."""
    monkeypatch.setattr("zoo.convert.load.load_model", None)
    monkeypatch.setattr(torch.nn.Linear, "forward", None)
    told = {r.option: r for r in compose(recipe(model), choices)}
    assert load_model is not None
    assert (told["precision"].asked, told["precision"].chosen, told["precision"].why) == (
        "auto",
        "32-true",
        "the weights are float32",
    )
    assert told["attention"].chosen == "sdpa"
    assert "attn.q, attn.v" in told["adapter"].why
    assert str(told["strategy"]) == "strategy: auto -> single (1 process)"


def test_auto_says_why_the_better_ones_were_not_possible(choices: Registry, tmp_path: Path) -> None:
    """Guards the reasons behind a fallback that ``auto`` is allowed to make: soft-capped scores need the formula."""
    reference.save_tiny(tmp_path, *reference.VARIANTS["gemma2"])
    reference.save_byte_tokenizer(tmp_path)
    told = {r.option: r for r in compose(recipe(tmp_path), choices)}
    assert str(told["attention"]) == "attention: auto -> eager (sdpa: torch's SDPA can not soft-cap scores)"


def test_a_recipe_of_another_family_names_the_parameters(model: Path, choices: Registry) -> None:
    """Guards the count that is told: it is the plan's."""
    told = {r.option: r for r in compose(recipe(model, adapter={"use": "lora", "r": 2}), choices)}
    spec = reference.LLAMA
    width = spec["hidden_size"]
    assert told["adapter"].why.startswith(f"{2 * 2 * 2 * width * spec['num_hidden_layers']:,} parameters at ")
