"""VeRA for zoo. This function names things; nothing that it names is imported before it is used."""

from __future__ import annotations

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_adapters(register: Registrar) -> None:
    """The adapter, and its options in a module of their own, which imports no torch."""
    register(
        "vera",
        "zoo_example_adapter.vera:VeRA",
        options="zoo_example_adapter.options:VeRAOptions",
        help="VeRA: learned factors on random matrices that all layers share",
    )
