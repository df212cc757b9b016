"""Peak resident memory of loading and converting, measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import reference

if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc", allow_module_level=True)

MEASURE = """
import sys
from pathlib import Path
import torch
from zoo.attention.sdpa import SDPA
from zoo.convert.export import export_model
from zoo.convert.load import load_model, open_checkpoint
from zoo.plugins import load_zoo

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def touch(model):
    for parameter in model.parameters():
        parameter.detach().sum()

def work(what, source, target):
    checkpoint = open_checkpoint(source, registry)
    if what == "load":
        touch(load_model(checkpoint, SDPA(), dtype=torch.float32))
    else:
        export_model(checkpoint, target, max_shard_bytes=40_000_000)

what, tiny, source, target = sys.argv[1], *map(Path, sys.argv[2:])
registry = load_zoo().registry
work(what, tiny, target / "tiny")  # so that all imports are behind us
before = peak()
work(what, source, target / "big")
print(peak() - before)
"""

BIG: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", reference.LLAMA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}),
    "gpt2": ("gpt2", reference.GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 8}),
    "gpt_neox": ("gpt_neox", reference.NEOX | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}),
}


def save_big(directory: Path, name: str, **options: Any) -> int:
    """A model of about 250 MB, saved; returns its bytes."""
    config = transformers.AutoConfig.for_model(BIG[name][0], **BIG[name][1])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, **options)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def measure(what: str, name: str, directory: Path) -> int:
    """Peak resident bytes above the interpreter with its imports, for the model in ``directory / "a"``."""
    reference.save_tiny(directory / "tiny", BIG[name][0], {**reference.VARIANTS[BIG[name][0]][1]})
    paths = [str(directory / name) for name in ("tiny", "a", "out")]
    command = [sys.executable, "-c", MEASURE, what, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


@pytest.mark.parametrize(("name", "limit"), [("llama", 1.15), ("gpt2", 1.15), ("gpt_neox", 1.6)])
def test_loading_adds_no_copy(name: str, limit: float, tmp_path: Path) -> None:
    """Guards the mapping of weights in place; NeoX's interleaved q, k and v have to be taken apart."""
    size = save_big(tmp_path / "a", name)
    assert size > 200_000_000
    assert measure("load", name, tmp_path) <= limit * size


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_converting_streams(name: str, tmp_path: Path) -> None:
    """Guards the bound on a conversion: one shard mapped, one tensor in hand, not the model."""
    size = save_big(tmp_path / "a", name, max_shard_size="40MB")
    largest = max(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) >= 5
    tensor = 3 * 768 * 768 * torch.float32.itemsize
    peak = measure("convert", name, tmp_path)
    assert peak <= 2 * largest + 4 * tensor < size / 2
