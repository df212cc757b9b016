"""A quantized load never holds the float model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import reference
from tests.unit.test_quantized_directory import write
from zoo.registry import Registry

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

PROBE = """
import json, sys, threading, time
from pathlib import Path
from zoo.api import load
warm, big, quantize = sys.argv[1:]
options = {"precision": "bf16-true", "device": "cpu", "quantize": quantize or None}
load(warm, **options)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
model = load(big, **options).model
done.set(); watcher.join(); seen.append(anonymous())
tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
print(json.dumps({"peak": max(seen) - before, "model": sum(tensors.values())}))
"""
N_VOCAB, WIDTH = 40_000, 768


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and one whose bfloat16 weights take 190 MB, a third of them the embedding."""
    folder = tmp_path_factory.mktemp("memory")
    reference.save_tiny(folder / "tiny", *reference.VARIANTS["llama-tied"])
    config = LlamaConfig(
        vocab_size=N_VOCAB, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=9, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "big")
    return {"tiny": folder / "tiny", "big": folder / "big"}


def measure(directories: dict[str, Path], big: Path, quantize: str) -> dict[str, int]:
    """Bytes of a load in a fresh process."""
    command = [sys.executable, "-c", PROBE, str(directories["tiny"]), str(big), quantize]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("stored", [False, True], ids=["float", "quantized"])
def test_peak(quantize: str, stored: bool, directories: dict[str, Path], tmp_path: Path, registry: Registry) -> None:
    """At most the model and the largest tensor."""
    big = directories["big"]
    if stored:
        write(big, tmp_path / "stored", quantize, registry, dtype=torch.bfloat16)
        big = tmp_path / "stored"
    found = measure(directories, big, "" if stored else quantize)
    largest = N_VOCAB * WIDTH * (1 if stored else 2)
    assert found["peak"] <= found["model"] + largest
