"""Adapters on disk: directories in PEFT's layout, which are written too, and what other programs wrote.

What PEFT can hold is as PEFT writes it. The rest has the same two files, with zoo's own names: the ``peft_type`` is
``ZOO``, with the adapter's registered name and its options beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.discover import sites_of
from zoo.adapters.plans import IA3Options, LLaMAAdapterOptions, LoRAOptions
from zoo.convert import litgpt_adapters, llama_adapter_files
from zoo.convert.adapter_files import CONFIG, StoredAdapter, read_config, read_tensors, write_files
from zoo.convert.adapter_names import OwnNames
from zoo.convert.litgpt_adapters import litgpt_names, read_litgpt_adapter
from zoo.convert.llama_adapter_files import read_llama_adapter_checkpoint
from zoo.convert.loralib import read_loralib
from zoo.convert.peft import read_peft, write_peft
from zoo.convert.peft_methods import write_ia3, write_prompts
from zoo.errors import FileFormatError, InputError
from zoo.models.gpt import GPT

OWN_TYPE = "ZOO"
_AS_PEFT = {IA3Options: write_ia3, LLaMAAdapterOptions: write_prompts}
"""How PEFT's layout is written for options of exactly these types, where it can hold the adapter."""


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
    Reader("loralib", _is_torch_file, _read_loralib, options=("alpha", "enabled")),
)
"""The first that reads a path has it. loralib's files have no mark, so it takes what is left and stands last."""


def check_adapter(path: Path) -> None:
    """Look whether there is an adapter, without reading its weights.

    Raises:
        FileFormatError: there is none.
    """
    if not any(reader.reads(path) for reader in _PROGRAMS):
        read_config(path)


def read_adapter(path: Path, module: nn.Module, names: OwnNames, **options: Any) -> StoredAdapter:
    """Read an adapter for a module whose modules are named so outside.

    Args:
        path: a directory, or a file that another program wrote.
        options: what those files do not say: `Reader.options`.

    Raises:
        FileFormatError: a file is missing or damaged, or the adapter is of a kind that zoo does not know.
        InputError: an option is not one of the reader's.
    """
    directory = Reader("PEFT and zoo", Path.is_dir, _read_directory)
    reader = next((reader for reader in _PROGRAMS if reader.reads(path)), directory)
    if unknown := [option for option in options if option not in reader.options]:
        taken = f"It takes {' and '.join(reader.options)}." if reader.options else "Leave it out: its files say it."
        raise InputError(f"{path} is read as {reader.program} saves, without an option {unknown[0]!r}.", fix=taken)
    return reader.read(path, module, names, **options)


def _read_directory(directory: Path, module: nn.Module, names: OwnNames) -> StoredAdapter:
    config = read_config(directory)
    if config.get("peft_type") != OWN_TYPE:
        return read_peft(directory, names)
    try:
        adapter, options = config["zoo_adapter"], dict(config["zoo_options"])
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(f"{directory / CONFIG} names no adapter of zoo's.") from None
    return StoredAdapter(adapter, options, read_tensors(directory))


def write_adapter(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write an adapter; returns what a reader should know, one line each.

    Raises:
        InputError: it is a LoRA that PEFT's layout can not hold.
    """
    options: Any = handle.adapter.options
    if isinstance(options, LoRAOptions):
        return write_peft(handle, directory, names, base=base)
    notes = []
    if write := _AS_PEFT.get(type(options)):
        try:
            return write(handle, directory, names, base=base)
        except InputError as error:
            notes.append(f"written in zoo's own layout, which PEFT does not read: {error.message}")
    config = {
        "peft_type": OWN_TYPE,
        "zoo_adapter": handle.adapter.name,
        "zoo_options": asdict(options),
        "base_model_name_or_path": base,
    }
    write_files(directory, config, handle.state_dict(), prefix="")
    return notes
