"""zoo: a model zoo for GPTs that people can extend. ``python -m zoo --help`` shows the commands."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.adapting import adapt, load_adapter
    from zoo.api import build, load, save
    from zoo.language_model import LanguageModel
    from zoo.plugins import load_zoo
    from zoo.spec import ModelSpec
    from zoo.store.store import CheckpointStore

__version__ = "0.1.0"

_LAZY = {
    "CheckpointStore": "zoo.store.store",
    "LanguageModel": "zoo.language_model",
    "adapt": "zoo.adapting",
    "build": "zoo.api",
    "load": "zoo.api",
    "load_adapter": "zoo.adapting",
    "load_zoo": "zoo.plugins",
    "save": "zoo.api",
    "ModelSpec": "zoo.spec",
}

__all__ = [
    "CheckpointStore",
    "LanguageModel",
    "ModelSpec",
    "__version__",
    "adapt",
    "build",
    "load",
    "load_adapter",
    "load_zoo",
    "save",
]


def __getattr__(name: str) -> Any:
    # Importing zoo must stay free of torch: names are imported when they are used.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
