"""FlashAttention for zoo: what this plugin registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.hooks import hookimpl
from zoo.registry import DeviceNeeds

if TYPE_CHECKING:
    from zoo.registrar import Registrar

ZOO_API = 1

REQUIREMENT = "flash-attn>=2.8,<3"
INSTALL = f'python -m pip install --no-build-isolation "{REQUIREMENT}"'
"""Without isolation: its setup asks the torch that is installed for which CUDA and ABI it should be."""


@hookimpl
def zoo_register_attention(register: Registrar) -> None:
    """The backend. Without a GPU it is listed, with the reasons why it can not be used."""
    register(
        "flash",
        "zoo_flash_attn.backend:Flash",
        requires=[REQUIREMENT],
        needs=DeviceNeeds(accelerator="cuda", min_capability=(8, 0)),
        fix=f"With such a GPU: {INSTALL}. Without one, take --attention auto.",
        help="FlashAttention 2 and 3, in half precision on NVIDIA GPUs since Ampere",
    )
