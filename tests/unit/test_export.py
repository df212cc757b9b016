"""Conversion to a Hugging Face directory: bit-identical, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor

from tests import gguf_files, reference
from zoo.convert import export
from zoo.convert.base import Checkpoint, Writer
from zoo.convert.export import export_model
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError, ZooError
from zoo.registry import Registry


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors in a directory, by name."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_round_trip(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards every transform's inverse: HF -> zoo -> HF has the same names and bits, and transformers loads it."""
    source, target = tmp_path / "a", tmp_path / "b"
    theirs = reference.save_tiny(source, *reference.VARIANTS[variant])
    export_model(open_checkpoint(source, registry), target)
    before, after = stored(source), stored(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    ids = reference.tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_shards_in_and_out(tmp_path: Path, registry: Registry) -> None:
    """Guards the index files: read from transformers, written so that transformers reads them."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, "llama", reference.LLAMA, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    exported = export_model(open_checkpoint(source, registry), target, max_shard_bytes=50_000)
    assert len(list(target.glob("*.safetensors"))) > 2
    assert exported.n_bytes == sum(t.nbytes for t in stored(source).values())
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(t, stored(source)[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path: Path, registry: Registry) -> None:
    """Guards --dtype: every tensor is rounded as torch rounds it, and config.json says so."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, "gpt_neox", reference.NEOX)
    export_model(open_checkpoint(source, registry), target, dtype=dtype)
    after = stored(target)
    assert all(torch.equal(after[name], t.to(dtype)) for name, t in stored(source).items())
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == dtype


def test_what_else_is_written(tmp_path: Path, registry: Registry) -> None:
    """Guards the tokenizer, the generation config, unknown-but-harmless config keys, and the provenance."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny_chat_model(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/else"}))
    export_model(open_checkpoint(source, registry), target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((target / "config.json").read_text())["_name_or_path"] == "someone/else"
    provenance = YAML(typ="safe").load(target / "zoo.yaml")
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["sha256"] == {"model.safetensors": digest}
    assert open_checkpoint(target, registry).spec.to_dict() == provenance["spec"]


def said_elsewhere(checkpoint: Checkpoint) -> Checkpoint:
    """The spec is another one, and the config of the source still says the old."""
    return replace(checkpoint, spec=replace(checkpoint.spec, norm_eps=0.25, max_seq_len=32))


def unsayable(checkpoint: Checkpoint) -> Checkpoint:
    """What the family has no key for."""
    return replace(checkpoint, spec=replace(checkpoint.spec, window=8), config={})


def refused(checkpoint: Checkpoint) -> Checkpoint:
    """A key that nobody would read back."""
    return replace(checkpoint, config=checkpoint.config | {"attention_sinks": 4})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (said_elsewhere, r"family 'llama' can not say max_seq_len = 32, norm_eps = 0\.25"),
        (unsayable, "family 'llama' can not say window = 8"),
        (refused, "can not hold this model: .* does not understand: attention_sinks = 4"),
    ],
)
def test_a_config_that_would_lose_something(
    change: Callable[[Checkpoint], Checkpoint], says: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against a directory that loads as another model; nothing is written."""
    reference.save_tiny(tmp_path / "a", "llama", reference.LLAMA)
    with pytest.raises(InputError, match=says):
        export_model(change(open_checkpoint(tmp_path / "a", registry)), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_spec_is_said_without_the_words_of_the_source(tmp_path: Path, registry: Registry) -> None:
    """Guards a source in another format, whose config is only what its reader derived."""
    reference.save_tiny(tmp_path / "a", "llama", reference.LLAMA | {"rope_scaling": reference.LLAMA3_ROPE})
    checkpoint = open_checkpoint(tmp_path / "a", registry)
    export_model(replace(checkpoint, config={}), tmp_path / "b")
    assert open_checkpoint(tmp_path / "b", registry).spec == checkpoint.spec


def damaged_sentencepiece(path: Path) -> Path:
    reference.save_tiny(path, "llama", reference.LLAMA)
    (path / "tokenizer.model").write_bytes(b"no protobuf")
    return path


def damaged_gguf(path: Path) -> Path:
    path.mkdir()
    return gguf_files.write_llama(path / "m.gguf", metadata={"tokenizer.ggml.model": "gpt2"})


def no_tokenizer(path: Path) -> Path:
    reference.save_tiny(path, "llama", reference.LLAMA)
    return path


def gguf_without_tokenizer(path: Path) -> Path:
    path.mkdir()
    return gguf_files.write_llama(path / "m.gguf")


@pytest.mark.parametrize("format_name", ["hf", "litgpt"])
@pytest.mark.parametrize("source", [damaged_sentencepiece, damaged_gguf, no_tokenizer, gguf_without_tokenizer])
def test_a_tokenizer_is_never_dropped(
    source: Callable[[Path], Path], format_name: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against a model that comes out mute: a tokenizer that can not be read is an error, none at all is not."""
    checkpoint = open_checkpoint(source(tmp_path / "a"), registry)
    writer: Writer = registry.load("converter", format_name)()
    written: list[int] = []

    def export() -> Any:
        return export_model(checkpoint, tmp_path / "b", writer=writer, progress=written.append)

    if source in (no_tokenizer, gguf_without_tokenizer):
        export()
        return
    with pytest.raises(InputError, match="token"):
        export()
    assert written == []
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_destination_is_taken(tmp_path: Path, registry: Registry) -> None:
    """Guards what lies there already; an empty directory is welcome."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, "gpt2", reference.GPT2)
    target.mkdir()
    export_model(open_checkpoint(source, registry), target)
    with pytest.raises(InputError, match="exists and is not empty"):
        export_model(open_checkpoint(source, registry), target)


class Stop(BaseException):
    """Stands for Ctrl-C."""


def test_interrupted(tmp_path: Path, registry: Registry) -> None:
    """Guards all or nothing: nothing is left behind, and the next attempt succeeds."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, "gpt2", reference.GPT2)
    checkpoint = open_checkpoint(source, registry)

    def stop(n_bytes: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        export_model(checkpoint, target, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    export_model(checkpoint, target)


KILLED = """
import sys, time
from pathlib import Path
from zoo.convert.export import export_model
from zoo.convert.load import open_checkpoint
from zoo.plugins import load_zoo
def slow(n_bytes):
    print("writing", flush=True)
    time.sleep(0.2)
export_model(open_checkpoint(Path(sys.argv[1]), load_zoo().registry), Path(sys.argv[2]), progress=slow)
"""


def test_killed(tmp_path: Path, registry: Registry) -> None:
    """Guards kill -9: there is no half-made directory, and the next attempt clears what is left."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, "gpt2", reference.GPT2)
    with subprocess.Popen([sys.executable, "-c", KILLED, source, target], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    export_model(open_checkpoint(source, registry), target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_full(small_disk: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards both: the check before any work, and a disk that fills up meanwhile."""
    source = tmp_path / "a"
    reference.save_tiny(source, "llama", reference.LLAMA | {"num_hidden_layers": 6})
    checkpoint = open_checkpoint(source, registry)
    with pytest.raises(ZooError, match=r"needs 0\.00 GB"):
        export_model(checkpoint, small_disk / "b")
    monkeypatch.setattr(export, "_check_space", lambda destination, needed: None)
    with pytest.raises(ZooError, match="Free some space"):
        export_model(checkpoint, small_disk / "b")
    assert not list(small_disk.iterdir())
