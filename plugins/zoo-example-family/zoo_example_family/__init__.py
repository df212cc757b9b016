"""GPT-J for zoo. These functions name things; nothing that they name is imported before it is used."""

from __future__ import annotations

from zoo.hooks import hookimpl
from zoo.registrar import ModelRegistrar, Registrar

ZOO_API = 1


@hookimpl
def zoo_register_families(register: Registrar) -> None:
    """The family, found by the ``model_type`` in config.json."""
    register("gptj", "zoo_example_family.gptj:GPTJ", matches=["gptj"], help="GPT-J and its descendants")


@hookimpl
def zoo_register_models(register: ModelRegistrar) -> None:
    """The models of registry.yaml, which lies in this package."""
    register.file("zoo_example_family")
