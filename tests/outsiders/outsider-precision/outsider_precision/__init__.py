"""Somebody else's precision."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_precisions(register: Registrar) -> None:
    register("outsider", "outsider_precision.precision:OUTSIDER", help="an outsider")
