"""Somebody else's converter."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_converters(register: Registrar) -> None:
    register("outsider", "outsider_converter.converter:Outsider", help="an outsider")
