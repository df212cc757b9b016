"""GGUF files as checkpoints: found by content, metadata understood or refused, families, rotary scalings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import gguf_files, reference
from zoo.convert.gguf import GGUF
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.registry import Component, Origin, Registry

LLAMA3_LENGTH = 8192


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny random llama with the given metadata and tensors on top."""

    return partial(gguf_files.write_llama, tmp_path / "m.gguf")


def read_everything(path: Path, registry: Registry) -> None:
    """Open, and take every tensor."""
    checkpoint = GGUF().open(path, registry)
    list(checkpoint.parameters())


# --- which paths are read --------------------------------------------------------------------------------------


def test_reads(write: Callable[..., Path], tmp_path: Path) -> None:
    converter, gguf_file = GGUF(), write()
    assert converter.reads(gguf_file)
    assert converter.reads(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"no model")
    assert converter.reads(tmp_path)
    assert not converter.reads(tmp_path / "other.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert not converter.reads(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "second.gguf").write_bytes(gguf_file.read_bytes())
    assert not converter.reads(tmp_path)
    assert not converter.reads(tmp_path / "absent.gguf")


def test_two_files_in_a_directory(write: Callable[..., Path], tmp_path: Path, registry: Registry) -> None:
    gguf_file = write()
    (tmp_path / "second.gguf").write_bytes(gguf_file.read_bytes())
    with pytest.raises(FileFormatError, match=r"m\.gguf, second\.gguf"):
        GGUF().open(tmp_path, registry)


def test_found_by_its_content(write: Callable[..., Path], registry: Registry) -> None:
    """Guards the registration: a file and its directory open without a format being named."""
    path = write()
    assert open_checkpoint(path, registry).path == open_checkpoint(path.parent, registry).path == path


# --- metadata --------------------------------------------------------------------------------------------------


def test_spec(write: Callable[..., Path], registry: Registry) -> None:
    path = write(metadata={"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 12345.678})
    spec = GGUF().open(path, registry).spec
    assert spec.norm_eps == 1e-5  # not 9.999999747378752e-06
    assert spec.rope is not None
    assert spec.rope.base == 12345.678
    assert (spec.n_kv_heads, spec.vocab_size, spec.tie_embeddings) == (2, 97, False)


def test_config(write: Callable[..., Path], registry: Registry) -> None:
    """Guards what the file says by a tensor (tied or not, the vocabulary) and the ids of special tokens."""
    ids = {"bos": 1, "eos": 2, "padding": 0, "eot": 5}
    metadata = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    checkpoint = GGUF().open(write(metadata=metadata | {"llama.vocab_size": None}), registry)
    wanted = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97}
    wanted |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    assert {key: checkpoint.config[key] for key in wanted} == wanted
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


def test_sampling_defaults(write: Callable[..., Path], registry: Registry) -> None:
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "tokenizer.ggml.eos_token_id": 2}
    generation = GGUF().open(write(metadata=metadata), registry).generation
    assert generation == {"eos_token_id": 2, "temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "feed_forward_length"])
def test_missing_key(key: str, write: Callable[..., Path], registry: Registry) -> None:
    with pytest.raises(FileFormatError, match=rf"m\.gguf lacks the metadata key 'llama\.{key}'"):
        GGUF().open(write(metadata={f"llama.{key}": None}), registry)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("attention.sliding_window", 4096),
        ("attention.causal", False),
        ("logit_scale", 2.0),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.attn_factor", 2.0),
        ("rope.dimension_count", 8),
        ("attention.value_length", 8),
        ("some.new.setting", "x"),
    ],
)
def test_settings_that_are_not_understood(key: str, value: Any, write: Callable[..., Path], registry: Registry) -> None:
    """Guards against a model that loads and computes something else."""
    with pytest.raises(InputError, match=rf"m\.gguf.*({key}|{value})"):
        GGUF().open(write(metadata={f"llama.{key}": value}), registry)


def test_settings_that_change_nothing(write: Callable[..., Path], registry: Registry) -> None:
    metadata = {
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.attention.causal": True,
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.finetuned": False,
        "llama2.some.other.architecture": 1,
    }
    read_everything(write(metadata=metadata), registry)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": "four"},
        {"llama.attention.head_count": [4, 4]},
        {"llama.block_count": 2**31},
        {"split.count": "two"},
        {"tokenizer.ggml.eot_token_id": [1, 2]},
    ],
    ids=str,
)
def test_values_that_make_no_sense(metadata: dict[str, Any], write: Callable[..., Path], registry: Registry) -> None:
    with pytest.raises(InputError, match=r"m\.gguf"):
        GGUF().open(write(metadata=metadata), registry)


@pytest.mark.parametrize(
    ("key", "value", "says"), [("split.count", 3, "pieces"), ("general.type", "adapter", "adapter")]
)
def test_no_whole_model(key: str, value: Any, says: str, write: Callable[..., Path], registry: Registry) -> None:
    with pytest.raises(InputError, match=rf"m\.gguf: .*{says}"):
        GGUF().open(write(metadata={key: value}), registry)


# --- families --------------------------------------------------------------------------------------------------


def test_unknown_architecture(tmp_path: Path, registry: Registry) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "mamba", {}, {})
    with pytest.raises(InputError, match=r"'mamba'; zoo reads falcon, gemma, gemma2, gpt2, gptneox, llama, olmo, "):
        GGUF().open(path, registry)


def test_a_broken_family_of_others(write: Callable[..., Path], registry: Registry, tmp_path: Path) -> None:
    """Guards against one broken plugin making every GGUF file unreadable."""
    mine = Registry()
    for name, target in (("a-broken", "no_such_module:X"), ("llama", "zoo.families.llama:LLAMA")):
        origin = Origin(distribution="zoo" if name == "llama" else "theirs")
        mine.add(Component(kind="family", name=name, target=target, help="", origin=origin))
    read_everything(write(), mine)
    with pytest.raises(InputError, match="did not load: a-broken"):
        GGUF().open(gguf_files.write(tmp_path / "o.gguf", "mamba", {}, {}), mine)


def test_mistral_is_llama(tmp_path: Path, registry: Registry) -> None:
    """Guards the one architecture that two families write, by which of them it is read."""
    path = gguf_files.write_model(tmp_path / "m.gguf", reference.tiny_model(*gguf_files.CONFIGS["mistral"]))
    assert GGUF().open(path, registry).family.name == "llama"
    mine = Registry()
    origin = Origin(distribution="zoo")
    mine.add(Component(kind="family", name="mistral", target="zoo.families.mistral:MISTRAL", help="", origin=origin))
    with pytest.raises(InputError, match="architecture 'llama'"):
        GGUF().open(path, mine)


def spec_of(variant: str, tmp_path: Path, registry: Registry, **metadata: Any) -> Any:
    """What is read of a file of one of `gguf_files.CONFIGS` that says something else, or nothing where it is None."""
    model = reference.tiny_model(*gguf_files.CONFIGS[variant])
    arch = next(iter(gguf_files.metadata_of(model.config))).partition(".")[0]
    changes = {f"{arch}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return GGUF().open(gguf_files.write_model(tmp_path / "m.gguf", model, metadata=changes), registry).spec


def test_defaults_of_gemma2(tmp_path: Path, registry: Registry) -> None:
    """Guards what llama.cpp takes where a file says nothing."""
    without = dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "attention__sliding_window"])
    spec = spec_of("gemma2", tmp_path, registry, **without)
    assert (spec.attn_softcap, spec.head_softcap, spec.window) == (50.0, 30.0, 4096)
    assert spec.full_attention_layers == (1,)


@pytest.mark.parametrize(("n_layers", "scale"), [(2, None), (46, 16**-0.5)])
def test_scale_of_gemma2(n_layers: int, scale: float | None, tmp_path: Path, registry: Registry) -> None:
    """Guards Gemma 2 27B, which llama.cpp knows by its 46 layers and scales by the model's width and not the head's."""
    config = gguf_files.GEMMA2 | {"num_hidden_layers": n_layers}
    path = gguf_files.write_model(tmp_path / "m.gguf", reference.tiny_model("gemma2", config))
    assert GGUF().open(path, registry).spec.attn_scale == scale


@pytest.mark.parametrize(
    ("variant", "block", "qkv_bias", "qk_norm"),
    [
        ("stablelm", "sequential", False, "none"),
        ("stablelm-1_6b", "sequential", True, "none"),
        ("stablelm-12b", "parallel_shared_norm", False, "heads"),
    ],
)
def test_what_tensors_say_of_stablelm(
    variant: str, block: str, qkv_bias: bool, qk_norm: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards blocks that llama.cpp knows by their tensors: its converter writes a wrong key for StableLM 3B."""
    spec = spec_of(variant, tmp_path, registry, use_parallel_residual=block == "sequential")
    assert (spec.block, spec.qkv_bias, spec.qk_norm) == (block, qkv_bias, qk_norm)


@pytest.mark.parametrize(
    ("variant", "metadata", "says"),
    [
        ("qwen2", {"attention__sliding_window": 8}, "sliding_window"),
        ("qwen2", {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "yarn"),
        ("qwen2", {"attention__key_length": 32}, "key_length is 32"),
        ("qwen3", {"rope__dimension_count": 16}, "dimension_count is 16"),
        ("phi3", {"rope__scaling__attn_factor": 1.2}, "attn_factor"),
        ("gemma2", {"attention__sliding_window_pattern": 6}, "sliding_window_pattern"),
        ("gpt_bigcode", {"attention__head_count_kv": 2}, "num_key_value_heads = 2"),
        ("olmo", {"attention__layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ("olmo2", {"attention__sliding_window": 8}, "sliding_window"),
    ],
)
def test_settings_of_other_families_that_are_not_understood(
    variant: str, metadata: dict[str, Any], says: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against a model that loads and computes something else."""
    with pytest.raises(InputError, match=rf"m\.gguf.*{says}"):
        spec_of(variant, tmp_path, registry, **metadata)


# --- scaled rotary positions -----------------------------------------------------------------------------------


def llama3_factors(factor: float, d_head: int, theta: float) -> np.ndarray:
    """As llama.cpp's converter computes them (conversion/llama.py)."""
    factors = []
    for frequency in 1.0 / (theta ** (np.arange(0, d_head, 2, dtype=np.float32) / d_head)):
        wavelength = 2 * math.pi / frequency
        if wavelength < LLAMA3_LENGTH / 4:
            factors.append(1.0)
        elif wavelength > LLAMA3_LENGTH:
            factors.append(factor)
        else:
            smooth = (LLAMA3_LENGTH / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def scaling_of(path: Path, registry: Registry) -> Any:
    rope = GGUF().open(path, registry).spec.rope
    assert rope is not None
    return rope.scaling


@pytest.mark.parametrize(
    ("factor", "theta"),
    [(8.0, 5e5), (32.0, 5e5), (7.5, 5e5), (8.0, 3200.0), (32.0, 3200.0)],  # 3200: no pair is slow enough for the factor
)
def test_rope_factors(factor: float, theta: float, write: Callable[..., Path], registry: Registry) -> None:
    factors = llama3_factors(factor, 16, theta)
    assert (factors.max() < factor) == (theta == 3200.0)
    path = write(metadata={"llama.rope.freq_base": theta}, tensors={"rope_freqs.weight": factors})
    scaling = scaling_of(path, registry)
    assert (scaling.kind, scaling.factor, scaling.original_max_seq_len) == ("llama3", factor, LLAMA3_LENGTH)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)


def test_rope_factors_of_one(write: Callable[..., Path], registry: Registry) -> None:
    assert scaling_of(write(tensors={"rope_freqs.weight": np.ones(8)}), registry) is None


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f * 1.001, lambda f: f[::-1].copy(), lambda f: f * 0])
def test_rope_factors_that_are_not_understood(
    change: Callable[[np.ndarray], np.ndarray], write: Callable[..., Path], registry: Registry
) -> None:
    """Guards against a scaling that is left out: the model would be wrong at every position."""
    factors = change(llama3_factors(8.0, 16, 5e5))
    path = write(metadata={"llama.rope.freq_base": 5e5}, tensors={"rope_freqs.weight": factors})
    with pytest.raises(FileFormatError, match=r"m\.gguf"):
        GGUF().open(path, registry)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(key: str, write: Callable[..., Path], registry: Registry) -> None:
    scaling = scaling_of(write(metadata={f"llama.{key}": 4.0}), registry)
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def test_scaled_twice(write: Callable[..., Path], registry: Registry) -> None:
    path = write(metadata={"llama.rope.scaling.factor": 4.0}, tensors={"rope_freqs.weight": np.full(8, 2.0)})
    with pytest.raises(InputError, match="scaled twice"):
        GGUF().open(path, registry)


def test_rope_factors_of_a_family_that_has_none(tmp_path: Path, registry: Registry) -> None:
    model = reference.tiny_model(*gguf_files.CONFIGS["gpt2"])
    path = gguf_files.write_model(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": np.full(8, 2.0)})
    with pytest.raises(InputError, match=r"m\.gguf: .*rope_freqs"):
        GGUF().open(path, registry)
