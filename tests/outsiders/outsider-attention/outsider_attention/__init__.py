"""Somebody else's attention."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_attention(register: Registrar) -> None:
    register("outsider", "outsider_attention.attention:Outsider", help="an outsider")
