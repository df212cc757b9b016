"""``zoo convert`` to every format: named or by suffix, all or nothing, checked with --verify, within bounded memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import reference, trained_tokenizers
from tests.e2e.test_command_line import Zoo
from zoo.convert import export
from zoo.convert.base import WriteOptions
from zoo.convert.export import choose_writer, commit
from zoo.convert.load import open_checkpoint
from zoo.convert.verify import verify
from zoo.errors import InputError, ZooError
from zoo.registry import Registry

TARGETS = {"hf": "out", "gguf": "out.gguf", "litgpt": "out"}
"""What is written to, by format."""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FORMATS = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer that every format can hold."""
    directory = tmp_path / "source"
    config = reference.LLAMA | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 96, "vocab_size": trained_tokenizers.VOCAB_SIZE, "head_dim": 16}
    reference.save_tiny(directory, "llama", config)
    trained_tokenizers.save(directory, trained_tokenizers.byte_level())
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoo:
    """The command line, in the directory of the source, without plugins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_PLUGINS", "")
    return Zoo(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def _no_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, only what is installed here is asked."""
    for name in ("TRANSFORMERS", "LITGPT", "LLAMA_CPP"):
        monkeypatch.delenv(f"ZOO_{name}_PYTHON", raising=False)


# --- choosing a format -----------------------------------------------------------------------------------------


@FORMATS
def test_to(name: str, run: Zoo, source: Path, tmp_path: Path) -> None:
    """Guards --to: the result opens as that format and writes the same text."""
    target = tmp_path / TARGETS[name]
    done = run("convert", source, target, "--to", name, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == name
    arguments = ("--prompt", "the", "--max-new-tokens", "8", "--temperature", "0")
    assert run("generate", target, *arguments).out == run("generate", source, *arguments).out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, "source"])


def test_the_suffix_decides(run: Zoo, source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "m.gguf", "--dtype", "q8_0").code == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("out", "--to", "gguf"), r"out does not end in .gguf"),
        (("out", "--to", "nanogpt"), "can be read but not written. Write gguf, hf, litgpt, quantized."),
        (("out", "--to", "ggfu"), "Did you mean 'gguf'"),
        (("out", "--dtype", "q8_0"), "holds no q8_0 weights"),
        (("out", "--to", "litgpt", "--dtype", "q8_0"), "holds no q8_0 weights"),
        (("out.gguf", "--quantize", "int4"), "gguf holds no weights of the quantizer 'int4'"),
        (("out", "--to", "quantized"), "--quantize int8"),
        (("taken.gguf",), "taken.gguf exists already"),
        (("taken", "--to", "litgpt"), "exists and is not empty"),
    ],
)
def test_what_can_not_be_written(
    arguments: tuple[str, ...],
    says: str,
    run: Zoo,
    source: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    done = run("convert", source, *arguments)
    assert done.code == 2
    assert says in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_licence_goes_along(run: Zoo, source: Path, tmp_path: Path) -> None:
    """Guards general.license and general.name of a model that the registry knows."""
    import gguf

    (source / "zoo.yaml").write_text("schema: 1\nmodel: smollm2-135m\nsource: hf:HuggingFaceTB/SmolLM2-135M@abc\n")
    assert run("convert", source, tmp_path / "m.gguf").code == 0
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = [fields[f"general.{key}"].contents() for key in ("name", "license", "source.url")]
    assert found == ["smollm2-135m", "apache-2.0", "hf:HuggingFaceTB/SmolLM2-135M@abc"]
    assert run("convert", source, tmp_path / "lit", "--to", "litgpt").code == 0
    text = (tmp_path / "lit" / "model_config.yaml").read_text()
    assert "  name: SmolLM2-135M\n  org: HuggingFaceTB\n" in text


# --- all or nothing --------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for Ctrl-C."""


@FORMATS
def test_interrupted(name: str, source: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards against a part of a file, or of a directory, that looks like a whole one."""
    target = tmp_path / TARGETS[name]
    seen: list[int] = []

    def stop(n_bytes: int) -> None:
        seen.append(n_bytes)
        if len(seen) == 5:
            raise Stop

    _, writer = choose_writer(name, target, registry)
    checkpoint = open_checkpoint(source, registry)
    with pytest.raises(Stop):
        commit(writer.write(checkpoint, WriteOptions(progress=stop)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    told: list[int] = []
    writing = writer.write(checkpoint, WriteOptions(progress=told.append))
    commit(writing, target)
    assert sum(told) == writing.n_bytes


@LINUX
@FORMATS
def test_flushed_before_it_appears(
    name: str, source: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the order: every file is on the disk before the rename, and the rename is flushed too."""
    target = tmp_path / TARGETS[name]
    steps: list[str] = []
    flush, rename = os.fsync, Path.rename

    def record_flush(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def record_rename(self: Path, other: Path) -> Path:
        steps.append("rename")
        return rename(self, other)

    _, writer = choose_writer(name, target, registry)
    writing = writer.write(open_checkpoint(source, registry), WriteOptions())
    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(Path, "rename", record_rename)
    commit(writing, target)
    at = steps.index("rename")
    files = {path.name for path in target.iterdir()} if target.is_dir() else {f".{target.name}.partial"}
    assert set(steps[:at]) >= files
    assert steps[at + 1 :] == [tmp_path.name]


# --- --verify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("hf", None), ("hf", "bf16"), ("gguf", None), ("gguf", "fp16"), ("gguf", "bf16"), ("litgpt", "bf16")],
)
def test_verify(name: str, dtype: str | None, run: Zoo, source: Path, tmp_path: Path) -> None:
    """Guards the check against false alarms: rounding to the written dtype is no difference."""
    options = ("--dtype", dtype) if dtype else ()
    done = run("convert", source, tmp_path / TARGETS[name], "--to", name, "--verify", *options)
    assert done.code == 0, done.err
    assert "30 parameters read back bit for bit" in done.out
    if name == "hf":
        assert f"of transformers {transformers.__version__} (allowed" in done.out
    elif importlib.util.find_spec({"gguf": "llama_cpp", "litgpt": "litgpt"}[name]) is None:
        assert "of zoo itself" in done.out
        assert "is not installed, so zoo read" in done.err


def test_verify_quantized(run: Zoo, source: Path, tmp_path: Path) -> None:
    done = run("convert", source, tmp_path / "m.gguf", "--dtype", "q8_0", "--verify", "--json")
    assert done.code == 0, done.err
    verified = json.loads(done.out)["verified"]
    assert verified["n_parameters"] == 30
    assert verified["difference"] <= verified["allowed"]


Damage = Callable[[Path], None]


def alter_safetensors(target: Path) -> None:
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] += 0.5
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def alter_torch_file(target: Path) -> None:
    state = torch.load(target / "lit_model.pth", weights_only=True)
    state["transformer.h.1.attn.qkv.weight"][3, 5] += 0.5
    torch.save(state, target / "lit_model.pth")


def alter_gguf(target: Path) -> None:
    import gguf

    at = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}["blk.1.attn_q.weight"].data_offset
    raw = bytearray(target.read_bytes())
    raw[at + 3] ^= 0x01
    target.write_bytes(raw)


ALTER: dict[str, Damage] = {"hf": alter_safetensors, "gguf": alter_gguf, "litgpt": alter_torch_file}


@FORMATS
def test_verify_finds_an_altered_tensor(
    name: str,
    run: Zoo,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards the check itself: one value of one tensor is enough, and the tensor is named."""
    target = tmp_path / TARGETS[name]

    def spoil(writing: Any, destination: Path) -> Any:
        written = commit(writing, destination)
        ALTER[name](destination)
        return written

    monkeypatch.setattr(export, "commit", spoil)
    done = run("convert", source, target, "--to", name, "--verify")
    assert done.code == 1
    assert "1 of 30 parameters differ, blocks.1.attn.q.weight by up to" in done.err


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 700.0), ("rms_norm_eps", 0.5), ("num_key_value_heads", None)]
)
def test_verify_finds_an_altered_config(key: str, value: Any, source: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards what no tensor shows: the reference implementation computes something else."""
    target = tmp_path / "out"
    _, writer = choose_writer(None, target, registry)
    checkpoint = open_checkpoint(source, registry)
    writing = writer.write(checkpoint, WriteOptions())
    commit(writing, target)
    config = json.loads((target / "config.json").read_text())
    config.pop("rope_parameters", None)
    (target / "config.json").write_text(json.dumps(config | {key: value}))
    wanted = "can not be read back" if value is None else "logits by transformers .* differ from zoo's"
    with pytest.raises(ZooError, match=wanted) as raised:
        verify(checkpoint, target, writing, "hf", registry)
    assert not isinstance(raised.value, InputError), "the work failed: exit code 1"


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("exit 42", 3, "which has no transformers"),
        ("echo 'ValueError: nothing here' >&2; exit 1", 1, "does not read"),
        (None, 3, "No such file"),
    ],
)
def test_references_that_can_not_be_asked(
    script: str | None,
    code: int,
    says: str,
    run: Zoo,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a silent fallback when an interpreter is named, and against its failure taken for agreement."""
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setenv("ZOO_TRANSFORMERS_PYTHON", str(python))
    done = run("convert", source, tmp_path / "out", "--verify")
    assert done.code == code
    assert says in done.err


# --- memory ----------------------------------------------------------------------------------------------------


MEASURE = """
import sys
from pathlib import Path
from zoo.convert.export import choose_writer, export_model
from zoo.convert.load import open_checkpoint
from zoo.plugins import load_zoo

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def work(source, target):
    dtype = "q8_0" if name == "gguf" else None
    _, writer = choose_writer(name, target, registry)
    export_model(open_checkpoint(source, registry), target, writer=writer, dtype=dtype)

name, tiny, source, target, suffix = sys.argv[1], *map(Path, sys.argv[2:5]), sys.argv[5]
registry = load_zoo().registry
work(tiny, target / ("tiny" + suffix))  # so that all imports are behind us
before = peak()
work(source, target / ("big" + suffix))
print(peak() - before)
"""


@LINUX
@pytest.mark.parametrize("name", ["gguf", "litgpt"])
def test_converting_streams(name: str, source: Path, tmp_path: Path) -> None:
    """Guards the bound on a conversion: one shard mapped and a few tensors in hand, not the model."""
    config = reference.LLAMA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}
    built = transformers.AutoConfig.for_model("llama", **config | {"vocab_size": trained_tokenizers.VOCAB_SIZE})
    model = transformers.AutoModelForCausalLM.from_config(built)
    model.save_pretrained(tmp_path / "big", max_shard_size="40MB")
    trained_tokenizers.save(tmp_path / "big", trained_tokenizers.byte_level())
    files = [path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")]
    command = [sys.executable, "-c", MEASURE, name, source, tmp_path / "big", tmp_path / "out"]
    done = subprocess.run([*map(str, command), Path(TARGETS[name]).suffix], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tensor = 3 * 768 * 3072 * torch.float32.itemsize
    assert int(done.stdout) <= 2 * max(files) + 2 * tensor < sum(files) / 1.5
