"""The contract of a precision, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from zoo.errors import InputError, UnavailableError, UnknownNameError
from zoo.registry import Registry

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Converted(Protocol):
    """What a precision made of a model's layers. Its state is part of a checkpoint: a run goes on to the bit."""

    def describe(self) -> str:
        """In one line, which layers compute otherwise now, and why the others do not."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever depends on the steps that were taken, such as the factors of FP8."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take it back."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A dtype policy by name, as Lightning Fabric spells it."""

    name: str
    param_dtype: torch.dtype
    """Dtype of the weights, and of the arithmetic where nothing else is said."""
    autocast_dtype: torch.dtype | None = None
    """Dtype of matrix products, from weights in ``param_dtype``: for training."""
    inference: str | None = None
    """Of one that is for training: the precision to take otherwise."""
    recomputes: bool = True
    """Whether activation checkpointing may compute its layers a second time."""
    options: Any = None
    """Of one that has options: an instance of their frozen dataclass, with the defaults until somebody sets them."""

    def supports(self, device: str) -> list[str]:
        """Why it can not run on a device type, one sentence each; empty: it can."""
        if device == "mps" and self.param_dtype == torch.bfloat16 and not torch.backends.mps.is_macos_or_newer(14, 0):
            return ["bfloat16 on mps needs macOS 14"]
        return []

    def convert(self, model: nn.Module) -> Converted | None:
        """Have layers of a model compute otherwise in training, before adapters are on it; ``None``: nothing is to do.

        Every parameter stays the object that it was, under its name: optimizers and ties know parameters as objects.

        Raises:
            InputError: no layer of the model can.
        """
        return None

    def context(self) -> AbstractContextManager[None]:
        """Entered around the forward pass of every step."""
        return nullcontext()


def load_precision(name: str, options: Mapping[str, Any], registry: Registry) -> Precision:
    """The precision of that name with those options; lists are taken for tuples.

    Raises:
        UnknownNameError: no precision, or no option of it, has that name.
        InputError: an option has a value that it can not have, or the precision has no options.
        UnavailableError: it can not be used on this machine.
    """
    precision: Precision = registry.load("precision", name)
    if not options:
        return precision
    if precision.options is None:
        raise InputError(f"precision {name!r} has no option {next(iter(options))!r}: it has none.")
    known = [field.name for field in fields(precision.options)]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of precision {name!r}", option, known)
    values = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    return replace(precision, options=replace(precision.options, **values))


def choose_precision(
    name: str,
    *,
    stored: torch.dtype,
    quantized: bool,
    device: str,
    registry: Registry,
    training: bool = False,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Precision:
    """The precision of that name; for ``auto`` the stored dtype, where the device computes in it at speed.

    Quantized files count as bfloat16. A CPU without bfloat16 instructions gets float32.

    Raises:
        UnknownNameError: no precision, or no option of it, has this name.
        InputError: an option has a value that it can not have.
        UnavailableError: the named one can not run on the device.
    """
    if name == "auto":
        wanted = torch.bfloat16 if quantized else stored
        if wanted == torch.bfloat16 and device == "cpu" and not cpu_has_bfloat16():
            wanted = torch.float32
        name = plain_precision(wanted)
    precision = load_precision(name, options, registry)
    if not training and (precision.inference or precision.autocast_dtype):
        plain = dict.fromkeys((precision.inference or plain_precision(precision.param_dtype), "32-true"))
        raise UnavailableError(f"precision {name!r} is for training.", fix=f"Take {', or '.join(plain)}.")
    if training and precision.param_dtype == torch.float16:
        raise UnavailableError(
            f"precision {name!r} is for inference: float16 weights lose small updates.", fix="Take 16-mixed."
        )
    if reasons := precision.supports(device):
        raise UnavailableError(f"precision {name!r} can not be used: {'; '.join(reasons)}.", fix="Take 32-true.")
    return precision


def plain_precision(dtype: torch.dtype) -> str:
    """The name of the precision with weights and arithmetic in one dtype; float32 unless that is a half."""
    return {torch.bfloat16: "bf16-true", torch.float16: "16-true"}.get(dtype, "32-true")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX or Arm)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return capability not in ("DEFAULT", "NO AVX")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
