"""Adapters on disk: directories in PEFT's layout, which are written too, and what other programs wrote.

What PEFT can hold is as PEFT writes it. The rest has the same two files, with zoo's own names: the ``peft_type`` is
``ZOO``, with the adapter's registered name and its options beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.discover import sites_of
from zoo.adapters.plans import IA3Options, LLaMAAdapterOptions, LoRAOptions
from zoo.convert import litgpt_adapters, llama_adapter_files
from zoo.convert.adapter_base import record_base
from zoo.convert.adapter_coverage import require_targets
from zoo.convert.adapter_files import CONFIG, StoredAdapter, read_config, read_tensors, write_files
from zoo.convert.adapter_names import OwnNames
from zoo.convert.adapter_path import split_options
from zoo.convert.litgpt_adapters import litgpt_names, read_litgpt_adapter
from zoo.convert.llama_adapter_files import read_llama_adapter_checkpoint
from zoo.convert.loralib import read_loralib
from zoo.convert.peft import read_peft, write_peft
from zoo.convert.peft_methods import write_ia3, write_prompts
from zoo.errors import FileFormatError, InputError
from zoo.models.gpt import GPT

OWN_TYPE = "ZOO"
_AS_PEFT = {LoRAOptions: write_peft, IA3Options: write_ia3, LLaMAAdapterOptions: write_prompts}
"""How PEFT's layout is written for options of exactly these types, where it can hold the adapter."""

_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    "enabled": (
        lambda value: isinstance(value, list | tuple) and {*value} <= {True, False},
        "a list of true and false",
    ),
    "layers": (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    "gate": (lambda value: value in ("tanh", "linear"), "tanh or linear"),
    "partial": (lambda value: isinstance(value, bool), "true or false"),
}
"""What the options of readers may be, besides ``None``, which is as if they were not given."""


@dataclass(frozen=True)
class Reader:
    """Reads the adapters of one program.

    Attributes:
        program: its name.
        reads: whether a file or a directory is one of its.
        read: ``read(path, module, names, **options)``: an adapter for a module whose modules are named so outside.
        options: what ``read`` has to be told because the files do not say it.
    """

    program: str
    reads: Callable[[Path], bool]
    read: Callable[..., StoredAdapter]
    options: tuple[str, ...] = ()


def _is_torch_file(path: Path) -> bool:
    return path.is_file() and path.suffix != ".safetensors"


def _read_loralib(path: Path, module: nn.Module, names: OwnNames, **options: Any) -> StoredAdapter:
    return read_loralib(path, sites_of(module), names, **options)


def _read_litgpt(path: Path, module: nn.Module, names: OwnNames) -> StoredAdapter:
    if not isinstance(module, GPT):
        raise InputError(f"{path} is LitGPT's, and {type(module).__name__} is no decoder of zoo's, which it could fit.")
    return read_litgpt_adapter(path, sites_of(module), litgpt_names(module.spec))


def _read_official(path: Path, module: nn.Module, names: OwnNames, **options: Any) -> StoredAdapter:
    return read_llama_adapter_checkpoint(path, sites_of(module), **options)


_PROGRAMS = (
    Reader("LitGPT", litgpt_adapters.reads, _read_litgpt),
    Reader("LLaMA-Adapter's repository", llama_adapter_files.reads, _read_official, options=("layers", "gate")),
    Reader("loralib", _is_torch_file, _read_loralib, options=("alpha", "enabled", "partial")),
)
"""The first that reads a path has it. loralib's files have no mark, so it takes what is left and stands last."""


def check_adapter(path: Path) -> None:
    """Look whether there is an adapter, without reading its weights.

    Args:
        path: of files, or with options behind it, as `split_options` takes it.

    Raises:
        FileFormatError: there is none.
    """
    path, _ = split_options(path)
    if not any(reader.reads(path) for reader in _PROGRAMS):
        read_config(path)


def read_adapter(path: Path, module: nn.Module, names: OwnNames, **options: Any) -> StoredAdapter:
    """Read an adapter for a module whose modules are named so outside.

    Args:
        path: a directory, or a file that another program wrote.
        options: what those files do not say: `Reader.options`.

    Raises:
        FileFormatError: a file is missing or damaged, or the adapter is of a kind that zoo does not know.
        InputError: an option is not one of the reader's, or has a value that it can not have.
    """
    directory = Reader("PEFT and zoo", Path.is_dir, _read_directory, options=("partial",))
    reader = next((reader for reader in _PROGRAMS if reader.reads(path)), directory)
    if unknown := [option for option in options if option not in reader.options]:
        others = f", or take {' or '.join(reader.options)}" if reader.options else ""
        raise InputError(
            f"{path} is read as {reader.program} saves, without an option {unknown[0]!r}.", fix=f"Leave it out{others}."
        )
    for option, value in options.items():
        is_allowed, described = _OPTIONS[option]
        if value is not None and not is_allowed(value):
            raise InputError(f"{path}: {option} is {described}, not {value!r}.")
    return reader.read(path, module, names, **options)


def _read_directory(
    directory: Path, module: nn.Module, names: OwnNames, *, partial: bool | None = False
) -> StoredAdapter:
    config = read_config(directory)
    if config.get("peft_type") != OWN_TYPE:
        stored = read_peft(directory, names)
        if not partial and config["peft_type"] in ("LORA", "IA3"):
            require_targets(config, {names.module(site) for site in _sites_with_parts(stored)}, names, directory)
        return stored
    try:
        adapter, options = config["zoo_adapter"], dict(config["zoo_options"])
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(f"{directory / CONFIG} names no adapter of zoo's.") from None
    return StoredAdapter(adapter, options, read_tensors(directory))


def _sites_with_parts(stored: StoredAdapter) -> set[str]:
    keys = (key.rpartition(".") for key in stored.state)
    return {site for site, _, leaf in keys if leaf in ("lora_B", "ia3_output", "ia3_input")}


def write_adapter(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write an adapter; returns what a reader should know, one line each."""
    options: Any = handle.adapter.options
    notes = []
    if write := _AS_PEFT.get(type(options)):
        try:
            told = write(handle, directory, names, base=base)
            record_base(directory, handle.root, base)
            return told
        except InputError as error:
            notes.append(f"written in zoo's own layout, which PEFT does not read: {error.message}")
    config = {
        "peft_type": OWN_TYPE,
        "zoo_adapter": handle.adapter.name,
        "zoo_options": asdict(options),
        "base_model_name_or_path": base,
    }
    write_files(directory, config, handle.state_dict(), prefix="")
    record_base(directory, handle.root, base)
    return notes
