"""Somebody else's sampler."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_samplers(register: Registrar) -> None:
    register("outsider", "outsider_sampler.sampler:Outsider", help="an outsider")
