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
PHI3 = gguf_files.PHI3 | gguf_files.LONGROPE
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
    **{
        name: (*gguf_files.CONFIGS[name], trained_tokenizers.byte_level)
        for name in (
            *("qwen2", "qwen2-tied", "phi3", "stablelm", "stablelm-1_6b", "stablelm-12b", "mistral", "phi"),
            *("gpt_bigcode", "falcon-40b", "olmo-clipped", "olmo2"),
        )
    },
    "falcon": (
        *gguf_files.CONFIGS["falcon"],
        lambda: trained_tokenizers.byte_level(trained_tokenizers.falcon_splitting()),
    ),
    **{  # Not tied: the rows of zeros below would be all that these see of some prompts.
        name: (name, gguf_files.CONFIGS[name][1] | {"tie_word_embeddings": False}, trained_tokenizers.byte_level)
        for name in ("qwen3", "olmo", "smollm3")
    },
    "qwen3-linear": (
        "qwen3",
        gguf_files.LLAMA | {"head_dim": 32, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        trained_tokenizers.byte_level,
    ),
    # llama.cpp goes by the context that it makes room for (256 or more), zoo by how long the text is.
    "phi3-short-factors": (
        "phi3",
        PHI3 | {"original_max_position_embeddings": 256, "max_position_embeddings": 256},
        trained_tokenizers.byte_level,
    ),
    "phi3-long-factors": ("phi3", PHI3 | {"original_max_position_embeddings": 4}, trained_tokenizers.byte_level),
    "gemma": (*gguf_files.CONFIGS["gemma"], trained_tokenizers.sentencepiece_style),
    "gemma2": (*gguf_files.CONFIGS["gemma2"], trained_tokenizers.gemma_style),
}


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path: Path, registry: Registry) -> Checkpoint:
    """A tiny random model with a tokenizer."""
    model_type, config, tokenizer = MODELS[request.param]
    changes = {"vocab_size": trained_tokenizers.VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None}
    model = reference.tiny_model(model_type, config | changes)
    with torch.no_grad():  # single bytes make no text; a row of zeros is never the likeliest
        model.get_output_embeddings().weight[:259] = 0.0
        for name, parameter in model.named_parameters():
            if model_type.startswith("gemma") and name.endswith("norm.weight"):
                parameter.sub_(1.0)  # to which 1 is added; twice the usual scale would be twice the rounding
    model.save_pretrained(tmp_path / "m")  # llama.cpp changes the tokens of what is called "phi3"
    trained_tokenizers.save(tmp_path / "m", tokenizer())
    return open_checkpoint(tmp_path / "m", registry)


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
