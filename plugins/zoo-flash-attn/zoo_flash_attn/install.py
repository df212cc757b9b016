"""FlashAttention's functions, or why they can not be had on this machine and what to do about it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnavailableError
from zoo.registry import describe
from zoo_flash_attn import INSTALL, REQUIREMENT

MIN_CAPABILITY = (8, 0)
"""Ampere: what FlashAttention 2 checks before every call."""

_REBUILD = f'python -m pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir "{REQUIREMENT}"'
"""Without pip's cache, which may hold the very wheel that does not fit."""

_MAX_HEAD_IN_ORDER = 192
"""Beyond it FlashAttention 3 has no deterministic backward."""


@dataclass(frozen=True)
class Kernels:
    """Three functions of FlashAttention 2 or 3, which name their arguments alike."""

    dense: Callable[..., Any]
    """``flash_attn_func``: rows of one length."""
    varlen: Callable[..., Any]
    """``flash_attn_varlen_func``: sequences of any length, one after the other."""
    cached: Callable[..., Any]
    """``flash_attn_with_kvcache``: keys in tensors with room left; no gradients, no dropout."""


def check() -> None:
    """Load FlashAttention and run it once on the current GPU.

    Raises:
        UnavailableError: that is not possible; one sentence says why, and ``fix`` what to do.
    """
    if torch.version.hip is not None:
        raise UnavailableError(
            "this torch is built for ROCm, where flash-attn takes other kernels, which leave out windows and soft caps",
            fix="Take --attention auto.",
        )
    if torch.version.cuda is None:
        raise UnavailableError(
            f"this torch ({torch.__version__}) is built without CUDA",
            fix="Install one that is: https://pytorch.org/get-started/locally/.",
        )
    _check_gpu(load_flash_attn())


@cache
def load_flash_attn() -> Kernels:
    """FlashAttention 2.

    Raises:
        UnavailableError: it is not installed, or its installation is broken.
    """
    if os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") == "TRUE":
        raise UnavailableError(
            "FLASH_ATTENTION_TRITON_AMD_ENABLE makes flash-attn take kernels that leave out windows and soft caps",
            fix="Unset it.",
        )
    try:
        module = import_module("flash_attn")
        return Kernels(module.flash_attn_func, module.flash_attn_varlen_func, module.flash_attn_with_kvcache)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A compiled module of another torch fails in as many ways as there are linkers.
        raise _diagnosis(error) from error


@cache
def load_flash_attn_3() -> Kernels | None:
    """FlashAttention 3, if it is installed; a warning, if it is and can not be imported."""
    try:
        module = import_module("flash_attn_interface")
        return Kernels(module.flash_attn_func, module.flash_attn_varlen_func, module.flash_attn_with_kvcache)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a compiled module raises
        if not (isinstance(error, ModuleNotFoundError) and error.name == "flash_attn_interface"):
            warnings.warn(
                f"FlashAttention 3 can not be imported, so FlashAttention 2 is used: {describe(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


def kernels_for(q: Tensor, dropout_p: float = 0.0) -> Kernels:
    """FlashAttention 3 on a Hopper GPU, where it is installed and can do it; otherwise FlashAttention 2."""
    d_head = q.shape[-1]
    loses_order = torch.are_deterministic_algorithms_enabled() and d_head > _MAX_HEAD_IN_ORDER
    if is_hopper(q.device) and not dropout_p and d_head % 8 == 0 and not loses_order:
        return load_flash_attn_3() or load_flash_attn()
    return load_flash_attn()


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether FlashAttention 3 is made for this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _diagnosis(error: BaseException) -> UnavailableError:
    whose = f"flash-attn {_installed()}"
    if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
        return UnavailableError("flash-attn is not installed", fix=f"{INSTALL}.")
    if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn_2_cuda":
        return UnavailableError(
            f"{whose} is installed without its compiled part, flash_attn_2_cuda",
            fix=f"Without FLASH_ATTENTION_SKIP_CUDA_BUILD in the environment: {_REBUILD}.",
        )
    if isinstance(error, ModuleNotFoundError):
        return UnavailableError(
            f"{whose} needs {error.name}, which is not installed", fix=f"python -m pip install {error.name}."
        )
    if isinstance(error, AttributeError):
        return UnavailableError(f"{whose} is not what it should be: {describe(error)}", fix=f"{INSTALL}.")
    if isinstance(error, ImportError | OSError):
        built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
        return UnavailableError(
            f"the compiled part of {whose} is not built for {built}: {describe(error)}", fix=f"{_REBUILD}."
        )
    return UnavailableError(f"{whose} fails when it is imported: {describe(error)}", fix=f"{_REBUILD}.")


def _installed() -> str:
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return "(of unknown version)"


def _check_gpu(kernels: Kernels) -> None:
    try:
        torch.cuda.init()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        raise UnavailableError(
            f"torch can not use a CUDA GPU here: {describe(error)}",
            fix="See what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides the GPU.",
        ) from error
    if capability < MIN_CAPABILITY:
        raise UnavailableError(
            f"{name} has compute capability {_dotted(capability)}, and FlashAttention 2 needs "
            f"{_dotted(MIN_CAPABILITY)} (Ampere) or newer",
            fix="Take --attention sdpa.",
        )
    q_BTNH = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device="cuda")
    try:
        kernels.dense(q_BTNH, q_BTNH, q_BTNH)
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise UnavailableError(
            f"flash-attn {_installed()} does not run on {name} (compute capability {_dotted(capability)}): "
            f"{describe(error)}",
            fix=f"FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS={capability[0]}0 {_REBUILD}.",
        ) from error


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
