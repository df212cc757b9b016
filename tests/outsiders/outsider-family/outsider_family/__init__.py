"""Somebody else's family."""

from zoo.hooks import hookimpl
from zoo.registrar import ModelRegistrar, Registrar

ZOO_API = 1


@hookimpl
def zoo_register_families(register: Registrar) -> None:
    register("outsider", "outsider_family.family:OUTSIDER", matches=["outsider"], help="an outsider")


@hookimpl
def zoo_register_models(register: ModelRegistrar) -> None:
    register(
        "outsider-tiny", extends="llama-2-7b", family="outsider", spec={"n_layers": 1, "d_model": 32, "n_heads": 2}
    )
