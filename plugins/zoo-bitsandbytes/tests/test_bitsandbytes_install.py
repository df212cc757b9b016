"""Installations that do not work: each says what is wrong with it, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zoo_bitsandbytes
from zoo_bitsandbytes import INSTALL, install

from zoo.errors import UnavailableError
from zoo.registrar import Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry, component_status


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    install.load_bitsandbytes.cache_clear()
    yield
    install.load_bitsandbytes.cache_clear()


def package(monkeypatch: pytest.MonkeyPatch, directory: Path, source: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    (directory / "bitsandbytes.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(directory))


def loading() -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        install.load_bitsandbytes()
    return caught.value


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    error = loading()
    assert (error.message, error.fix) == ("bitsandbytes is not installed", f"{INSTALL}.")


@pytest.mark.parametrize(
    ("source", "message", "fix"),
    [
        ("import zoo_no_such_package", "needs zoo_no_such_package, which is not installed", "pip install zoo_no_such"),
        ("functional = object()", "is too old: AttributeError", "install -U"),
        ("raise OSError('libcudart.so.12: cannot open')", "fails when it is imported: OSError", "--force-reinstall"),
        ("raise SystemExit(1)", "fails when it is imported: SystemExit: 1", "--force-reinstall"),
    ],
)
def test_a_broken_installation(
    source: str, message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(monkeypatch, tmp_path, source)
    error = loading()
    assert message in error.message and error.fix is not None and fix in error.fix


def test_a_library_for_another_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards bitsandbytes' way of failing: it can be imported, and each call says what is missing."""

    def quantize_4bit(*values: Any, **options: Any) -> None:
        raise RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda139.so")

    functional = SimpleNamespace(quantize_4bit=quantize_4bit)
    monkeypatch.setattr(install, "load_bitsandbytes", lambda: SimpleNamespace(functional=functional))
    with pytest.raises(UnavailableError) as caught:
        install.check()
    assert "does not run on the CPU: RuntimeError: Configured CUDA binary not found" in caught.value.message
    assert caught.value.fix is not None and "python -m bitsandbytes" in caught.value.fix


def test_metadata_says_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.registry.availability._installed_version", lambda name: None)
    items: list[Component | ModelEntry] = []
    zoo_bitsandbytes.zoo_register_quantizers(Registrar("quantizer", Origin(distribution="zoo-bitsandbytes"), items))
    registry = Registry()
    registry.add(*items)
    for name in ("nf4", "fp4", "llm-int8"):
        status = component_status(registry.find("quantizer", name))
        assert (status.state, status.reasons) == ("unavailable", ("needs bitsandbytes>=0.46 (not installed)",))
        assert status.fix == INSTALL
        with pytest.raises(UnavailableError) as caught:
            registry.load("quantizer", name)
        assert caught.value.exit_code == 3
