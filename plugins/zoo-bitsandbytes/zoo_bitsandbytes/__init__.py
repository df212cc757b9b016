"""bitsandbytes for zoo: what this plugin registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.hooks import hookimpl

if TYPE_CHECKING:
    from zoo.registrar import Registrar

ZOO_API = 1

REQUIREMENT = "bitsandbytes>=0.46"
INSTALL = f'python -m pip install "{REQUIREMENT}"'

_HELP = {
    "nf4": ("NF4", "4-bit NormalFloat in blocks of 64, as QLoRA has it; the head stays as it is"),
    "fp4": ("FP4", "4-bit floating point in blocks of 64; the head stays as it is"),
    "llm-int8": ("LLMInt8", "LLM.int8(): 8-bit products, outliers apart; the head stays as it is"),
}


@hookimpl
def zoo_register_quantizers(register: Registrar) -> None:
    """The quantizers. zoo has an int8 of its own, so that LLM.int8() has another name."""
    for name, (target, about) in _HELP.items():
        register(name, f"zoo_bitsandbytes.quantizers:{target}", requires=[REQUIREMENT], fix=INSTALL, help=about)
