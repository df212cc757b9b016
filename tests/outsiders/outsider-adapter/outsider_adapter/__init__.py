"""Somebody else's adapter."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_adapters(register: Registrar) -> None:
    register(
        "outsider", "outsider_adapter.adapter:Outsider", options="outsider_adapter.options:Options", help="an outsider"
    )
