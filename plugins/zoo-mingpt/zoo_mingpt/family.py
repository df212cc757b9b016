"""The family: from its config to a spec and back, and from a spec to the module."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import Config, ConfigReader, Family
from zoo.families.own import SameNames
from zoo.spec import ModelSpec
from zoo_mingpt.model import MinGPT

_DROPOUT = 0.1


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a config with minGPT's keys. Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "mingpt")
    d_model, n_heads, dropout = read.require("n_embd"), read.require("n_head"), read.get("dropout", _DROPOUT)
    spec = ModelSpec(
        n_layers=read.require("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_ffn=4 * d_model,
        vocab_size=read.require("vocab_size"),
        max_seq_len=read.require("block_size"),
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        embed_dropout=dropout,
        attn_dropout=dropout,
        resid_dropout=dropout,
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The config of a spec of this family."""
    return {
        "model_type": "mingpt",
        "architectures": ["MinGPT"],
        "n_layer": spec.n_layers,
        "n_head": spec.n_heads,
        "n_embd": spec.d_model,
        "vocab_size": spec.vocab_size,
        "block_size": spec.max_seq_len,
        "dropout": spec.resid_dropout,
    }


def build(spec: ModelSpec) -> MinGPT:
    """The module of a spec.

    Raises:
        InputError: the spec says what this module can not be.
    """
    if spec != spec_from_config(config_from_spec(spec)):
        raise InputError("a model of the family 'mingpt' has only n_layers, n_heads, d_model, vocab_size, max_seq_len.")
    return MinGPT(
        n_layers=spec.n_layers,
        n_heads=spec.n_heads,
        d_model=spec.d_model,
        vocab_size=spec.vocab_size,
        max_seq_len=spec.max_seq_len,
        dropout=spec.resid_dropout,
    )


MINGPT = Family(
    name="mingpt",
    model_type="mingpt",
    architecture="MinGPT",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=SameNames(build),
    build=build,
)
