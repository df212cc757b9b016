"""minGPT-style models for zoo: what this plugin registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.hooks import hookimpl

if TYPE_CHECKING:
    from zoo.registrar import ModelRegistrar, Registrar

ZOO_API = 1


@hookimpl
def zoo_register_families(register: Registrar) -> None:
    """The family, which builds a module of its own."""
    register("mingpt", "zoo_mingpt.family:MINGPT", matches=["mingpt"], help="a small GPT with a fused qkv projection")


@hookimpl
def zoo_register_models(register: ModelRegistrar) -> None:
    """Sizes without weights, to train."""
    register.file("zoo_mingpt", "registry.yaml")
