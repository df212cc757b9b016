"""Somebody else's dataset."""

from zoo.hooks import hookimpl
from zoo.registrar import Registrar

ZOO_API = 1


@hookimpl
def zoo_register_datasets(register: Registrar) -> None:
    register("outsider", "outsider_dataset.dataset:OUTSIDER", help="an outsider")


@hookimpl
def zoo_register_sources(register: Registrar) -> None:
    register("outsider-rows", "outsider_dataset.dataset:fetch", matches=["outsider-rows"], help="where they are")
