"""Somebody else's logger."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_loggers(register: Registrar) -> None:
    register("outsider", "outsider_logger.logger:Outsider", help="an outsider")
