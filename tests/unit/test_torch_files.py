"""Hugging Face directories with pytorch_model.bin: read as the safetensors twin is, and no code in one is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests import reference
from zoo.attention.eager import Eager
from zoo.convert.export import export_model
from zoo.convert.load import load_model, open_checkpoint
from zoo.convert.torch_file import load_torch_file
from zoo.errors import FileFormatError
from zoo.registry import Registry

SAVINGS: dict[str, dict[str, Any]] = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
"""torch's two file formats: since 1.6, and before."""


def save_bin(directory: Path, model_type: str, config: dict[str, Any], *, shards: int = 1, **options: Any) -> Any:
    """A reference model whose weights are pickles, as ``transformers`` 4 wrote them."""
    model = reference.save_tiny(directory, model_type, config)
    (directory / "model.safetensors").unlink()
    state = {reference.stored_name(model, name): tensor for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **options)
        return model
    weight_map = {name: f"pytorch_model-{1 + i % shards:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: t for name, t in state.items() if weight_map[name] == file}, directory / file, **options)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "llama-tied"])
def test_same_as_transformers(variant: str, shards: int, saving: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the reader: wrong bytes, a shard left out, a tied head taken for an unknown tensor."""
    model_type, config = reference.VARIANTS[variant]
    theirs = save_bin(tmp_path / "a", model_type, config, shards=shards, **SAVINGS[saving])
    export_model(open_checkpoint(tmp_path / "a", registry), tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_safetensors_win(tmp_path: Path, registry: Registry) -> None:
    """Guards the order: a stale pickle beside safetensors is not opened at all."""
    reference.save_tiny(tmp_path, "gpt2", reference.GPT2)
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    assert dict(open_checkpoint(tmp_path, registry).parameters())


def test_the_file_is_mapped_and_never_written(tmp_path: Path, registry: Registry) -> None:
    """Guards memory and the file: weights are views of it, and training them leaves it as it was."""
    save_bin(tmp_path, "llama", reference.LLAMA)
    before = (tmp_path / "pytorch_model.bin").read_bytes()
    model = load_model(open_checkpoint(tmp_path, registry), Eager(), dtype=torch.float32)
    assert "pytorch_model.bin" in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before


def test_shared_but_not_tied(tmp_path: Path, registry: Registry) -> None:
    """Guards against two parameters on one storage: a step on the embedding would move the head as well."""
    model = save_bin(tmp_path, "gpt2", reference.GPT2 | {"tie_word_embeddings": False})
    state = model.state_dict()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load_model(open_checkpoint(tmp_path, registry), Eager(), dtype=torch.float32)
    assert torch.equal(ours.head.weight, ours.embed.weight)
    with torch.no_grad():
        ours.embed.weight.zero_()
    assert ours.head.weight.any()


class Attack:
    """A pickle that creates a file when it is read."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.ran,))


ATTACKS: dict[str, Callable[[Any, Path], object]] = {
    "zip": lambda attack, path: torch.save({"model": attack, "w": torch.ones(2)}, path),
    "legacy": lambda attack, path: torch.save({"w": attack}, path, _use_new_zipfile_serialization=False),
    "protocol 2": lambda attack, path: path.write_bytes(pickle.dumps(attack, protocol=2)),
    "protocol 5": lambda attack, path: path.write_bytes(pickle.dumps(attack, protocol=5)),
}


@pytest.mark.parametrize("how", ATTACKS)
def test_code_is_not_run(how: str, tmp_path: Path) -> None:
    """Guards against weights_only being dropped; the error names the file and says that nothing was run."""
    path = tmp_path / "pytorch_model.bin"
    ATTACKS[how](Attack(tmp_path / "ran"), path)
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin .*[Nn]othing in it was run"):
        load_torch_file(path)
    assert not (tmp_path / "ran").exists()


def test_the_attack_works_elsewhere(tmp_path: Path) -> None:
    """Guards the test above: an attack that fails by itself would prove nothing."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_what_it_asked_for_is_named(tmp_path: Path) -> None:
    """Guards the remedy for the honest case: a whole module was saved instead of its state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "model.bin")
    with pytest.raises(FileFormatError, match=r"asks for torch.nn.modules.linear.Linear.*state_dict"):
        load_torch_file(tmp_path / "model.bin")


CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a list": (lambda state: list(state.values()), "holds a list, not tensors by name"),
    "a nested dict": (lambda state: {"state_dict": state}, "'state_dict' is a dict, not a tensor"),
    "a number": (lambda state: state | {"step": 3}, "'step' is a int, not a tensor"),
    "a nameless tensor": (lambda state: {0: torch.ones(1)}, "0 is a Tensor, not a tensor with a name"),
    "sparse": (lambda state: state | {"lm_head.weight": torch.eye(3).to_sparse()}, "torch.sparse_coo"),
    "complex": (lambda state: state | {"lm_head.weight": torch.ones(2, dtype=torch.cfloat)}, "torch.complex64"),
    "on meta": (lambda state: state | {"lm_head.weight": torch.ones(2, device="meta")}, "on meta"),
    "unknown": (lambda state: state | {"extra.weight": torch.ones(1)}, "the model lacks: extra.weight"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_other_contents(what: str, tmp_path: Path, registry: Registry) -> None:
    """Guards each message."""
    change, said = CONTENTS[what]
    model = save_bin(tmp_path, "gpt2", reference.GPT2)
    torch.save(change(dict(model.state_dict())), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=said) as caught:
        open_checkpoint(tmp_path, registry).located()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("saving", SAVINGS)
def test_truncated_anywhere(saving: str, tmp_path: Path) -> None:
    """Guards against a traceback: whatever is left of a file, the error is ours and names it."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(50), "b": torch.zeros(7, dtype=torch.bfloat16)}, path, **SAVINGS[saving])
    whole = path.read_bytes()
    for size in [*range(0, min(400, len(whole)), 7), *range(400, len(whole) - 1, 101)]:
        path.write_bytes(whole[:size])
        # Cut within the name of torch's own class, a file asks for another.
        with pytest.raises(FileFormatError, match=r"pytorch_model\.bin is (truncated or damaged|a pickle that holds)"):
            load_torch_file(path)


@pytest.mark.parametrize("content", [bytes(range(256)) * 8, b"\x80\x02", b"PK\x03\x04" + bytes(200), b"hello\n"])
def test_garbage(content: bytes, tmp_path: Path) -> None:
    """Guards against a traceback."""
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"x\.bin is truncated or damaged"):
        load_torch_file(tmp_path / "x.bin")


def test_index(tmp_path: Path, registry: Registry) -> None:
    """Guards the index: a missing shard, a tensor that is not where it says, names that are no strings."""
    save_bin(tmp_path, "gpt2", reference.GPT2, shards=2)
    index = tmp_path / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "transformer.wte.weight"
    for file, said in (
        ("pytorch_model-00009-of-00009.bin", "00009-of-00009.bin is missing"),
        ("pytorch_model-00002-of-00002.bin", f"lacks the tensor '{name}' that the index promises"),
        (3, "must map each tensor to the name of a file"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {name: file}}))
        with pytest.raises(FileFormatError, match=said):
            open_checkpoint(tmp_path, registry)
