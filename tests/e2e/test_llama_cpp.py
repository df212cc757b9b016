"""llama.cpp loads what zoo writes and says the same with it. Skipped where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from tests import gguf_files, reference, trained_tokenizers
from zoo.convert.base import Checkpoint, WriteOptions
from zoo.convert.export import commit, export_model
from zoo.convert.gguf import GGUF
from zoo.convert.load import open_checkpoint
from zoo.convert.verify import verify
from zoo.registry import Registry

PYTHON = os.environ.get("ZOO_LLAMA_CPP_PYTHON")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "llama_cpp_agreement.py"

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="set ZOO_LLAMA_CPP_PYTHON to an interpreter that has llama-cpp-python"
)


def digits() -> tokenizers.Tokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return trained_tokenizers.byte_level(pre_tokenizers.Sequence(steps))


LLAMA3 = reference.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "gpt2": ("gpt2", gguf_files.GPT2, trained_tokenizers.byte_level),
    "neox": ("gpt_neox", gguf_files.NEOX, trained_tokenizers.byte_level),
    "neox-sequential": ("gpt_neox", gguf_files.NEOX | {"use_parallel_residual": False}, digits),
    "llama": ("llama", gguf_files.LLAMA | {"tie_word_embeddings": True}, trained_tokenizers.sentencepiece_style),
    "llama-llama3": ("llama", gguf_files.LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 5e5}, digits),
    "llama-linear": (
        "llama",
        gguf_files.LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        trained_tokenizers.byte_level,
    ),
}


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path: Path, registry: Registry) -> Checkpoint:
    """A tiny random model with a tokenizer."""
    model_type, config, tokenizer = MODELS[request.param]
    changes = {"vocab_size": trained_tokenizers.VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None}
    model = reference.tiny_model(model_type, config | changes)
    with torch.no_grad():  # single bytes make no text; a row of zeros is never the likeliest
        model.get_output_embeddings().weight[:259] = 0.0
    model.save_pretrained(tmp_path / request.param)
    trained_tokenizers.save(tmp_path / request.param, tokenizer())
    return open_checkpoint(tmp_path / request.param, registry)


def test_same_text_and_ids(source: Checkpoint, tmp_path: Path) -> None:
    """Guards the whole file: layouts, metadata and tokenizer, by greedy text and the ids of hundreds of strings."""
    target = tmp_path / "m.gguf"
    export_model(source, target, writer=GGUF(), dtype=torch.float32)
    command = [sys.executable, str(SCRIPT), str(target), "--llama-cpp-python", str(PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("     OK\n") == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "q8_0"], ids=str)
def test_logits(dtype: torch.dtype | str, source: Checkpoint, tmp_path: Path, registry: Registry) -> None:
    """Guards the other types, where llama.cpp rounds activations too and close calls go either way."""
    target = tmp_path / "m.gguf"
    writing = GGUF().write(source, WriteOptions(dtype))
    commit(writing, target)
    found = verify(source, target, writing, "gguf", registry)
    assert found.reference.startswith("llama.cpp")
