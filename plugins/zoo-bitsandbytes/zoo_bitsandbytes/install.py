"""bitsandbytes, or why it can not be had on this machine and what to do about it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from zoo.errors import UnavailableError
from zoo.registry import describe
from zoo_bitsandbytes import INSTALL, REQUIREMENT


def check() -> None:
    """Load bitsandbytes and quantize a few numbers, on the GPU if there is one.

    Raises:
        UnavailableError: that is not possible; one sentence says why, and ``fix`` what to do.
    """
    bitsandbytes = load_bitsandbytes()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        bitsandbytes.functional.quantize_4bit(torch.zeros(64, device=device), blocksize=64, quant_type="nf4")
    except (RuntimeError, NotImplementedError, OSError) as error:
        built = f"CUDA {torch.version.cuda}" if device == "cuda" else "the CPU"
        raise UnavailableError(
            f"bitsandbytes {_installed()} does not run on {built}: {describe(error)}",
            fix="See what python -m bitsandbytes says: its library has to be that of torch's CUDA.",
        ) from error


@cache
def load_bitsandbytes() -> Any:
    """The package.

    Raises:
        UnavailableError: it is not installed, or its installation is broken.
    """
    try:
        module = import_module("bitsandbytes")
        for name in ("quantize_4bit", "dequantize_4bit", "int8_vectorwise_quant", "QuantState", "get_4bit_type"):
            getattr(module.functional, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A compiled library fails in as many ways as there are linkers.
        raise _diagnosis(error) from error
    return module


def _diagnosis(error: BaseException) -> UnavailableError:
    whose = f"bitsandbytes {_installed()}"
    if isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes":
        return UnavailableError("bitsandbytes is not installed", fix=f"{INSTALL}.")
    if isinstance(error, ModuleNotFoundError):
        fix = f"python -m pip install {error.name}."
        return UnavailableError(f"{whose} needs {error.name}, which is not installed", fix=fix)
    if isinstance(error, AttributeError):
        return UnavailableError(
            f"{whose} is too old: {describe(error)}", fix=f'python -m pip install -U "{REQUIREMENT}".'
        )
    return UnavailableError(
        f"{whose} fails when it is imported: {describe(error)}",
        fix=f'python -m pip install --force-reinstall --no-deps "{REQUIREMENT}".',
    )


def _installed() -> str:
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return "(of unknown version)"
