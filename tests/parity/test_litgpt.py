"""LitGPT's directories: read as LitGPT's own converter fills them, written so that LitGPT computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from zoo.attention.eager import Eager
from zoo.convert.export import export_model
from zoo.convert.litgpt import LitGPT
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry

LITGPT = os.environ.get("ZOO_LITGPT_PYTHON")
FAMILIES = {
    "llama-gqa": "llama",
    "llama-mqa": "llama",
    "llama-own-head": "llama",
    "llama-biases": "llama",
    "llama-tied": "llama",
    "llama-linear": "llama",
    "llama-llama3": "llama",
    "gpt_neox": "gpt_neox",
    "gpt_neox-sequential": "gpt_neox",
    "gpt_neox-half-rotary": "gpt_neox",
    "gpt_neox-linear": "gpt_neox",
    "gpt_neox-tied": "gpt_neox",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
    "phi": "phi",
    "falcon": "falcon",
}
"""Variant -> the family that carries it when it comes back."""
EVERY = pytest.mark.parametrize("variant", FAMILIES)

PYTHIA = {
    "name": "pythia-14m",
    "hf_config": {"org": "EleutherAI", "name": "pythia-14m"},
    "block_size": 64,
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 6,
    "vocab_size": 90,
    "padding_multiple": 97,
    "intermediate_size": 80,
}
"""As ``litgpt.config`` has it: what is left out has LitGPT's defaults, which are GPT-NeoX's."""
LLAMA = {
    **PYTHIA,
    "name": "tiny-llama",
    "n_query_groups": 2,
    "padded_vocab_size": 97,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "mlp_class_name": "LLaMAMLP",
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
BASES: dict[str, dict[str, Any]] = {"gpt_neox": reference.NEOX, "llama": reference.LLAMA | {"num_key_value_heads": 2}}
"""The reference's configs that say the same as the two above."""


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # as PyYAML writes it
    yaml.dump(content, path)


def as_litgpt(hf: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Weights of Hugging Face's Llama or GPT-NeoX, renamed and joined as LitGPT's converter does it."""
    names = {
        "gpt_neox.embed_in": "transformer.wte",
        "gpt_neox.final_layer_norm": "transformer.ln_f",
        "embed_out": "lm_head",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "lm_head": "lm_head",
    }
    inside = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "attention.query_key_value": "attn.qkv",
        "attention.dense": "attn.proj",
        "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj",
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in hf.items():
        base, _, kind = name.rpartition(".")
        if ".layers." not in name:
            found[f"{names[base]}.{kind}"] = tensor
            continue
        layer, _, part = base.partition(".layers.")[2].partition(".")
        if part.endswith("q_proj"):
            others = [hf[name.replace("q_proj", f"{which}_proj")] for which in "kv"]
            found[f"transformer.h.{layer}.attn.qkv.{kind}"] = torch.cat([tensor, *others])
        elif part == "attention.query_key_value":
            by_head = tensor.reshape(n_heads, 3, -1, *tensor.shape[1:])
            rows = [by_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)]
            found[f"transformer.h.{layer}.attn.qkv.{kind}"] = torch.cat(rows)
        elif not part.endswith(("k_proj", "v_proj")):
            found[f"transformer.h.{layer}.{inside[part]}.{kind}"] = tensor
    return found


Save = Callable[..., tuple[Path, Any]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a reference model as LitGPT would have it; returns the directory and the model."""

    def run(model_type: str, config: dict[str, Any], **changes: Any) -> tuple[Path, Any]:
        theirs = reference.save_tiny(tmp_path / "hf", model_type, config)
        directory = tmp_path / "lit"
        directory.mkdir()
        state = as_litgpt(load_file(tmp_path / "hf" / "model.safetensors"), 6)
        torch.save(state, directory / "lit_model.pth")
        settings = {"gpt_neox": PYTHIA, "llama": LLAMA}[model_type] | changes
        write_yaml(directory / "model_config.yaml", {k: v for k, v in settings.items() if v is not ...})
        return directory, theirs

    return run


def logits_of(path: Path, registry: Registry) -> Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(path, registry), Eager(), dtype=torch.float32)(reference.tokens(2, 40))


# --- in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "changes"),
    [
        ("gpt_neox", {}, {}),
        ("gpt_neox", {"rotary_pct": 0.5}, {"rotary_percentage": 0.5}),
        ("gpt_neox", {"hidden_act": "gelu_new"}, {"gelu_approximate": "tanh"}),
        ("gpt_neox", {"use_parallel_residual": False}, {"parallel_residual": False, "rope_condense_ratio": 1}),
        ("gpt_neox", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_condense_ratio": 4}),
        ("llama", {}, {}),
        ("llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-3}, {"rope_base": 500000, "norm_eps": 1e-3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_adjustments": {"factor": 2.0}}),
        ("llama", {"rope_scaling": reference.LLAMA3_ROPE}, {"rope_adjustments": LLAMA3_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": True}),
    ],
)
def test_logits(
    model_type: str, config: dict[str, Any], changes: dict[str, Any], save: Save, registry: Registry
) -> None:
    """Guards the names, the order of rows in qkv, every key that says how to compute, and LitGPT's defaults."""
    directory, theirs = save(model_type, BASES[model_type] | config, **changes)
    with torch.no_grad():
        assert_close(logits_of(directory, registry), theirs(reference.tokens(2, 40)).logits, atol=1e-4, rtol=1e-4)


def test_what_else_is_read(save: Save, registry: Registry) -> None:
    """Guards the padded vocabulary and the name, the tokenizer and generation_config.json."""
    directory, _ = save("gpt_neox", reference.NEOX)
    reference.save_byte_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "config.json").write_text("{}")  # LitGPT keeps the hub's own beside its files
    checkpoint = open_checkpoint(directory, registry)
    assert checkpoint.family.name == "gpt_neox"
    assert checkpoint.spec.vocab_size == 97, "90, padded to a multiple"
    assert checkpoint.config["_name_or_path"] == "EleutherAI/pythia-14m"
    assert checkpoint.generation == {"eos_token_id": 5}
    assert checkpoint.load_tokenizer().encode("a")


def test_beside_weights_of_the_hub(save: Save, registry: Registry) -> None:
    """Guards the directory that ``litgpt download`` leaves, with the same weights twice: the original is read."""
    directory, _ = save("gpt_neox", reference.NEOX)
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((directory.parent / "hf" / name).read_bytes())
    assert type(open_checkpoint(directory, registry).tensors).__name__ == "SafetensorsReader"
    assert type(open_checkpoint(directory, registry, format_name="litgpt").tensors).__name__ == "TorchTensors"


def test_what_training_saves(save: Save, registry: Registry) -> None:
    """Guards checkpoints of ``litgpt finetune``, whose weights lie under 'model'."""
    directory, theirs = save("gpt_neox", reference.NEOX)
    state = torch.load(directory / "lit_model.pth", weights_only=True)
    torch.save({"model": state, "step_count": 3}, directory / "lit_model.pth")
    with torch.no_grad():
        wanted = theirs(reference.tokens(2, 40)).logits
    assert_close(logits_of(directory, registry), wanted, atol=1e-4, rtol=1e-4)


def test_weights_of_old(save: Save, registry: Registry) -> None:
    """Guards against q, k and v of LitGPT before 0.5.5, whose rows are in another order."""
    directory, _ = save("gpt_neox", reference.NEOX)
    state = torch.load(directory / "lit_model.pth", weights_only=True)
    old = {name.replace(".attn.qkv.", ".attn.attn."): tensor for name, tensor in state.items()}
    torch.save(old, directory / "lit_model.pth")
    with pytest.raises(FileFormatError, match="litgpt convert_to_litgpt"):
        open_checkpoint(directory, registry)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"some_new_key": 1}, "some_new_key = 1"),
        ({"sliding_window_size": 8}, "sliding_window_size = 8"),
        ({"scale_embeddings": True}, "scale_embeddings = True"),
        ({"norm_1": False}, "norm_1 = False"),
        ({"attention_scores_scalar": 64}, "attention_scores_scalar = 64"),
        ({"n_expert": 4}, "n_expert = 4"),
        ({"mlp_class_name": "GemmaMLP"}, "GemmaMLP"),
        ({"norm_qk": True, "norm_qk_type": "olmo2"}, "norm_qk_type = 'olmo2'"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_adjustments": {"factor": 2.0}, "rope_condense_ratio": 2}, "twice"),
        ({"name": "Gemma-tiny"}, "'Gemma' in a name"),
        ({"attn_bias": True, "parallel_residual": True}, "none of zoo's families computes such a model"),
        ({"intermediate_size": ...}, "'intermediate_size', which LLaMAMLP needs"),
        ({"shared_attention_norm": True}, "without parallel_residual"),
        ({"n_layer": "three"}, "n_layers"),
    ],
)  # fmt: skip
def test_settings_that_are_not_understood(changes: dict[str, Any], says: str, save: Save, registry: Registry) -> None:
    """Guards against a model that loads and computes something else."""
    directory, _ = save("llama", BASES["llama"], **changes)
    with pytest.raises(InputError, match=rf"model_config\.yaml.*{says}"):
        open_checkpoint(directory, registry)


# --- out -------------------------------------------------------------------------------------------------------


def write(source: Path, target: Path, registry: Registry, dtype: torch.dtype | None = None) -> None:
    export_model(open_checkpoint(source, registry), target, writer=LitGPT(), dtype=dtype)


@EVERY
def test_there_and_back(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards both directions at once: HF -> LitGPT -> HF is bit for bit what it was, and so is the spec."""
    reference.save_tiny(tmp_path / "a", *reference.VARIANTS[variant])
    write(tmp_path / "a", tmp_path / "b", registry)
    source, again = (open_checkpoint(tmp_path / name, registry) for name in "ab")
    assert again.family.name == FAMILIES[variant]
    before, after = dict(source.parameters()), dict(again.parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    export_model(again, tmp_path / "c")
    assert torch.equal(logits_of(tmp_path / "c", registry), logits_of(tmp_path / "a", registry))


def test_the_state_dict(tmp_path: Path, registry: Registry) -> None:
    """Guards the file against one made with torch.save: names, values, the tied head, and the archive's checksums."""
    _, config = reference.VARIANTS["llama-tied"]
    reference.save_tiny(tmp_path / "a", "llama", config)
    write(tmp_path / "a", tmp_path / "b", registry, torch.bfloat16)
    file = tmp_path / "b" / "lit_model.pth"
    wanted = as_litgpt(load_file(tmp_path / "a" / "model.safetensors"), 6)
    wanted["lm_head.weight"] = wanted["transformer.wte.weight"]
    for mapped in (False, True):
        found = torch.load(file, weights_only=True, mmap=mapped)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in wanted.items())
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in found.values())
        assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    assert zipfile.ZipFile(file).testzip() is None


def test_the_config(tmp_path: Path, registry: Registry) -> None:
    """Guards numbers that LitGPT's YAML 1.1 would take for texts, and the name."""
    source = tmp_path / "my-model"
    reference.save_tiny(source, "llama", reference.LLAMA | {"rms_norm_eps": 1e-5})
    reference.save_byte_tokenizer(source)
    write(source, tmp_path / "b", registry)
    text = (tmp_path / "b" / "model_config.yaml").read_text()
    assert "norm_eps: 1.0e-05\n" in text
    assert "name: my-model\n" in text
    assert {path.name for path in (tmp_path / "b").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    assert not (tmp_path / "b" / "config.json").exists()


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("gpt2", "no learned positions"),
        ("llama-gelu", "activation = 'gelu_tanh'"),
        ("gpt_neox-no-bias", "qkv_bias = False"),
        ("mistral", "window = 8"),
        ("gemma", "embed_scale"),
        ("olmo", "norm_affine = False"),
    ],
)
def test_models_that_litgpt_has_not(variant: str, says: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against a directory with which LitGPT would compute something else."""
    reference.save_tiny(tmp_path / "a", *reference.VARIANTS[variant])
    with pytest.raises(InputError, match=says):
        write(tmp_path / "a", tmp_path / "b", registry)
    assert not (tmp_path / "b").exists()


LITGPT_LOGITS = """
import json, sys, torch
from pathlib import Path
from litgpt import GPT, Config
for path in map(Path, sys.argv[1:]):
    model = GPT(Config.from_checkpoint(path)).eval()
    model.load_state_dict(torch.load(path / "lit_model.pth", weights_only=True), strict=True)
    ids = torch.tensor(json.loads((path.parent / "ids.json").read_text()))
    with torch.no_grad():
        torch.save(model(ids), path / "logits.pt")
"""


@pytest.mark.skipif(LITGPT is None, reason="set ZOO_LITGPT_PYTHON to an interpreter that has litgpt")
def test_litgpt_computes_the_same(tmp_path: Path, registry: Registry) -> None:
    """Guards everything that is written against LitGPT itself."""
    assert LITGPT is not None
    for variant in FAMILIES:
        reference.save_tiny(tmp_path / "hf" / variant, *reference.VARIANTS[variant])
        write(tmp_path / "hf" / variant, tmp_path / variant, registry)
    (tmp_path / "ids.json").write_text(json.dumps(reference.tokens(2, 40).tolist()))
    command = [LITGPT, "-c", LITGPT_LOGITS, *(str(tmp_path / variant) for variant in FAMILIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for variant in FAMILIES:
        theirs = torch.load(tmp_path / variant / "logits.pt", weights_only=True)
        assert_close(logits_of(tmp_path / "hf" / variant, registry), theirs, atol=1e-4, rtol=1e-4)
