"""An adapter of another model is refused, of the same one in another form is not; PEFT leaves the record alone."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from ruamel.yaml import YAML
from torch import nn

import zoo
from tests import gguf_files, reference, trained_tokenizers
from zoo.api import load
from zoo.convert.adapter_base import check_base, record_base
from zoo.convert.adapter_files import WEIGHTS
from zoo.convert.export import export_model
from zoo.convert.gguf import GGUF
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import randomize

SMALL: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32}
LLAMA = SMALL | {"d_ffn": 48}


def saved(directory: Path, name: str = "llama-2-7b", **changes: Any) -> Path:
    """A LoRA that fits every model of these widths."""
    handle = zoo.adapt(zoo.build(name, seed=0, **{**SMALL, **changes}), "lora", base="some/model")
    randomize(handle)
    handle.save(directory / "adapter")
    return directory / "adapter"


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"n_layers": 3}, r"n_layers is 3 here and 2 there\."),
    ({"n_heads": 2}, "n_heads is 2 here and 4 there; n_kv_heads is 2 here and 4 there; d_head is 16 here and 8 there"),
    ({"d_ffn": 64}, "d_ffn is 64 here and 48 there"),
    ({"d_model": 64, "n_heads": 8}, "d_model is 64 here and 32 there; n_heads is 8 here and 4 there"),
    ({"activation": "gelu"}, "activation is gelu here and silu there"),
    ({"norm_eps": 1e-6}, "norm_eps is 1e-06 here and 1e-05 there"),
    ({"rope": {"base": 5e5}}, "rope.base is 500000.0 here and 10000.0 there"),
    ({"rope": None}, "rope.n_dims is None here and 8 there; rope.base is None here and 10000.0 there"),
    ({"attn_scale": 1.0}, "attn_scale is 1.0 here and 0.35355 there"),
    ({"embed_scale": 5.5}, "embed_scale is 5.5 here and 1.0 there"),
    ({"unrotated_layers": [1]}, r"unrotated_layers is \(1,\) here and \(\) there"),
]


@pytest.mark.parametrize(("changes", "says"), CHANGES, ids=lambda value: str(value)[:20])
def test_another_model(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Guards each kind of difference, also those with which all tensors of the adapter fit."""
    path = saved(tmp_path, d_ffn=48)
    model = zoo.build("llama-2-7b", **{**LLAMA, **changes})
    with pytest.raises(InputError, match=rf"made for another model, some/model: .*{says}") as error:
        zoo.load_adapter(model, path)
    assert f"{path},any_base=true" in str(error.value.fix)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seq_len": 64},
        {"vocab_size": 80},
        {"embed_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1, "init_std": 1.0},
        {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
        {"tie_embeddings": True},
        {"window": 8, "full_attention_layers": [0]},
        {"rope": {"base": 10_000.0, "scaling": {"kind": "linear", "factor": 2.0}}},
        {"attn_scale": 8**-0.5, "embed_scale": 1.0},
        {"norm_eps": 9.999999747378752e-06},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_may_differ(changes: dict[str, Any], tmp_path: Path) -> None:
    """Guards against refusing the same parameters: longer contexts, padded vocabularies, numbers of another format."""
    path = saved(tmp_path, d_ffn=48)
    zoo.load_adapter(zoo.build("llama-2-7b", **{**LLAMA, **changes}), path)


def test_going_on_all_the_same(tmp_path: Path) -> None:
    """Guards the way out, and that it is none for shapes that do not fit."""
    path = saved(tmp_path, d_ffn=48)
    other = zoo.build("llama-2-7b", **LLAMA, norm_eps=1e-6)
    zoo.load_adapter(other, path, any_base=True)
    zoo.load_adapter(other, f"{path},any_base=true", name="again")
    with pytest.raises(InputError, match="any_base is true or false, not 3"):
        zoo.load_adapter(other, f"{path},any_base=3", name="third")
    wide = zoo.build("llama-2-7b", **(LLAMA | {"d_model": 64}))
    with pytest.raises(InputError, match=r"does not fit this model.*should be \(8, 64\)"):
        zoo.load_adapter(wide, path, any_base=True)


@pytest.mark.parametrize(
    ("adapter", "options"), [("lora", {}), ("ia3", {}), ("llama-adapter", {}), ("norm", {}), ("bitfit", {})]
)
def test_every_method_is_recorded(adapter: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Guards each way that a directory is written, PEFT's and zoo's."""
    zoo.adapt(zoo.build("gpt2", **SMALL), adapter, **options).save(tmp_path)
    zoo.load_adapter(zoo.build("gpt2", **SMALL), tmp_path)
    with pytest.raises(InputError, match="n_layers is 3 here and 2 there"):
        zoo.load_adapter(zoo.build("gpt2", **(SMALL | {"n_layers": 3})), tmp_path)


def test_in_the_form_of_gguf(tmp_path: Path, registry: Registry) -> None:
    """Guards the same model in a file that keeps float32 numbers and no spec."""
    config = gguf_files.GEMMA | {"vocab_size": trained_tokenizers.VOCAB_SIZE}
    reference.save_tiny(tmp_path / "hf", "gemma", config)
    trained_tokenizers.save(tmp_path / "hf", trained_tokenizers.byte_level())
    export_model(open_checkpoint(tmp_path / "hf", registry), tmp_path / "model.gguf", writer=GGUF())
    options: dict[str, Any] = {"precision": "32-true", "device": "cpu", "registry": registry}
    load(tmp_path / "hf", **options).adapt("lora").save(tmp_path / "adapter")
    load(tmp_path / "model.gguf", **options).load_adapter(tmp_path / "adapter")


class Own(nn.Module):
    """A model that zoo did not write, with a parameter of its own beside its modules."""

    def __init__(self, n_layers: int = 2, width: int = 8, rows: int = 16, bias: bool = True, table: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, width)
        self.table = nn.Parameter(torch.zeros(table, width))
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(n_layers))
        self.head = nn.Linear(width, rows, bias=False)


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({}, False),
        ({"rows": 20, "bias": False}, False),
        ({"n_layers": 3}, True),
        ({"width": 16}, True),
        ({"table": 5}, True),
    ],
    ids=str,
)
def test_modules_of_others(changes: dict[str, Any], is_other: bool, tmp_path: Path) -> None:
    """Guards the digest of what has no spec; a model that has adapters already is the same."""
    model = Own()
    zoo.adapt(model, "lora", r=2, targets=["layers.1"], name="first")
    zoo.adapt(model, "lora", r=2, targets=["layers.0"]).save(tmp_path)
    other = Own(**changes)
    if is_other:
        with pytest.raises(
            InputError, match=r"another model: the names or shapes .*Own with \d+ parameters here and Own"
        ):
            zoo.load_adapter(other, tmp_path)
    else:
        zoo.load_adapter(other, tmp_path)


def test_models_that_do_not_compare(tmp_path: Path, registry: Registry) -> None:
    """Guards directories that go both ways between zoo's decoder and the module of transformers."""
    theirs = reference.save_tiny(tmp_path / "base", *reference.VARIANTS["llama-gqa"])
    lm = load(tmp_path / "base", precision="32-true", device="cpu", registry=registry)
    lm.adapt("lora").save(tmp_path / "ours")
    zoo.load_adapter(theirs, tmp_path / "ours").save(tmp_path / "theirs")
    lm.load_adapter(tmp_path / "theirs", name="again")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_peft_leaves_it_alone(tmp_path: Path, registry: Registry) -> None:
    """Guards PEFT: it warns of nothing, saves the same bytes again, and what it trains on is not held to the record."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["llama-gqa"])
    lm = load(tmp_path / "base", precision="32-true", device="cpu", registry=registry)
    handle = lm.adapt("lora", r=4)
    randomize(handle)
    ours = tmp_path / "ours"
    handle.save(ours)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(base, ours, is_trainable=True)
    theirs.save_pretrained(str(tmp_path / "again"))
    assert digest(tmp_path / "again" / WEIGHTS) == digest(ours / WEIGHTS)
    other = zoo.build(lm.spec, norm_eps=1e-3)
    with pytest.raises(InputError, match=r"norm_eps is 0\.001 here"):
        check_base(ours, other)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(parameter.requires_grad)
    theirs.save_pretrained(str(ours))
    check_base(ours, other)


def test_the_record(tmp_path: Path) -> None:
    """Guards what else a ``zoo.yaml`` says, one that is damaged, and one of a later version."""
    record, model = tmp_path / "zoo.yaml", zoo.build("gpt2", **SMALL)
    record.write_text("schema: 1\nmodel: mine\nsource: hf:some/model\nsha256: {model.safetensors: '12'}\nmore: 3\n")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    record_base(tmp_path, model, None)
    content = YAML(typ="safe").load(record)
    assert (content["model"], content["source"], content["more"]) == ("mine", "hf:some/model", 3)
    assert content["sha256"] == {"model.safetensors": "12", WEIGHTS: digest(tmp_path / WEIGHTS)}
    assert content["base"] == {"model": None, "module": "GPT", "spec": model.spec.to_dict()}
    check_base(tmp_path, model)
    record.write_text(json.dumps(content | {"base": {"spec": model.spec.to_dict() | {"new_field": 3}}}))
    with pytest.raises(FileFormatError, match=r"zoo\.yaml describes a model that this version.*new_field"):
        check_base(tmp_path, model)
    record.write_text("base: [")
    with pytest.raises(FileFormatError, match=r"zoo\.yaml is not valid YAML"):
        check_base(tmp_path, model)
    for nothing in ("schema: 1\n", "base: 3\n", "base: {model: x}\n", "base: {spec: 3}\n"):
        record.write_text(nothing)
        check_base(tmp_path, model)
        check_base(tmp_path, Own())
