"""``MANIFEST.json``, the last file to be written into a step: what the step is, and what each of its files must be."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import FileFormatError
from zoo.store.files import Damage, FileRecord, check_file, check_size, write_pieces

FILE_NAME = "MANIFEST.json"
FORMAT = "zoo-checkpoint"
FORMAT_VERSION = 1


class NewerFormatError(FileFormatError):
    """A later version of zoo wrote this step."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``MANIFEST.json``."""

    step: int
    sequence: int
    """Counts the saves of a store. The newest step is the one saved last, also after going back to an older one."""
    world_size: int
    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    shared: list[str]
    """Keys of the state that rank 0 wrote for all."""
    per_rank: list[str]
    """Keys of the state that each rank wrote for itself."""
    files: Mapping[str, FileRecord]
    """By path in the step, with forward slashes."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    identity: Any = None
    """What the caller says the run is, such as the hash of its spec; JSON."""
    parameters: str | None = None
    """A sha256 of the model's tensor names, shapes and dtypes."""
    not_finite: list[str] = field(default_factory=list)
    """Parameters that hold an infinity or a NaN."""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self), "metrics": metrics}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """What `to_json` wrote."""
        known = {name: content[name] for name in cls.__dataclass_fields__}
        known["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        known["metrics"] = {name: float(value) for name, value in content["metrics"].items()}
        return cls(**known)

    def write(self, directory: Path) -> None:
        """Write the file into a step's directory, down to the disk."""
        write_pieces(directory / FILE_NAME, [_text(self.to_json()).encode()])


def read_manifest(directory: Path, step: int | None = None) -> Manifest:
    """What the manifest of a step says.

    Args:
        step: the one that the directory's name promises.

    Raises:
        Damage: there is none, or it is not what was saved.
        NewerFormatError: this version of zoo does not know its format.
    """
    try:
        written = (directory / FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damage(f"no {FILE_NAME} (the save was interrupted)") from None
    except OSError as error:
        raise Damage(f"{FILE_NAME}: can not be read: {error.strerror}") from None
    content = _content(written)
    if content["format"] != FORMAT or content["format_version"] > FORMAT_VERSION:
        raise NewerFormatError(
            f"{directory} has format version {content['format_version']} of {content['format']}, and this version of "
            f"zoo reads up to {FORMAT_VERSION} of {FORMAT}.",
            fix="Upgrade zoo: pip install -U gpt-zoo.",
        )
    manifest = Manifest.from_json(content)
    if step not in (None, manifest.step):
        raise Damage(f"{FILE_NAME}: is of step {manifest.step}, and the directory is named after step {step}")
    return manifest


def verify(directory: Path, step: int | None = None) -> list[str]:
    """Read every byte of a step and compare it with the manifest.

    Returns:
        What is wrong, one sentence a problem; empty for a step that is whole. Files that do not belong to the step
        are listed too, although they keep nobody from loading it.

    Raises:
        NewerFormatError: this version of zoo does not know its format.
    """
    try:
        manifest = read_manifest(directory, step)
    except Damage as damage:
        return [str(damage)]
    return [*damages(directory, manifest.files, check_file), *unexpected(directory, manifest)]


def damages(
    directory: Path, files: Mapping[str, FileRecord], check: Callable[[Path, FileRecord], Any] = check_size
) -> list[str]:
    """What is wrong with these files of a step: by default whether they are there, with the right size."""
    found = []
    for name, record in files.items():
        try:
            check(directory / name, record)
        except Damage as damage:
            found.append(f"{name}: {damage}")
        except OSError as error:
            found.append(f"{name}: can not be read: {error.strerror}")
    return found


def unexpected(directory: Path, manifest: Manifest) -> list[str]:
    """Files that somebody put into the step after it was saved."""
    walk = os.walk(directory)  # which passes over what is deleted meanwhile: a writer may replace this step
    there = sorted(
        (Path(folder) / name).relative_to(directory).as_posix() for folder, _, files in walk for name in files
    )
    return [f"{name}: not a file of this step" for name in there if name not in manifest.files and name != FILE_NAME]


def _text(content: Mapping[str, Any]) -> str:
    """The one way to write this content, ending in a digest of all before it. It holds for every format version."""
    text = json.dumps(content, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-2]},\n "sha256": "{digest}"\n}}\n'


def _content(written: bytes) -> dict[str, Any]:
    changed = Damage(f"{FILE_NAME}: content changed since it was saved")
    try:
        content = json.loads(written)
        content.pop("sha256")
        intact = _text(content).encode() == written
    except (ValueError, AttributeError, KeyError, TypeError):
        raise changed from None
    if not intact:
        raise changed
    return content
