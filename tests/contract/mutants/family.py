"""Llama with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.families.base import Config, KeyMap
from zoo.families.llama import LLAMA, config_from_spec, spec_from_config
from zoo.families.own import SameNames
from zoo.spec import ModelSpec

TABLE = """
    model.embed_tokens.weight                          embed.weight
    model.layers.{i}.input_layernorm.weight            blocks.{i}.attn_norm.weight
    model.layers.{i}.self_attn.q_proj.weight           blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.k_proj.weight           blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.v_proj.weight           blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.o_proj.weight           blocks.{i}.attn.out.weight
    model.layers.{i}.post_attention_layernorm.weight   blocks.{i}.mlp_norm.weight
    model.layers.{i}.mlp.gate_proj.weight              blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.up_proj.weight                blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.down_proj.weight              blocks.{i}.mlp.down.weight
    model.norm.weight                                  norm.weight
    lm_head.weight                                     head.weight
"""


def _with_lines(old: str, new: str) -> KeyMap:
    assert TABLE.count(old) == 1, old
    return KeyMap(TABLE.replace(old, new))


def _swapped() -> KeyMap:
    return KeyMap(TABLE.replace("attn.q.weight", "attn.x").replace("attn.k.weight", "attn.q.weight").replace(
        "attn.x", "attn.k.weight"))  # fmt: skip


KEYS_SWAPPED = replace(LLAMA, keys=_swapped())
TRANSPOSED = replace(LLAMA, keys=_with_lines("attn.out.weight", "attn.out.weight  transposed"))
LINE_MISSING = replace(
    LLAMA, keys=_with_lines("    model.norm.weight                                  norm.weight\n", "")
)
EXTRA_IGNORED = replace(LLAMA, keys=KeyMap(TABLE, ignore=[r"."]))


class _Tolerant(KeyMap):
    def locate(self, spec: ModelSpec, stored_names: Any, where: str) -> Any:
        rules = {rule.stored: rule for rule in self.rules(spec)}
        return {name: rules[name] for name in stored_names if name in rules}


MISSING_IGNORED = replace(LLAMA, keys=_Tolerant(TABLE))


def _careless(config: Config) -> ModelSpec:
    return spec_from_config({k: v for k, v in config.items() if k != "spare_key_of_the_contract"})


def _forgetful(spec: ModelSpec) -> dict[str, Any]:
    return {k: v for k, v in config_from_spec(spec).items() if k != "rms_norm_eps"}


KEY_DROPPED = replace(LLAMA, read_config=_careless)
FIELD_LOST = replace(LLAMA, write_config=_forgetful)
TYPE_UNMATCHED = replace(LLAMA, model_type="mutant-2")


class Leaky(nn.Module):
    """Every token sees the mean of all."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocab_size, spec.d_model)
        self.head = nn.Linear(spec.d_model, spec.vocab_size)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + x.mean(1, keepdim=True))


class Silent(Leaky):
    """A parameter that nothing depends on."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


LEAKY = replace(LLAMA, build=Leaky, keys=SameNames(Leaky))
SILENT = replace(LLAMA, build=Silent, keys=SameNames(Silent))
