"""GPTQ and AWQ directories, packed here from the definitions, bit by bit: read exactly as what was packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import reference
from zoo.convert.base import Checkpoint
from zoo.convert.export import export_model
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
LLAMA = reference.LLAMA | SIZES | {"num_hidden_layers": 2}
GPT2 = reference.GPT2 | {"n_embd": 64, "n_head": 4, "n_layer": 2}
NAME = "model.layers.1.mlp.up_proj"


def words(values: Tensor, bits: int) -> Tensor:
    """Rows (X, n) of integers below 2 ** bits, written one after the other as bits, lowest first: int32 (X, words)."""
    shifted = values.numpy().astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)
    stream = np.packbits((shifted & 1).reshape(len(values), -1), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(stream).view("<i4").copy())


class Quantized:
    """A weight (out, in) quantized by rounding, with a zero and a scale per output and group of inputs."""

    def __init__(self, weight: Tensor, bits: int, group_size: int, group: Tensor | None = None) -> None:
        n_in = weight.shape[1]
        size = n_in if group_size == -1 else group_size
        self.group = torch.arange(n_in) // size if group is None else group
        n_groups, top = int(self.group.max()) + 1, 2**bits - 1
        ends = [weight[:, self.group == g].aminmax(dim=1) for g in range(n_groups)]
        low, high = torch.stack([e.min for e in ends], 1), torch.stack([e.max for e in ends], 1)
        self.scale = ((high - low) / top).half()
        self.zero = (-low / self.scale.float()).round().clamp(0, top).int()
        scaled = weight / self.scale.float()[:, self.group] + self.zero[:, self.group]
        self.q = scaled.round().clamp(0, top).int()
        # What it means, in float64: float16 times a small integer is exact in float32 too.
        self.weight = ((self.q - self.zero[:, self.group]).double() * self.scale.double()[:, self.group]).float()


def gptq(linear: Quantized, bits: int, *, v2: bool, g_idx: bool) -> dict[str, Tensor]:
    """As AutoGPTQ stores a linear; its first format writes zeros less one, modulo 2 ** bits."""
    zero = linear.zero if v2 else (linear.zero - 1) % 2**bits
    parts = {"qweight": words(linear.q, bits).t(), "qzeros": words(zero.t(), bits), "scales": linear.scale.t()}
    return parts | ({"g_idx": linear.group.int()} if g_idx else {})


def awq(linear: Quantized, bits: int, **_: Any) -> dict[str, Tensor]:
    """As AutoAWQ's GEMM stores a linear: outputs 0 2 4 6 1 3 5 7 of each eight, from the lowest nibble up."""

    def packed(values_OX: Tensor) -> Tensor:
        shuffled = values_OX.t().unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(shuffled.flatten(1), bits)

    return {"qweight": packed(linear.q), "qzeros": packed(linear.zero), "scales": linear.scale.t()}


Pack = Callable[..., dict[str, Tensor]]


def quantize(directory: Path, pack: Pack, quantization: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    """Quantize the linears of a saved model in place; returns all tensors as they should be read."""
    bits, group_size = quantization["bits"], quantization["group_size"]
    stored, expected = {}, {}
    actorder = how.pop("actorder", False)
    for name, tensor in load_file(directory / "model.safetensors").items():
        is_conv1d = ".c_" in name
        if tensor.dim() != 2 or not (is_conv1d or "_proj" in name):
            stored[name] = expected[name] = tensor
            continue
        weight = (tensor.t() if is_conv1d else tensor).clone()
        weight[0].abs_()  # a zero of 0, which the first format stores as the largest value
        n_in = weight.shape[1]
        group = torch.randperm(n_in) // group_size if actorder else None
        linear = Quantized(weight, bits, group_size, group)
        expected[name] = linear.weight.t() if is_conv1d else linear.weight
        for part, values in pack(linear, bits, **how).items():
            stored[f"{name.removesuffix('.weight')}.{part}"] = values.contiguous()
    save_file(stored, directory / "model.safetensors")
    edit(directory, quantization_config=quantization)
    return expected


def edit(directory: Path, **changes: Any) -> None:
    """Change config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_tensors(directory: Path, expected: dict[str, Tensor], registry: Registry) -> Checkpoint:
    """Every tensor is read bit for bit."""
    checkpoint = open_checkpoint(directory, registry)
    assert checkpoint.quantized
    assert set(checkpoint.tensors.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensors.get(name), tensor), name
        assert checkpoint.tensors.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensors.get(name, torch.bfloat16), tensor.bfloat16()), name
    return checkpoint


def check(directory: Path, expected: dict[str, Tensor], registry: Registry) -> None:
    """As `check_tensors`, and what is exported has transformers' logits for these weights."""
    out = directory.with_name("out")
    export_model(check_tensors(directory, expected, registry), out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ours = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    config = {
        k: v for k, v in json.loads((directory / "config.json").read_text()).items() if k != "quantization_config"
    }
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(expected, strict=False)
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["plain", "g_idx", "actorder", "one group"])
def test_gptq(bits: int, order: str, version: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the bit order, the zeros that the first format stores less one, the groups, and 3 bits across words."""
    reference.save_tiny(tmp_path / "a", "llama", LLAMA | {"num_hidden_layers": 1})
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if order == "one group" else 32,
        "desc_act": order == "actorder",
        "sym": False,
        "checkpoint_format": "gptq" if version == "v1" else "gptq_v2",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    how = {"v2": version == "v2", "g_idx": order in ("g_idx", "actorder"), "actorder": order == "actorder"}
    expected = quantize(tmp_path / "a", gptq, config, **how)
    zeros = [t for name, t in load_file(tmp_path / "a" / "model.safetensors").items() if name.endswith("qzeros")]
    assert len({int(word) for t in zeros for word in t.flatten()}) > 10, "zeros vary, or the offset could not be seen"
    check_tensors(tmp_path / "a", expected, registry)


def test_gptq_logits(tmp_path: Path, registry: Registry) -> None:
    """Guards the way from packed words to logits, as they are found most: 4 bits, groups, inputs in another order."""
    reference.save_tiny(tmp_path / "a", "llama", LLAMA)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    check(tmp_path / "a", quantize(tmp_path / "a", gptq, config, v2=False, g_idx=True, actorder=True), registry)


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq(group_size: int, tmp_path: Path, registry: Registry) -> None:
    """Guards the order of the outputs in a word, and zeros that are stored as they are."""
    reference.save_tiny(tmp_path / "a", "llama", LLAMA)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    check(tmp_path / "a", quantize(tmp_path / "a", awq, config), registry)


def test_gptq_of_conv1d(tmp_path: Path, registry: Registry) -> None:
    """Guards GPT-2, whose weights are (in, out): the square ones would load transposed without an error."""
    reference.save_tiny(tmp_path / "a", "gpt2", GPT2)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    check(tmp_path / "a", quantize(tmp_path / "a", gptq, config, v2=False, g_idx=True), registry)


def test_older_directories(tmp_path: Path, registry: Registry) -> None:
    """Guards AutoGPTQ's first layout: quantize_config.json, and a bias of zeros for every linear."""
    reference.save_tiny(tmp_path / "a", "llama", LLAMA)
    config = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "model_name_or_path": None}
    expected = quantize(tmp_path / "a", gptq, config, v2=False, g_idx=True)
    edit(tmp_path / "a", quantization_config=None)
    (tmp_path / "a" / "quantize_config.json").write_text(json.dumps(config))
    path = tmp_path / "a" / "model.safetensors"
    save_file(load_file(path) | {f"{NAME}.bias": torch.zeros(96)}, path)
    check_tensors(tmp_path / "a", expected, registry)
    save_file(load_file(path) | {f"{NAME}.bias": torch.ones(96)}, path)
    with pytest.raises(FileFormatError, match=rf"the model lacks: {NAME}\.bias"):
        open_checkpoint(tmp_path / "a", registry).located()


GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 32}
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by 'bitsandbytes'; zoo reads gptq and awq"),
    ({"quant_method": "fp8"}, "quantized by 'fp8'"),
    ({"quant_method": "compressed-tensors"}, "quantized by 'compressed-tensors'"),
    ({"bits": 4}, "quantized by 'None'"),
    (GOOD | {"bits": 5}, "bits = 5; zoo implements only 4 or 2 or 3 or 8"),
    (GOOD | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'; zoo knows gptq, gptq_v2"),
    (GOOD | {"is_marlin_format": True}, "is_marlin_format = True"),
    (GOOD | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"),
    (GOOD | {"pack_dtype": "int64"}, "pack_dtype = 'int64'"),
    (GOOD | {"group_size": 0}, "group_size must be a positive integer, or -1"),
    (GOOD | {"rotation": "hadamard"}, "does not understand: rotation = 'hadamard'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
    ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "llm-awq"),
    ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point = False"),
]


@pytest.mark.parametrize(("config", "said"), BAD_CONFIGS)
def test_what_is_not_read(config: dict[str, Any], said: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against weights unpacked by the wrong rule: each variant that changes the bits is refused by name."""
    reference.save_tiny(tmp_path, "llama", LLAMA)
    edit(tmp_path, quantization_config=config)
    with pytest.raises(InputError, match=said) as caught:
        open_checkpoint(tmp_path, registry)
    assert str(tmp_path) in str(caught.value)


Tensors = dict[str, Tensor]
DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scales": (lambda t: {k: v for k, v in t.items() if k != f"{NAME}.scales"}, f"lacks {NAME}.scales"),
    "no zeros": (lambda t: {k: v for k, v in t.items() if k != f"{NAME}.qzeros"}, f"lacks {NAME}.qzeros"),
    "twice": (lambda t: t | {f"{NAME}.weight": torch.ones(96, 64)}, "twice, packed and as"),
    "other groups": (lambda t: t | {f"{NAME}.scales": torch.ones(3, 96)}, "scales of .3, 96.*must be .*of .2, 96"),
    "short g_idx": (lambda t: t | {f"{NAME}.g_idx": torch.zeros(5, dtype=torch.int32)}, "g_idx of .5."),
    "wild g_idx": (lambda t: t | {f"{NAME}.g_idx": torch.full((64,), 2).int()}, "groups outside 0..1"),
    "no words": (lambda t: t | {f"{NAME}.qweight": torch.ones(8, 96)}, "matrix of int32 words"),
    "flat": (lambda t: t | {f"{NAME}.qweight": torch.ones(8, dtype=torch.int32)}, "matrix of int32 words"),
    "extra": (lambda t: t | {f"{NAME}.q_perm": torch.ones(8)}, f"the model lacks: {NAME}.q_perm"),
    "other size": (
        lambda t: t | {f"{NAME}.qweight": torch.ones(4, 96).int(), f"{NAME}.scales": torch.ones(1, 96)}
        | {f"{NAME}.qzeros": torch.ones(1, 12).int(), f"{NAME}.g_idx": torch.zeros(32).int()},
        r"shape \[96, 32\]; the config needs \[96, 64\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged(what: str, tmp_path: Path, registry: Registry) -> None:
    """Guards each message, and against a traceback."""
    change, said = DAMAGES[what]
    reference.save_tiny(tmp_path, "llama", LLAMA)
    quantize(tmp_path, gptq, GOOD, v2=False, g_idx=True)
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(FileFormatError, match=said) as caught:
        dict(open_checkpoint(tmp_path, registry).parameters())
    assert str(tmp_path) in str(caught.value)


def test_cut_within_a_value(tmp_path: Path, registry: Registry) -> None:
    """Guards the count of words: five of the six that hold 64 values of 3 bits."""
    reference.save_tiny(tmp_path, "llama", LLAMA)
    quantize(tmp_path, gptq, GOOD | {"bits": 3}, v2=False, g_idx=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"{NAME}.qweight": tensors[f"{NAME}.qweight"][:-1].contiguous()}, path)
    with pytest.raises(FileFormatError, match=rf"{NAME} has a qweight of \[5, 96\]"):
        open_checkpoint(tmp_path, registry)
