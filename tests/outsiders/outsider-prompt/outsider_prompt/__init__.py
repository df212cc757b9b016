"""Somebody else's prompt."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_prompts(register: Registrar) -> None:
    register("outsider", "outsider_prompt.prompt:OUTSIDER", help="an outsider")
