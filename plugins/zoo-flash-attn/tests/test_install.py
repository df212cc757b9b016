"""Installations that do not work: each says what is wrong with it, and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tier
import torch
import zoo_flash_attn
from zoo_flash_attn import install
from zoo_flash_attn.install import Kernels

from zoo.errors import UnavailableError
from zoo.registrar import Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry, Status, component_status, import_target, probe

REBUILD = 'python -m pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir "flash-attn>=2.8,<3".'
needs_package = pytest.mark.skipif(tier.VERSION is None, reason="flash-attn is not installed: see the README")


@pytest.fixture(autouse=True)
def _nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was imported of FlashAttention is forgotten, and there again after the test."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", raising=False)


def write_module(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, source: str) -> None:
    """A module that is found before any other of its name."""
    (directory / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(directory)


def loading() -> UnavailableError:
    """What is raised for FlashAttention 2 as it is now."""
    with pytest.raises(UnavailableError) as caught:
        install.load_flash_attn.__wrapped__()
    return caught.value


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    error = loading()
    assert error.message == "flash-attn is not installed"
    assert error.fix == 'python -m pip install --no-build-isolation "flash-attn>=2.8,<3".'


@needs_package
def test_without_its_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the real package where its build was skipped, or an update of Python has left the old one behind."""
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    error = loading()
    assert error.message == f"flash-attn {tier.VERSION} is installed without its compiled part, flash_attn_2_cuda"
    assert error.fix == f"Without FLASH_ATTENTION_SKIP_CUDA_BUILD in the environment: {REBUILD}"


@needs_package
@pytest.mark.parametrize(
    "message",
    [
        "/site-packages/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE",
        "libcudart.so.12: cannot open shared object file: No such file or directory",
        "DLL load failed while importing flash_attn_2_cuda: The specified procedure could not be found.",
    ],
)
def test_built_for_another_torch(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the commonest of all: torch was updated, and the extension is still that of the old one."""
    write_module(monkeypatch, tmp_path, "flash_attn_2_cuda", f"raise ImportError({message!r})")
    error = loading()
    built = f"is not built for torch {torch.__version__} with CUDA {torch.version.cuda}: ImportError: {message}"
    assert error.message == f"the compiled part of flash-attn {tier.VERSION} {built}"
    assert error.fix == REBUILD


@needs_package
def test_a_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against telling somebody to compile for hours who lacks a small package."""
    write_module(monkeypatch, tmp_path, "flash_attn_2_cuda", "import zoo_no_such_package")
    error = loading()
    assert error.message == f"flash-attn {tier.VERSION} needs zoo_no_such_package, which is not installed"
    assert error.fix == "python -m pip install zoo_no_such_package."


def test_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards version 1, which lacks what is asked for."""
    write_module(monkeypatch, tmp_path, "flash_attn", "def flash_attn_func(): ...")
    error = loading()
    assert "has no attribute 'flash_attn_varlen_func'" in error.message
    assert error.fix == 'python -m pip install --no-build-isolation "flash-attn>=2.8,<3".'


@pytest.mark.parametrize("source", ["raise RuntimeError('0 active drivers')", "raise SystemExit(1)"])
def test_anything_else(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against foreign code that ends the command."""
    write_module(monkeypatch, tmp_path, "flash_attn", source)
    error = loading()
    assert "fails when it is imported: " in error.message and error.fix == REBUILD


def test_kernels_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against kernels that leave out windows and soft caps without a word."""
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    error = loading()
    assert "leave out windows and soft caps" in error.message and error.fix == "Unset it."


def fine(*tensors: Any) -> None:
    """A kernel that runs."""


def without_image(*tensors: Any) -> None:
    """A kernel that was compiled for other GPUs."""
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), kernel: Any = fine, failure: str = ""
) -> None:
    """This machine has such a GPU, as far as torch says, and FlashAttention is installed."""

    def init() -> None:
        if failure:
            raise RuntimeError(failure)

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
    monkeypatch.setattr(install, "load_flash_attn", lambda: Kernels(kernel, kernel, kernel))


def checking() -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        install.check()
    return caught.value


def test_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against refusing what works."""
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        gpu(monkeypatch, capability)
        install.check()


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    error = checking()
    assert error.message == f"this torch ({torch.__version__}) is built without CUDA"
    assert error.fix is not None and "https://pytorch.org/get-started/locally/" in error.fix


def test_a_torch_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    error = checking()
    assert "built for ROCm" in error.message and error.fix == "Take --attention auto."


def test_no_gpu_or_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, failure="The NVIDIA driver on your system is too old (found version 11040).")
    error = checking()
    assert error.message.startswith("torch can not use a CUDA GPU here: RuntimeError: The NVIDIA driver on your system")
    assert error.fix is not None and "nvidia-smi" in error.fix


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    error = checking()
    assert error.message == "NVIDIA T9 has compute capability 7.5, and FlashAttention 2 needs 8.0 (Ampere) or newer"
    assert error.fix == "Take --attention sdpa."


def test_kernels_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a wheel that loads and has nothing for this GPU: only a call shows it."""
    gpu(monkeypatch, (12, 0), without_image)
    error = checking()
    assert "does not run on NVIDIA T9 (compute capability 12.0): RuntimeError: CUDA error: no kernel" in error.message
    assert error.fix == f"FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=120 {REBUILD}"


def component() -> Component:
    items: list[Component | ModelEntry] = []
    zoo_flash_attn.zoo_register_attention(Registrar("attention", Origin(distribution="zoo-flash-attn"), items))
    (found,) = items
    assert isinstance(found, Component)
    return found


def test_what_the_command_line_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the fix: what the plugin has found out goes before the one that is written down for the component."""
    monkeypatch.delitem(sys.modules, "zoo_flash_attn.backend", raising=False)
    gpu(monkeypatch, (7, 5))
    with pytest.raises(UnavailableError) as caught:
        import_target(component())
    assert str(caught.value).startswith("attention 'flash' (zoo-flash-attn) can not be used: NVIDIA T9 has compute")
    assert caught.value.fix == "Take --attention sdpa." and caught.value.exit_code == 3
    monkeypatch.setattr("zoo.registry.availability.component_status", lambda component: Status("unprobed"))
    status = probe(component())
    assert (status.state, status.fix) == ("unavailable", "Take --attention sdpa.")


def test_metadata_says_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards listing: without flash-attn and a GPU nothing is imported, and there are reasons and a fix."""
    monkeypatch.setattr("zoo.registry.availability._CUDA_DRIVERS", ())
    monkeypatch.setattr("zoo.registry.availability._installed_version", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    status = component_status(component())
    assert status.state == "unavailable" and probe(component()) == status
    assert status.reasons == (
        "needs flash-attn>=2.8,<3 (not installed)",
        "needs cuda with compute capability 8.0 or newer (no such device on this machine)",
    )
    assert status.fix is not None and zoo_flash_attn.INSTALL in status.fix
    registry = Registry()
    registry.add(component())
    with pytest.raises(UnavailableError, match=json.dumps(zoo_flash_attn.REQUIREMENT)[1:-1]) as caught:
        registry.load("attention", "flash")
    assert caught.value.exit_code == 3
