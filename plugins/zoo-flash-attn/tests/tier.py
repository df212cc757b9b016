"""Where these tests run: on a GPU with FlashAttention's kernels, or on the CPU with a stand-in for them.

Either way the Python package is the real one. Importing this prepares it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from zoo_flash_attn.flash import Flash

from zoo.attention.base import AttentionRequest

STAND_IN = Path(__file__).parent / "stand_in"
ON_GPU = torch.cuda.is_available() and find_spec("flash_attn_2_cuda") is not None
DEVICE = "cuda" if ON_GPU else "cpu"


def _installed() -> str | None:
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return None


def _prepare_stand_in() -> None:
    """Put the stand-in in the place of the compiled extension, and open the package's operators for the CPU."""
    sys.path.insert(0, str(STAND_IN))
    interface = import_module("flash_attn.flash_attn_interface")
    for name in ("_flash_attn_forward", "_flash_attn_backward"):
        for operator in (getattr(interface, name), getattr(interface, name.replace("attn_", "attn_varlen_"))):
            operator.register_kernel("cpu")(operator._init_fn)


VERSION = _installed()
if VERSION is None:
    TIER = "flash-attn is not installed"
elif ON_GPU:
    TIER = f"flash-attn {VERSION} and its kernels on {torch.cuda.get_device_name()}"
else:
    TIER = f"flash-attn {VERSION}, the real package, on a CPU stand-in for its kernels"
    _prepare_stand_in()


class Backend(Flash):
    """The backend, which here may also serve the CPU; what it refuses otherwise it refuses."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """As for a GPU."""
        return super().supports(replace(request, device="cuda"))
