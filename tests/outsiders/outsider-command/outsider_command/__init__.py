"""Somebody else's command."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_commands(register: Registrar) -> None:
    register("outsider", "outsider_command.command:command", help="an outsider")
