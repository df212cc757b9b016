"""Every built-in model entry against `transformers` on the meta device, and against what its publishers say of it."""

from __future__ import annotations

import os
import re
from math import log
from operator import attrgetter
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the hub

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from zoo.families.base import Family
from zoo.plan.parameters import count_parameters
from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import BUILT_IN, ModelEntry, Registry
from zoo.spec import RopeScaling

REGISTRY: Registry = load_zoo(PluginSelection(frozenset())).registry
ENTRIES: dict[str, ModelEntry] = {
    name: entry for name, entry in REGISTRY.models() if entry.origin.distribution == BUILT_IN
}

every_entry = pytest.mark.parametrize("name", ENTRIES)


def family_of(name: str) -> Family:
    family = REGISTRY.load("family", ENTRIES[name].family)
    assert isinstance(family, Family)
    return family


def reference_tensors(config: Any) -> dict[str, torch.Tensor]:
    """The tensors that `transformers` would write to a file, by their names there; a tied one once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    first_name: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for tensor_name, tensor in tensors.items():
        first_name.setdefault(id(tensor), tensor_name)
    untied = {tensor_name: tensors[tensor_name] for tensor_name in first_name.values()}
    # Names in memory may be newer than those in files: transformers 5 calls GPT-NeoX's embed_out lm_head.
    return dict(revert_weight_conversion(model, untied))


@every_entry
def test_the_exported_config_gives_the_same_tensors_in_transformers(name: str) -> None:
    family, spec = family_of(name), ENTRIES[name].spec
    config = family.write_config(spec)
    assert config["architectures"] == [family.architecture]

    reference = reference_tensors(AutoConfig.for_model(**config))

    ours = {rule.stored: rule.stored_shape for rule in family.keys.rules(spec)}
    assert {tensor_name: tuple(tensor.shape) for tensor_name, tensor in reference.items()} == ours
    assert sum(tensor.numel() for tensor in reference.values()) == count_parameters(spec)


@every_entry
def test_the_exported_config_reads_back_as_the_same_spec(name: str) -> None:
    family, spec = family_of(name), ENTRIES[name].spec
    config = family.write_config(spec)

    assert family.read_config(config) == spec
    resaved = AutoConfig.for_model(**config).to_dict()  # in transformers' own spelling, its defaults filled in
    assert family.read_config(resaved) == spec


@every_entry
def test_an_entry_says_where_the_weights_are_and_under_which_licence(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.license
    assert entry.sources
    for source in entry.sources:
        assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+|pypi:[\w.-]+==[\w.]+/[\w./-]+#sha256=[0-9a-f]{64}", source), source


def test_no_two_entries_share_a_source() -> None:
    sources = [source for entry in ENTRIES.values() for source in entry.sources]
    assert len(set(sources)) == len(sources)


def test_names_are_listed_once_and_sorted() -> None:
    names = [name for name, entry in REGISTRY.models() if entry.origin.distribution == BUILT_IN]
    assert names == sorted(set(names))
    assert not [name for name in names if name.startswith("_")]


def test_the_models_that_users_ask_for_are_there() -> None:
    assert len(ENTRIES) >= 90
    assert {"gpt2", "pythia-70m", "stablelm-base-alpha-3b", "llama-3.2-1b", "smollm2-135m-instruct"} <= set(ENTRIES)


PUBLISHED_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    # The README's 3,638,525,952 and 7,869,358,080 count what 4 and 2 tensor-parallel ranks replicate once per rank.
    "stablelm-base-alpha-3b": 3_638_525_952 - 3 * (16 * 6 * 4096 + 2 * 4096),
    "stablelm-base-alpha-7b": 7_869_358_080 - 1 * (16 * 6 * 6144 + 2 * 6144),
    "redpajama-incite-base-3b-v1": 2_775_864_320,
    "redpajama-incite-7b-base": 6_857_302_016,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "open-llama-3b": 3_426_473_600,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "starcoderbase-1b": 1_137_207_296,
    "starcoder": 15_517_456_384,
    "santacoder": 1_124_886_528,
    "stablelm-3b-4e1t": 2_795_443_200,
    "stablelm-2-1_6b": 1_644_515_328,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "phi-1_5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-3-medium-4k-instruct": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760,
    "smollm3-3b": 3_075_098_624,
}
"""Parameters as model cards and safetensors headers state them, tied ones once: one model of each shape."""


@pytest.mark.parametrize(("name", "count"), PUBLISHED_COUNTS.items())
def test_the_count_is_the_published_one(name: str, count: int) -> None:
    assert count_parameters(ENTRIES[name].spec) == count


SIBLINGS_DIFFER: list[tuple[str, str, object]] = [
    ("gpt-neox-20b", "activation", "gelu_tanh"),
    ("pythia-12b", "activation", "gelu"),
    ("pythia-12b", "block", "parallel"),
    ("redpajama-incite-chat-3b-v1", "block", "sequential"),
    ("redpajama-incite-7b-chat", "block", "sequential"),
    ("stablelm-tuned-alpha-7b", "max_seq_len", 4096),
    ("dolly-v2-12b", "vocab_size", 50280),
    ("llama-30b", "norm_eps", 1e-6),
    ("llama-65b", "norm_eps", 1e-5),
    ("open-llama-3b", "norm_eps", 1e-6),
    ("llama-2-7b-chat", "norm_eps", 1e-5),
    ("codellama-13b-instruct", "rope.base", 1e6),
    ("codellama-13b-instruct", "vocab_size", 32016),
    ("codellama-13b-python", "vocab_size", 32000),
    ("codellama-34b-instruct", "vocab_size", 32000),
    ("codellama-34b-instruct", "rope.base", 1e6),
    ("vicuna-13b-v1.5", "rope.scaling", None),
    ("vicuna-13b-v1.5-16k", "rope.scaling", RopeScaling(kind="linear", factor=4.0)),
    ("llama-3-8b", "rope.scaling", None),
    ("llama-3-8b", "max_seq_len", 8192),
    ("llama-3.1-405b", "rope.scaling", RopeScaling(kind="llama3", factor=8.0)),
    ("llama-3.1-8b", "tie_embeddings", False),
    ("llama-3.2-3b", "rope.scaling", RopeScaling(kind="llama3", factor=32.0)),
    ("llama-3.2-3b", "tie_embeddings", True),
    ("llama-3.3-70b-instruct", "rope.base", 5e5),
    ("smollm-135m", "rope.base", 1e4),
    ("smollm2-135m", "rope.base", 1e5),
    ("smollm2-1.7b", "rope.base", 1.3e5),
    ("smollm2-135m-instruct", "init_std", 1 / 24),
    ("smollm2-1.7b-instruct", "init_std", 0.02),
    ("mistral-7b-instruct-v0.1", "window", 4096),
    ("zephyr-7b-beta", "window", 4096),
    ("zephyr-7b-beta", "rope.base", 1e4),
    ("mistral-7b-instruct-v0.2", "window", None),
    ("mistral-7b-instruct-v0.2", "rope.base", 1e6),
    ("mistral-7b-instruct-v0.3", "window", None),
    ("mathstral-7b-v0.1", "window", 4096),
    ("gemma-2-9b-it", "attn_scale", None),
    ("gemma-2-27b-it", "attn_scale", 1 / 12),
    ("gemma-2-27b-it", "embed_scale", 4608**0.5),
    ("olmo-1b", "tie_embeddings", True),
    ("olmo-7b-instruct", "tie_embeddings", False),
    ("olmo-2-1b-instruct", "tie_embeddings", False),
    ("falcon-7b-instruct", "block", "parallel_shared_norm"),
    ("falcon-180b-chat", "block", "parallel"),
    ("stablelm-zephyr-3b", "qkv_bias", False),
    ("stable-code-instruct-3b", "rope.base", 1e6),
    ("stablelm-2-zephyr-1_6b", "qkv_bias", True),
    ("stablelm-2-12b-chat", "qkv_bias", False),
    ("stablelm-2-12b-chat", "init_std", 0.01),
    ("qwen1.5-4b-chat", "rope.base", 5e6),
    ("qwen1.5-7b-chat", "rope.base", 1e6),
    ("qwen2-72b", "norm_eps", 1e-5),
    ("qwen2-72b-instruct", "norm_eps", 1e-6),
    ("qwen2.5-14b", "norm_eps", 1e-5),
    ("qwen2.5-14b-instruct", "norm_eps", 1e-6),
    ("qwen2.5-7b", "max_seq_len", 131072),
    ("qwen2.5-7b-instruct", "max_seq_len", 32768),
    ("qwen2.5-coder-32b", "norm_eps", 1e-5),
    ("qwen2.5-coder-32b-instruct", "norm_eps", 1e-6),
    ("qwen2.5-coder-7b", "max_seq_len", 32768),
    ("qwen2.5-math-7b-instruct", "rope.base", 1e4),
    ("qwq-32b", "norm_eps", 1e-5),
    ("deepseek-r1-distill-qwen-1.5b", "tie_embeddings", False),
    ("deepseek-r1-distill-qwen-7b", "rope.base", 1e4),
    ("deepseek-r1-distill-qwen-32b", "rope.base", 1e6),
    ("qwen3-8b", "max_seq_len", 40960),
    ("qwen3-8b-base", "max_seq_len", 32768),
    ("qwen3-4b-instruct-2507", "rope.base", 5e6),
    ("phi-1_5", "resid_dropout", 0.0),
    ("phi-2", "resid_dropout", 0.1),
    ("phi-2", "rope.n_dims", 32),
    ("phi-3-medium-4k-instruct", "window", 2047),
    ("phi-3.5-mini-instruct", "window", 262144),
    ("phi-3.5-mini-instruct", "rope.scaling.attn_factor", (1 + log(32) / log(4096)) ** 0.5),
    ("phi-4", "window", None),
    ("phi-4-reasoning", "rope.base", 5e5),
    ("phi-4-mini-instruct", "rope.n_dims", 96),
    ("starcoder", "activation", "gelu"),
    ("starcoderbase-7b", "activation", "gelu_tanh"),
]
"""Where one model departs from its siblings in a value that no tensor's shape shows, and inheritance may get wrong."""


@pytest.mark.parametrize(("name", "path", "expected"), SIBLINGS_DIFFER)
def test_what_shapes_do_not_show(name: str, path: str, expected: object) -> None:
    assert attrgetter(path)(ENTRIES[name].spec) == expected


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.family == "gpt_neox"])
def test_a_quarter_of_each_head_turns_in_gpt_neox_but_all_of_it_in_redpajama(name: str) -> None:
    spec = ENTRIES[name].spec
    assert spec.rope is not None
    assert spec.rope.n_dims == (spec.d_head if name.startswith("redpajama") else spec.d_head // 4)
