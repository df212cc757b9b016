"""The contract of a precision, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zoo.errors import UnavailableError
from zoo.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A dtype policy by name, as Lightning Fabric spells it."""

    name: str
    param_dtype: torch.dtype
    """Dtype of the weights, and of the arithmetic where nothing else is said."""
    autocast_dtype: torch.dtype | None = None
    """Dtype of matrix products, from weights in ``param_dtype``: for training."""

    def supports(self, device: str) -> list[str]:
        """Why it can not run on a device type, one sentence each; empty: it can."""
        if device == "mps" and self.param_dtype == torch.bfloat16 and not torch.backends.mps.is_macos_or_newer(14, 0):
            return ["bfloat16 on mps needs macOS 14"]
        return []


def choose_precision(
    name: str, *, stored: torch.dtype, quantized: bool, device: str, registry: Registry, training: bool = False
) -> Precision:
    """The precision of that name; for ``auto`` the stored dtype, where the device computes in it at speed.

    Quantized files count as bfloat16. A CPU without bfloat16 instructions gets float32.

    Raises:
        UnknownNameError: no precision has this name.
        UnavailableError: the named one can not run on the device.
    """
    if name == "auto":
        wanted = torch.bfloat16 if quantized else stored
        if wanted == torch.bfloat16 and device == "cpu" and not cpu_has_bfloat16():
            wanted = torch.float32
        name = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}.get(wanted, "32-true")
    precision: Precision = registry.load("precision", name)
    if not training and precision.autocast_dtype is not None:
        plain = "bf16-true" if precision.autocast_dtype == torch.bfloat16 else "16-true"
        raise UnavailableError(f"precision {name!r} is for training.", fix=f"Take {plain}, or 32-true.")
    if training and precision.param_dtype == torch.float16:
        raise UnavailableError(
            f"precision {name!r} is for inference: float16 weights lose small updates.", fix="Take 16-mixed."
        )
    if reasons := precision.supports(device):
        raise UnavailableError(f"precision {name!r} can not be used: {'; '.join(reasons)}.", fix="Take 32-true.")
    return precision


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX or Arm)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return capability not in ("DEFAULT", "NO AVX")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
