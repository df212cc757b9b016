"""Somebody else's quantizer."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_quantizers(register: Registrar) -> None:
    register("outsider", "outsider_quantizer.quantizer:Outsider", help="an outsider")
