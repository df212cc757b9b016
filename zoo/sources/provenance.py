"""``zoo.yaml``: what a model directory is and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import FileFormatError, ZooError

FILE_NAME = "zoo.yaml"
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Provenance:
    """Where the files of a model directory came from."""

    source: str | None = None
    """``scheme:address`` with its revision resolved, so that it names the same bytes for ever."""
    model: str | None = None
    """The registry's name for it."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digest of each weight file, by its path in the directory."""


def read_provenance(directory: Path) -> Provenance:
    """What ``zoo.yaml`` says; an empty record if there is none.

    Raises:
        FileFormatError: it is damaged.
    """
    content = read_facts(directory)
    source, model, sha256 = content.get("source"), content.get("model"), content.get("sha256")
    return Provenance(
        source=str(source) if source else None,
        model=str(model) if model else None,
        sha256=dict(sha256) if isinstance(sha256, Mapping) else {},
    )


def write_provenance(directory: Path, provenance: Provenance, **facts: Any) -> None:
    """Write ``zoo.yaml`` with further ``facts``, keeping the other keys of one that is there.

    Raises:
        FileFormatError: the one that is there is damaged.
    """
    from ruamel.yaml import YAML

    content = read_facts(directory)
    content.update(
        schema=1,
        model=provenance.model,
        source=provenance.source,
        sha256=dict(sorted(provenance.sha256.items())),
        **facts,
    )
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares it as None
    yaml.dump(content, directory / FILE_NAME)


def digest_weights(directory: Path, promised: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of every weight file below ``directory``, each compared with the one its source promised.

    Raises:
        ZooError: one differs; the message has both digests.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix not in _WEIGHT_SUFFIXES or not path.is_file():
            continue
        found[name] = sha256_of(path)
        if name in promised and found[name] != promised[name]:
            raise ZooError(
                f"{name} was damaged on the way: its sha256 is {found[name]}, and {promised[name]} was promised.",
                fix="It has been removed; run the command again.",
            )
    return found


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_facts(directory: Path) -> dict[str, Any]:
    """All that ``zoo.yaml`` says, as plain data; empty if there is none.

    Raises:
        FileFormatError: it is damaged.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = directory / FILE_NAME
    if not path.is_file():
        return {}
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} must be a mapping with 'schema: 1'.", fix="Remove or repair it.")
    return content
