"""Llama under another name."""

from dataclasses import replace
from typing import Any

from zoo.families.base import Config
from zoo.families.llama import LLAMA
from zoo.spec import ModelSpec


def read_config(config: Config) -> ModelSpec:
    return LLAMA.read_config({**config, "model_type": "llama"})


def write_config(spec: ModelSpec) -> dict[str, Any]:
    return {**LLAMA.write_config(spec), "model_type": "outsider", "architectures": ["Outsider"]}


OUTSIDER = replace(
    LLAMA,
    name="outsider",
    model_type="outsider",
    architecture="Outsider",
    read_config=read_config,
    write_config=write_config,
    gguf=None,
)
