"""A Hugging Face directory with one more file in it."""

from dataclasses import replace
from pathlib import Path

from zoo.convert.base import Checkpoint, WriteOptions, Writing
from zoo.convert.hf import HuggingFace
from zoo.registry import Registry


class Outsider:
    def reads(self, path: Path) -> bool:
        return (path / "outsider" / "config.json").is_file()

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        return HuggingFace().open(path / "outsider", registry)

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        inner = HuggingFace().write(checkpoint, options)

        def to(path: Path) -> None:
            path.mkdir()
            inner.to(path / "outsider")

        return replace(inner, to=to)
