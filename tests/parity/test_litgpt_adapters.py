"""Adapter files that LitGPT's finetuning scripts save, put on zoo's decoder, compute what LitGPT computes.

LitGPT takes the keys and values of prompts from the wrong rows of its fused qkv, unless there is one kv head. It keeps
them in ``adapter_kv_cache``, so for other models the test puts the right ones there, and LitGPT does the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.discover import sites_of
from zoo.adapting import adapt
from zoo.attention.eager import Eager
from zoo.convert.adapter_files import StoredAdapter
from zoo.convert.litgpt_adapters import litgpt_names, read_litgpt_adapter, reads
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.models.gpt import GPT
from zoo.plan.sites import sites_of_spec
from zoo.registry import Registry
from zoo.spec import ModelSpec

LITGPT = os.environ.get("ZOO_LITGPT_PYTHON")
pytestmark = pytest.mark.skipif(LITGPT is None, reason="set ZOO_LITGPT_PYTHON to an interpreter that has litgpt")

NEOX = {"n_layer": 4, "n_embd": 48, "n_head": 6, "vocab_size": 90, "padded_vocab_size": 97, "block_size": 64}
NEOX |= {"intermediate_size": 80}
LLAMA: dict[str, Any] = {
    **NEOX,
    "n_query_groups": 2,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
BASES: dict[str, dict[str, Any]] = {
    "gqa": LLAMA,
    "mha": LLAMA | {"n_query_groups": 6, "bias": True},
    "mqa": LLAMA | {"n_query_groups": 1, "head_size": 10},
    "neox": NEOX,
    "one-norm": NEOX | {"shared_attention_norm": True, "n_query_groups": 1, "lm_head_bias": True},
    "qk-norm": LLAMA | {"norm_qk": True},
    "tied": LLAMA,
}
FLAGS = {
    "default": ["query", "value"],
    "key": ["key"],
    "all": ["query", "key", "value", "projection", "mlp", "head"],
    "rest": ["projection", "mlp"],
}
"""What has LoRA."""
LORA = [("gqa", "default"), ("gqa", "key"), ("gqa", "all"), ("gqa", "rest"), ("mha", "default"), ("mqa", "default")]
LORA += [("neox", "all"), ("one-norm", "all"), ("qk-norm", "all"), ("tied", "all")]
RANK, ALPHA = 3, 7

SCRIPT = r"""
import json, sys, torch
from pathlib import Path
import lightning as L
import litgpt
from litgpt import adapter, adapter_v2, lora
from litgpt.finetune import adapter as finetune_adapter, adapter_v2 as finetune_adapter_v2, lora as finetune_lora
from litgpt.parser_config import save_hyperparameters
from litgpt.scripts.merge_lora import merge_lora
from litgpt.utils import save_config

root = Path(sys.argv[1])
job = json.loads((root / "job.json").read_text())
ids = torch.tensor(job["ids"])
fabric = L.Fabric(devices=1, accelerator="cpu")


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name or "ln_f" in name or "scale" in name else 0.0
            spread = 1.0 if "adapter_wte" in name or "gating" in name else 0.2
            parameter.copy_(center + spread * torch.randn_like(parameter))


def load_base(model, base):
    result = model.load_state_dict(torch.load(root / "base" / base / "lit_model.pth"), strict=False)
    assert not result.unexpected_keys


def logits(model):
    with torch.no_grad():
        return model.eval()(ids)


def put_right_keys_and_values(model):
    config = model.config
    sizes = [config.n_head * config.head_size] + 2 * [config.n_query_groups * config.head_size]
    for block in model.transformer.h:
        if hasattr(block.attn, "adapter_wte"):
            with torch.no_grad():
                fused = block.attn.qkv(block.attn.adapter_wte.weight)
            heads = [part.unflatten(-1, (-1, config.head_size)).transpose(0, 1) for part in fused.split(sizes, dim=-1)]
            k, v = (part.repeat_interleave(len(heads[0]) // len(part), dim=0)[None] for part in heads[1:])
            block.attn.adapter_kv_cache = (k, v)


for name, values in job["bases"].items():
    config = litgpt.Config(name=name, **values)
    model = litgpt.GPT(config)
    randomise(model)
    if name == "tied":
        model.lm_head.weight = model.transformer.wte.weight
    directory = root / "base" / name
    directory.mkdir(parents=True)
    torch.save(model.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((root / file).read_bytes())
    torch.save(logits(model), directory / "logits.pt")

for base, flags in job["lora"]:
    settings = {f"lora_{flag}": flag in job["flags"][flags] for flag in job["flags"]["all"]}
    settings |= {"lora_r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.1}
    model = lora.GPT(lora.Config(name=base, **job["bases"][base], **settings))
    randomise(model)
    load_base(model, base)
    directory = root / "lora" / f"{base}-{flags}"
    directory.mkdir(parents=True)
    finetune_lora.save_lora_checkpoint(fabric, model, directory / "lit_model.pth.lora")
    torch.save(logits(model), directory / "logits.pt")
    arguments = [f"--{key}={str(value).lower()}" for key, value in settings.items()]
    sys.argv = ["litgpt", "finetune_lora", str(root / "base" / base), "--precision=32-true", *arguments]
    save_hyperparameters(finetune_lora.setup, directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "model_config.yaml"):
        (directory / file).write_bytes((root / "base" / base / file).read_bytes())
    merge_lora(directory)

for kind, module, save in (
    ("adapter", adapter, finetune_adapter.save_adapter_checkpoint),
    ("adapter_v2", adapter_v2, finetune_adapter_v2.save_adapter_v2_checkpoint),
):
    for base, values in job["bases"].items():
        for start in (2, 0) if kind == "adapter" else (2, 0, 4):
            config = module.Config(name=base, adapter_prompt_length=5, adapter_start_layer=start, **values)
            model = module.GPT(config)
            load_base(model, base)
            torch.manual_seed(start)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if module.adapter_filter(name, parameter):
                        one = "scale" in name or name.endswith("norm_1.weight") or name.endswith("norm_2.weight")
                        spread = 1.0 if "wte" in name or "gating" in name else 0.2
                        parameter.copy_(one + spread * torch.randn_like(parameter))
            directory = root / kind / f"{base}-{start}"
            directory.mkdir(parents=True)
            save(fabric, model, directory / f"lit_model.pth.{kind}")
            torch.save(logits(model), directory / "as-it-is.pt")
            put_right_keys_and_values(model)
            torch.save(logits(model), directory / "logits.pt")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that LitGPT has written: ``base/NAME``, ``lora/NAME-FLAGS``, ``adapter/NAME-START`` and so on."""
    assert LITGPT is not None
    root = tmp_path_factory.mktemp("litgpt")
    reference.save_byte_tokenizer(root)
    job = {"bases": BASES, "lora": LORA, "flags": FLAGS, "rank": RANK, "alpha": ALPHA}
    (root / "job.json").write_text(json.dumps(job | {"ids": reference.tokens(2, 20, 90).tolist()}))
    done = subprocess.run([LITGPT, "-c", SCRIPT, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


def load_base(path: Path, registry: Registry) -> GPT:
    return load_model(open_checkpoint(path, registry), Eager(), dtype=torch.float32)


def logits_of(model: GPT) -> Tensor:
    with torch.no_grad():
        return model(reference.tokens(2, 20, 90))


def saved(path: Path) -> Tensor:
    logits: Tensor = torch.load(path, weights_only=True)
    return logits


def assert_logits(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def put_on(model: GPT, path: Path) -> AttachedAdapter:
    stored = read_litgpt_adapter(path, sites_of(model), litgpt_names(model.spec))
    handle = adapt(model, stored.adapter, **stored.options)
    handle.load_state_dict(stored.state)
    return handle


def read(path: Path, files: Path, registry: Registry, base: str = "gqa", **changes: int) -> StoredAdapter:
    """Reads with the sites that a spec, or one like it, has; without a model."""
    spec = open_checkpoint(files / "base" / base, registry).spec
    spec = ModelSpec.from_dict(spec.to_dict() | changes)
    return read_litgpt_adapter(path, sites_of_spec(spec), litgpt_names(spec))


# --- LoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "flags"), LORA)
def test_lora(base: str, flags: str, files: Path, registry: Registry) -> None:
    """Guards the parts of A and B that belong to q, k and v of unequal sizes, the scaling, the head, and merging."""
    model = load_base(files / "base" / base, registry)
    directory = files / "lora" / f"{base}-{flags}"
    assert_logits(logits_of(model), saved(files / "base" / base / "logits.pt"))
    handle = put_on(model, directory)
    assert_logits(logits_of(model), saved(directory / "logits.pt"))
    assert (logits_of(model) - saved(files / "base" / base / "logits.pt")).abs().max() > 0.1
    if base == "tied":  # LitGPT merges the update of the head into the embedding too
        return
    handle.merge()
    merged = logits_of(load_base(directory, registry))
    assert_logits(merged, saved(directory / "logits.pt"))
    assert_logits(logits_of(model), merged)


def test_lora_options(files: Path, registry: Registry) -> None:
    """Guards training on: rank, scaling and dropout as LitGPT had them, and one LoRA for each part of qkv."""
    stored = read(files / "lora" / "gqa-default" / "lit_model.pth.lora", files, registry)
    assert stored.adapter == "lora"
    assert {**stored.options, "targets": ()} == {"r": RANK, "alpha": float(ALPHA), "dropout": 0.1, "targets": ()}
    assert stored.options["targets"] == tuple(f"=blocks.{i}.attn.{part}" for i in range(4) for part in "qv")
    assert {tensor.shape[0] for key, tensor in stored.state.items() if key.endswith("v.lora_B")} == {16}


# --- LLaMA-Adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("base", [base for base in BASES if base != "qk-norm"])
def test_v1(base: str, start: int, files: Path, registry: Registry) -> None:
    """Guards which layers have prompts, gates by head without tanh, and keys and values of several heads."""
    model = load_base(files / "base" / base, registry)
    directory = files / "adapter" / f"{base}-{start}"
    put_on(model, directory)
    assert_logits(logits_of(model), saved(directory / "logits.pt"))
    assert (logits_of(model) - saved(files / "base" / base / "logits.pt")).abs().max() > 0.1


@pytest.mark.parametrize("start", [0, 2, 4])
@pytest.mark.parametrize("base", [base for base in BASES if base != "qk-norm"])
def test_v2(base: str, start: int, files: Path, registry: Registry) -> None:
    """Guards scales and biases of fused linears and of the head, the norms, and files without prompts."""
    model = load_base(files / "base" / base, registry)
    directory = files / "adapter_v2" / f"{base}-{start}"
    put_on(model, directory)
    assert_logits(logits_of(model), saved(directory / "logits.pt"))


@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_where_litgpt_takes_the_wrong_rows(kind: str, files: Path) -> None:
    """Guards what the reader's module says of LitGPT: with one kv head its rows are right, with several not."""
    for base in ("gqa", "mha", "mqa", "neox", "one-norm"):
        directory = files / kind / f"{base}-2"
        differs = (saved(directory / "as-it-is.pt") - saved(directory / "logits.pt")).abs().max() > 0.01
        assert differs == (base not in ("mqa", "one-norm"))


def test_gates_of_old(files: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards the shape (1, N, 1, 1) that gates once had."""
    file = files / "adapter" / "gqa-2" / "lit_model.pth.adapter"
    tensors = torch.load(file, weights_only=True)["model"]
    old = {key: tensor.permute(0, 2, 1, 3) if "gating" in key else tensor for key, tensor in tensors.items()}
    assert {tensor.shape for key, tensor in old.items() if "gating" in key} == {(1, 6, 1, 1)}
    torch.save(old, tmp_path / file.name)
    found, expected = read(tmp_path, files, registry), read(file, files, registry)
    assert found.options == expected.options
    assert all(torch.equal(found.state[key], tensor) for key, tensor in expected.state.items())


def test_norms_that_litgpt_does_not_train(files: Path, registry: Registry) -> None:
    """Guards models that normalize q and k: those norms stay as they are, and nothing is made up for them."""
    model = load_base(files / "base" / "qk-norm", registry)
    directory = files / "adapter_v2" / "qk-norm-4"  # without prompts, whose keys LitGPT does not normalize
    handle = put_on(model, directory)
    assert handle.adapter.options.norms == ("attn_norm", "mlp_norm", "norm")
    assert not [name for name in handle.trainable() if "q_norm" in name or "k_norm" in name]
    assert_logits(logits_of(model), saved(directory / "logits.pt"))
    stored = read(files / "adapter_v2" / "qk-norm-2", files, registry, "qk-norm")
    assert (stored.options["layers"], stored.options["norms"]) == (2, ("attn_norm", "mlp_norm", "norm"))
    assert read(files / "adapter" / "qk-norm-2", files, registry, "qk-norm").options["layers"] == 2


# --- what is refused -------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        if file.name.startswith("lit_model.pth.") or file.suffix == ".yaml":
            shutil.copy(file, target)
    return next(target.glob("lit_model.pth.*"))


KINDS = {"lora": "gqa-all", "adapter": "gqa-2", "adapter_v2": "gqa-2"}
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
def test_files_that_are_not_the_models(kind: str, files: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards each tensor's name and shape, and the file itself."""
    file = copy(files / kind / KINDS[kind], tmp_path)
    assert reads(file) and reads(tmp_path)
    good = torch.load(file, weights_only=True)["model"]
    read(tmp_path, files, registry)
    for key in good:
        torch.save({"model": {k: v for k, v in good.items() if k != key}}, file)
        with pytest.raises(FileFormatError, match=rf"{file.name} lacks {key}"):
            read(tmp_path, files, registry)
        torch.save(good | {key: good[key][..., :-1]}, file)
        with pytest.raises(FileFormatError, match=rf"holds {key} of the shape"):
            read(tmp_path, files, registry)
    torch.save(good | {"transformer.h.9.attn.qkv.lora_A": torch.ones(2, 2)}, file)
    with pytest.raises(FileFormatError, match=r"holds transformer\.h\.9\.attn\.qkv\.lora_A, for which this model"):
        read(tmp_path, files, registry)
    torch.save(good, file)
    for changes in ({"n_heads": 4}, {"d_model": 60}, {"n_layers": 3}, {"n_layers": 5}):
        with pytest.raises(FileFormatError, match="Take the model that it was trained on"):
            read(tmp_path, files, registry, "gqa", **changes)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        read(tmp_path, files, registry)


def test_an_adapter_without_prompts_is_none(files: Path, tmp_path: Path, registry: Registry) -> None:
    torch.save({"model": {}}, tmp_path / "lit_model.pth.adapter")
    with pytest.raises(FileFormatError, match=r"holds no adapter_wte\.weight"):
        read(tmp_path, files, registry)


def test_names_of_old(files: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards against LoRA of LitGPT before 0.5.5, whose qkv is another module."""
    file = copy(files / "lora" / "gqa-default", tmp_path)
    good = torch.load(file, weights_only=True)["model"]
    torch.save({key.replace(".qkv.", ".attn."): tensor for key, tensor in good.items()}, file)
    with pytest.raises(FileFormatError, match=r"attn\.attn\.lora_A.*before 0\.5\.5"):
        read(tmp_path, files, registry)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_alpha": ...}, "lacks lora_alpha"),
        ({"lora_key": ..., "lora_r": ...}, "lacks lora_r, lora_key"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much', which should be a number"),
        ({"lora_r": True}, "lora_r = True, which should be a number"),
        ({"lora_query": 1}, "lora_query = 1, which should be a bool"),
        ({"lora_r": 0}, "lora_r = 0"),
        ({"lora_r": 2.5}, "lora_r = 2.5"),
        ({"lora_query": False, "lora_value": False}, "of no module that it has LoRA"),
        ({"lora_r": 2}, r"lora_A of the shape \(6, 48\), which is \(4, 48\).*hyperparameters.yaml that was saved"),
        ({"lora_key": True}, r"lora_A of the shape \(6, 48\), which is \(9, 48\)"),
        ({"lora_mlp": True}, r"lacks transformer\.h\.0\.mlp\.fc_1\.lora_A.* and 20 more"),
    ],
)  # fmt: skip
def test_settings(changes: dict[str, Any], says: str, files: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards against a LoRA of another scaling or on other modules than it was trained with."""
    copy(files / "lora" / "gqa-default", tmp_path)
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # as PyYAML writes it
    settings = yaml.load(tmp_path / "hyperparameters.yaml") | changes
    yaml.dump({key: value for key, value in settings.items() if value is not ...}, tmp_path / "hyperparameters.yaml")
    with pytest.raises(FileFormatError, match=says):
        read(tmp_path, files, registry)


def test_files_that_are_missing(files: Path, tmp_path: Path, registry: Registry) -> None:
    file = copy(files / "lora" / "gqa-default", tmp_path)
    (tmp_path / "hyperparameters.yaml").unlink()
    with pytest.raises(FileFormatError, match=r"hyperparameters\.yaml is missing, and only it says the scaling"):
        read(file, files, registry)
    shutil.copy(files / "adapter" / "gqa-2" / "lit_model.pth.adapter", tmp_path)
    with pytest.raises(InputError, match=r"lora and lit_model\.pth\.adapter\. Give one of the files"):
        read(tmp_path, files, registry)
    read(tmp_path / "lit_model.pth.adapter", files, registry)
    for nothing in (tmp_path / "none", tmp_path / "none.pth.lora", files / "base" / "gqa"):
        assert not reads(nothing)
        with pytest.raises(FileFormatError, match="no adapter of LitGPT's"):
            read(nothing, files, registry)


def test_models_that_litgpt_has_not(registry: Registry) -> None:
    spec = ModelSpec.from_dict(registry.model("gpt2").spec_values)
    with pytest.raises(InputError, match=r"LitGPT has no such model: .*positions\.weight"):
        litgpt_names(spec)
