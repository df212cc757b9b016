"""Installations that do not work: each says what is wrong with it, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo_transformer_engine
from zoo_transformer_engine import INSTALL, install

from zoo.errors import UnavailableError
from zoo.registrar import Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry, component_status


@pytest.fixture(autouse=True)
def _nothing_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        install.load_engine.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def package(monkeypatch: pytest.MonkeyPatch, directory: Path, source: str) -> None:
    """A transformer_engine whose import does this."""
    (directory / "transformer_engine").mkdir()
    (directory / "transformer_engine" / "__init__.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(directory))


def loading() -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        install.load_engine()
    return caught.value


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    error = loading()
    assert (error.message, error.fix) == ("TransformerEngine is not installed", f"{INSTALL}.")


@pytest.mark.parametrize(
    ("source", "message", "fix"),
    [
        ("", "is installed without its part for PyTorch: ModuleNotFoundError: No module", INSTALL),
        (
            "raise RuntimeError('Found empty `transformer-engine` meta package installed.')",
            "is an empty package without its libraries",
            INSTALL,
        ),
        ("import zoo_no_such_package", "needs zoo_no_such_package, which is not installed", "pip install zoo_no_such"),
        (
            "raise ImportError('transformer_engine_torch.so: undefined symbol: _ZN3c105ErrorC2E')",
            "is not built for torch",
            "--force-reinstall",
        ),
        (
            "raise OSError('libcuda.so.1: cannot open shared object file: No such file or directory')",
            "needs NVIDIA's driver: OSError: libcuda.so.1",
            "nvidia-smi",
        ),
        ("raise RuntimeError('cudnn shared object not found.')", "does not find a library of CUDA", "LD_LIBRARY_PATH"),
        (
            "raise OSError('libcublas.so.12: cannot open shared object file')",
            "does not find a library of CUDA",
            "LD_LIBRARY_PATH",
        ),
        ("raise SystemExit(1)", "fails when it is imported: SystemExit: 1", "--force-reinstall"),
    ],
)
def test_a_broken_installation(
    source: str, message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against one remedy for all: a compiler for hours, where a package or a path is missing."""
    package(monkeypatch, tmp_path, source)
    error = loading()
    assert message in error.message and error.fix is not None and fix in error.fix


def test_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards version 1, whose recipes lack what is asked for."""
    package(monkeypatch, tmp_path, "")
    root = tmp_path / "transformer_engine"
    for folder in ("pytorch", "common"):
        (root / folder).mkdir()
    (root / "pytorch" / "__init__.py").write_text("Linear = LayerNorm = None", encoding="utf-8")
    (root / "common" / "__init__.py").write_text("", encoding="utf-8")
    (root / "common" / "recipe.py").write_text("DelayedScaling = None", encoding="utf-8")
    error = loading()
    assert "is too old: AttributeError" in error.message and error.fix is not None
    assert 'install -U "transformer-engine>=2.0"' in error.fix


class Machine:
    """A GPU as torch and TransformerEngine describe it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.no_gpu, self.no_fp8, self.no_kernel = (9, 0), "", "", ""
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", self._init)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T9")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: self.capability)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
        pytorch = SimpleNamespace(
            Linear=lambda *shape, **options: self._layer,
            autocast=lambda **options: nullcontext(),
            is_fp8_available=lambda return_reason: (not self.no_fp8, self.no_fp8),
        )
        recipe = SimpleNamespace(Format=SimpleNamespace(HYBRID=1), DelayedScaling=lambda **options: None)
        monkeypatch.setattr(install, "load_engine", lambda: install.Engine(pytorch, recipe))

    def _init(self) -> None:
        if self.no_gpu:
            raise RuntimeError(self.no_gpu)

    def _layer(self, x: Any) -> None:
        if self.no_kernel:
            raise RuntimeError(self.no_kernel)

    def checked(self) -> UnavailableError:
        with pytest.raises(UnavailableError) as caught:
            install.check()
        return caught.value


def test_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards reasons against each other: no CUDA, no GPU, an old GPU, old CUDA, kernels for others; and what works."""
    machine = Machine(monkeypatch)
    install.check()
    machine.no_kernel = "no kernel image is available"
    assert "does not run on NVIDIA T9: RuntimeError: no kernel image" in machine.checked().message
    machine.no_fp8 = "CublasLt version 12.1.3.x or higher required for FP8 execution on Ada."
    assert machine.checked().message.endswith("has no FP8 here: CublasLt version 12.1.3.x or higher required for FP8 "
                                              "execution on Ada")  # fmt: skip
    machine.capability = (8, 6)
    error = machine.checked()
    assert error.message == "NVIDIA T9 has compute capability 8.6, and FP8 needs 8.9 (Ada, Hopper) or newer"
    assert error.fix is not None and "fp8-emulated" in error.fix
    machine.no_gpu = "Found no NVIDIA driver on your system."
    assert machine.checked().message.startswith("torch can not use a CUDA GPU here: RuntimeError: Found no NVIDIA")
    monkeypatch.setattr(torch.version, "cuda", None)
    error = machine.checked()
    assert "is built without CUDA" in error.message and error.fix is not None and "fp8-emulated" in error.fix


def test_metadata_says_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards listing: nothing is imported, and each precision says what it needs."""
    monkeypatch.setattr("zoo.registry.availability._CUDA_DRIVERS", ())
    monkeypatch.setattr("zoo.registry.availability._installed_version", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    items: list[Component | ModelEntry] = []
    registrar = Registrar("precision", Origin(distribution="zoo-transformer-engine"), items)
    zoo_transformer_engine.zoo_register_precisions(registrar)
    registry = Registry()
    registry.add(*items)
    for name in ("transformer-engine", "transformer-engine-float16"):
        status = component_status(registry.find("precision", name))
        assert status.state == "unavailable" and status.fix is not None and INSTALL in status.fix
        assert status.reasons == (
            "needs transformer-engine>=2.0 (not installed)",
            "needs cuda with compute capability 8.9 or newer (no such device on this machine)",
        )
        with pytest.raises(UnavailableError) as caught:
            registry.load("precision", name)
        assert caught.value.exit_code == 3
    assert component_status(registry.find("precision", "fp8-emulated")).state == "unprobed"
