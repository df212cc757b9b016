"""Somebody else's source."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_sources(register: Registrar) -> None:
    register("outsider", "outsider_source.source:fetch", matches=["outsider"], help="an outsider")
