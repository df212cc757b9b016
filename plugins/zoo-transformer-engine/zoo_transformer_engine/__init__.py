"""FP8 training for zoo: what this plugin registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.hooks import hookimpl
from zoo.registry import DeviceNeeds

if TYPE_CHECKING:
    from zoo.registrar import Registrar

ZOO_API = 1

REQUIREMENT = "transformer-engine>=2.0"
INSTALL = 'python -m pip install --no-build-isolation "transformer-engine[pytorch]>=2.0"'
"""Without isolation: where there is no wheel, its PyTorch part is compiled against the torch that is installed."""

_OPTIONS = "zoo_transformer_engine.options"


@hookimpl
def zoo_register_precisions(register: Registrar) -> None:
    """FP8 on GPUs that have it, and emulated on any device."""
    register(
        "fp8-emulated",
        "zoo_transformer_engine.emulated:FP8_EMULATED",
        options=f"{_OPTIONS}:EmulatedOptions",
        help="TransformerEngine's FP8 recipes in fake-quantized arithmetic, slow, on any device; for training",
    )
    on_gpus = {
        "transformer-engine": ("BFLOAT16", "FP8 products of bfloat16 weights by TransformerEngine; for training"),
        "transformer-engine-float16": ("FLOAT16", "FP8 and float16 products of float32 weights; for training"),
    }
    for name, (target, about) in on_gpus.items():
        register(
            name,
            f"zoo_transformer_engine.precisions:{target}",
            options=f"{_OPTIONS}:EngineOptions",
            requires=[REQUIREMENT],
            needs=DeviceNeeds(accelerator="cuda", min_capability=(8, 9)),
            fix=f"With such a GPU: {INSTALL}. Without one, --precision fp8-emulated shows whether it would train.",
            help=about,
        )
