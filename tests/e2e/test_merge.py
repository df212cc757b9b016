"""``zoo merge`` writes what PEFT and transformers compute with the adapter, and refuses bad input early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from torch.testing import assert_close

from tests import reference
from zoo.adapters.attach import attached_to
from zoo.api import LanguageModel, load
from zoo.cli.main import cli
from zoo.errors import InputError
from zoo.registry import Registry
from zoo.testing.adapters import randomize

TARGETS = {
    "llama-gqa": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gemma2": ["o_proj"],
}


def zoo(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def refused(*arguments: str | Path) -> str:
    """What the user is told."""
    with pytest.raises(InputError) as caught:
        cli.main([str(argument) for argument in arguments], standalone_mode=False)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["llama-gqa"])
    return tmp_path / "base"


def adapted(directory: Path, registry: Registry, adapter: str = "lora", **options: Any) -> LanguageModel:
    """A model with a randomised adapter that is saved beside it, under the name ``adapter``."""
    lm = load(directory, precision="32-true", device="cpu", registry=registry)
    handle = lm.adapt(adapter, **options)
    randomize(handle)
    handle.save(directory.parent / "adapter")
    return lm


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("variant", TARGETS)
def test_it_is_what_peft_merges(variant: str, tmp_path: Path) -> None:
    """Guards the way of an update through split and fused projections into files that transformers reads."""
    model = reference.save_tiny(tmp_path / "base", *reference.VARIANTS[variant])
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[variant]))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ran = zoo("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["difference"] <= 1e-5 * max(1.0, found["largest_logit"])
    assert found["same_tokens"] == found["tokens"]
    ids = reference.tokens(2, 12)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(merged(ids).logits, theirs.merge_and_unload()(ids).logits, atol=1e-4, rtol=1e-4)


def test_biases_that_merging_adds(base: Path, registry: Registry) -> None:
    """Guards the spec: a model that had no biases has them now, zero where the adapter added none."""
    lm = adapted(base, registry, "llama-adapter-v2", prompts=False, targets=("attn.q", "attn.v", "mlp.up"))
    out = base.parent / "out"
    assert zoo("merge", base, base.parent / "adapter", out).exit_code == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not any(merged.model.layers[0].self_attn.k_proj.bias)
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(merged(ids).logits, lm.model(ids), atol=1e-4, rtol=1e-4)


def test_the_dtype_of_what_is_written(base: Path, registry: Registry) -> None:
    """Guards the difference that is printed: in bf16 it is that of rounded weights, not that of float32."""
    adapted(base, registry)
    found = []
    for dtype in ("fp32", "bf16"):
        out = base.parent / dtype
        found.append(json.loads(zoo("merge", base, base.parent / "adapter", out, "--dtype", dtype, "--json").stdout))
        stored = load(out, precision="auto", device="cpu", registry=registry).checkpoint.tensors
        assert {str(stored.dtype(name)) for name in stored.names()} == {f"torch.{found[-1]['dtype']}"}
    assert found[0]["difference"] < 1e-4 < found[1]["difference"]


def test_quantized_weights(base: Path, registry: Registry) -> None:
    """Guards against merging into integers, and against a dequantized model that still says it is quantized."""
    lm = adapted(base, registry)
    adapter, out = base.parent / "adapter", base.parent / "out"
    assert zoo("convert", base, base.parent / "int8", "--quantize", "int8").exit_code == 0
    assert "--dequantize" in refused("merge", base.parent / "int8", adapter, out)
    assert not out.exists()
    ran = zoo("merge", base.parent / "int8", adapter, out, "--dequantize", "--dtype", "fp32")
    assert ran.exit_code == 0, ran.output
    merged = load(out, device="cpu", registry=registry)
    assert merged.quantized is None
    ids = reference.tokens(1, 8)
    with torch.no_grad():
        assert (merged.model(ids) - lm.model(ids)).abs().max() < 0.1 * lm.model(ids).abs().max()


def test_what_is_refused(base: Path, registry: Registry) -> None:
    """Guards each refusal, and that nothing is written then."""
    adapted(base, registry, "llama-adapter")
    adapter, out = base.parent / "adapter", base.parent / "out"
    assert "prompts in" in refused("merge", base, adapter, out)
    assert "no adapter directory" in refused("merge", base, base, out)
    adapted(base, registry, "lora")
    reference.save_tiny(base.parent / "other", *reference.VARIANTS["gpt2"])
    assert "made for another model" in refused("merge", base.parent / "other", adapter, out)
    assert "no such module" in refused("merge", base.parent / "other", f"{adapter},any_base=true", out)
    reference.save_tiny(base.parent / "tied", *reference.VARIANTS["llama-tied"])
    adapted(base.parent / "tied", registry, targets=("embed",))
    assert "shares its weight" in refused("merge", base.parent / "tied", adapter, out)
    assert not out.exists()
    out.mkdir()
    (out / "note.txt").write_text("mine")
    assert "exists" in refused("merge", base, adapter, out)


def test_saving_a_model_with_an_adapter(base: Path, registry: Registry) -> None:
    """Guards `LanguageModel.save`: an update is in the files, or the user is told that it is not."""
    lm = adapted(base, registry)
    with pytest.raises(InputError, match="no part of the weights"):
        lm.save(base.parent / "out")
    ids = reference.tokens(1, 8)
    expected = lm.model(ids)
    attached_to(lm.model)["default"].merge()
    lm.save(base.parent / "out")
    again = load(base.parent / "out", precision="32-true", device="cpu", registry=registry)
    assert_close(again.model(ids), expected, atol=1e-5, rtol=1e-5)
