"""The Python API of adapters: on any module, fresh or from a directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from zoo.adapters.attach import AttachedAdapter, attach
from zoo.adapters.choose import choose_adapter
from zoo.adapters.discover import sites_of
from zoo.convert.adapter_base import check_base
from zoo.convert.adapter_directory import check_adapter, read_adapter, write_adapter
from zoo.convert.adapter_names import OwnNames
from zoo.convert.adapter_path import split_options
from zoo.errors import InputError
from zoo.plugins import load_zoo
from zoo.registry import Registry
from zoo.store.locate import trained_directory


def adapt(
    module: nn.Module,
    adapter: str = "lora",
    *,
    name: str = "default",
    names: OwnNames | None = None,
    base: str | None = None,
    registry: Registry | None = None,
    **options: Any,
) -> AttachedAdapter:
    """Put an adapter on a model, in place: any `torch.nn.Module`, one of zoo's or not.

    Args:
        adapter: a registered adapter: ``zoo list adapters``.
        name: tells it from other adapters on the same model.
        names: what its modules are called in files, if not as they are here.
        base: what a saved adapter says it was made for.
        options: the adapter's: ``zoo show adapter lora``.

    Raises:
        InputError: a name or a target is unknown, or an option does not fit the model.
    """
    outside = names or OwnNames()

    def save(handle: AttachedAdapter, directory: Path) -> list[str]:
        return write_adapter(handle, directory, outside, base=base)

    return attach(module, choose_adapter(adapter, options, registry or default_registry()), name=name, save=save)


def load_adapter(
    module: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    names: OwnNames | None = None,
    base: str | None = None,
    registry: Registry | None = None,
    any_base: bool = False,
    **options: Any,
) -> AttachedAdapter:
    """Put an adapter on a model: PEFT's, zoo's, LitGPT's, loralib's or the LLaMA-Adapter repository's.

    Args:
        path: a directory, a run or a step of one, or a file that ``torch.save`` wrote. Options may follow it:
            ``lora.pt,alpha=16``. Other arguments as for `adapt`.
        any_base: whether it may have been made for another model, as far as its directory says so.
        options: what the file does not say: of loralib's ``alpha``, its ``lora_alpha`` (1 by default, as there, which
            the handle's ``notes`` tell), and ``enabled``, the ``enable_lora`` of its `MergedLinear` (needed if not all
            are); of the repository's ``layers`` and ``gate``, see `zoo.convert.llama_adapter_files`; of loralib's and
            PEFT's ``partial``, whether modules may be missing.

    Raises:
        InputError: a file is missing or damaged, an option is missing or unknown, or the adapter was made for another
            model, or does not fit this one.
    """
    notes: list[str] = []
    path, given = split_options(path)
    path = trained_directory(path, "adapter", notes.append)
    options = given | options
    if not isinstance(any_base := options.pop("any_base", any_base), bool):
        raise InputError(f"{path}: any_base is true or false, not {any_base!r}.")
    if not any_base:
        check_base(path, module)
    stored = read_adapter(path, module, names or OwnNames(site.name for site in sites_of(module)), **options)
    (registry or default_registry()).find("adapter", stored.adapter)  # or its plugin is not there
    handle = None
    try:
        handle = adapt(module, stored.adapter, name=name, names=names, base=base, registry=registry, **stored.options)
        handle.load_state_dict(stored.state)
        handle.notes += [*notes, *stored.notes]
    except InputError as error:
        if handle is not None:
            handle.detach()
        raise InputError(f"the adapter {path} does not fit this model: {error.message}", fix=error.fix) from None
    return handle


def find_adapter(given: str | Path, report: Callable[[str], None] = lambda line: None) -> tuple[Path, dict[str, Any]]:
    """Path and options of an adapter as `load_adapter` takes it; its weights are not read.

    Args:
        report: as for `trained_directory`.

    Raises:
        InputError, FileFormatError: there is none, or an option is no YAML.
    """
    path, options = split_options(given)
    path = trained_directory(path, "adapter", report)
    check_adapter(path)
    return path, options


@lru_cache(maxsize=1)
def default_registry() -> Registry:
    """The registry of what is installed, built once a process."""
    return load_zoo().registry
