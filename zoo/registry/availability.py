"""Whether a component can be used here: judged by installed metadata, or by importing it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zoo.errors import UnavailableError
from zoo.registry.records import BUILT_IN, Component, DeviceNeeds

_MISSING = object()


@dataclass(frozen=True)
class Status:
    """Whether a component can be used here: its state, why not, and the command that fixes it."""

    state: Literal["ok", "unavailable", "unprobed", "broken"]
    reasons: tuple[str, ...] = ()
    fix: str | None = None


def component_status(component: Component) -> Status:
    """Judge a component by installed metadata alone; nothing of it is imported."""
    reasons = [*_unmet_requirements(component.requires), *_unmet_needs(component.needs)]
    if reasons:
        return Status("unavailable", tuple(reasons), component.fix)
    module = component.target.partition(":")[0]
    if not _top_level_exists(module):
        return Status("broken", (f"its target {component.target!r} does not exist",))
    trusted = component.origin.distribution == BUILT_IN and not component.requires
    return Status("ok" if trusted else "unprobed")


def probe(component: Component) -> Status:
    """Judge a component by importing it."""
    status = component_status(component)
    if status.state in ("unavailable", "broken"):
        return status
    try:
        import_target(component)
    except UnavailableError as error:
        says_so = isinstance(error.__cause__, UnavailableError)
        return Status("unavailable" if says_so else "broken", (error.message,), error.fix)
    return Status("ok")


def import_target(component: Component) -> Any:
    """The object behind a component.

    Raises:
        UnavailableError: the import fails, or the module has no such object. A module that raises one itself, because
            this machine lacks something, is told apart: its reason and its ``fix`` are kept.
    """
    module, _, name = component.target.partition(":")
    whose = f"{component.kind} {component.name!r} ({component.origin})"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            imported = importlib.import_module(module)
            found = getattr(imported, name, _MISSING)
    except KeyboardInterrupt:
        raise
    except UnavailableError as error:  # its own words: it knows the reason and the remedy
        reason = error.message.rstrip(".")
        raise UnavailableError(f"{whose} can not be used: {reason}.", fix=error.fix or component.fix) from error
    except BaseException as error:
        # Whatever foreign code raises, sys.exit() included, is this component's fault alone.
        raise UnavailableError(f"{whose} can not be imported: {describe(error)}.", fix=component.fix) from error
    if found is _MISSING:
        raise UnavailableError(f"{whose} points to {component.target!r}, which does not exist.")
    return found


def describe(error: BaseException) -> str:
    """An error of foreign code in one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - even this may be broken
        message = "(its message can not be read)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _unmet_requirements(requirements: Iterable[str]) -> Iterator[str]:
    if not requirements:
        return
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        installed = _installed_version(requirement.name)
        if installed is None:
            yield f"needs {text} (not installed)"
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield f"needs {text} (installed: {installed})"


def _installed_version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution) or None  # a damaged installation has none
    except (PackageNotFoundError, KeyError):
        return None


_CUDA_DRIVERS = ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvhost-gpu", "/dev/kfd")
"""What a GPU that torch calls cuda leaves on Linux: NVIDIA's driver, WSL, Jetson, ROCm."""


def _unmet_needs(needs: DeviceNeeds | None) -> Iterator[str]:
    if needs is None:
        return
    import platform

    present = {
        "cuda": platform.system() == "Windows" or any(Path(driver).exists() for driver in _CUDA_DRIVERS),
        "mps": platform.system() == "Darwin" and platform.machine() == "arm64",
    }
    if not present[needs.accelerator]:
        yield f"needs {needs} (no such device on this machine)"


def _top_level_exists(module: str) -> bool:
    from importlib.util import find_spec

    top = module.partition(".")[0]
    try:
        return top in sys.modules or find_spec(top) is not None
    except (ImportError, ValueError):
        return False
