"""What zoo imports for ``--quantize nf4``: this fails, with reason and remedy, where bitsandbytes can not run."""

from __future__ import annotations

from typing import ClassVar

from zoo.precision.quantization import QuantizedLinear
from zoo_bitsandbytes.install import check
from zoo_bitsandbytes.layers import BLOCK, FP4Linear, LLMInt8Linear, NF4Linear

check()

_DEVICES = ("cpu", "cuda", "xpu")


class Bitsandbytes:
    """Linears of the blocks. The head is left alone: its error reaches the logits as it is."""

    name: str
    kind: ClassVar[type[QuantizedLinear]]
    multiple: ClassVar[int]
    """Of the inputs of a linear."""

    def supports(self, device: str) -> list[str]:
        """Where bitsandbytes has kernels."""
        return [] if device in _DEVICES else [f"bitsandbytes runs on {', '.join(_DEVICES)}, not on {device}"]

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """None for the head, and where a block would reach into the next row."""
        return None if role == "head" or d_in % self.multiple else self.kind


class NF4(Bitsandbytes):
    """4-bit NormalFloat (arXiv 2305.14314), without its second quantization of the blocks' factors."""

    name, kind, multiple = "nf4", NF4Linear, BLOCK


class FP4(Bitsandbytes):
    """4-bit floating point."""

    name, kind, multiple = "fp4", FP4Linear, BLOCK


class LLMInt8(Bitsandbytes):
    """LLM.int8() (arXiv 2208.07339)."""

    name, kind, multiple = "llm-int8", LLMInt8Linear, 1
