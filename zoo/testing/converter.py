"""What every converter has to do: give back the model that a file holds, to the bit, or say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from zoo.attention.eager import Eager
from zoo.convert.base import Checkpoint, Converter, Writer, what_is_lost
from zoo.convert.export import export_model
from zoo.convert.load import load_any, open_checkpoint
from zoo.errors import FileFormatError, InputError, MissingTokenizerError
from zoo.families.base import Family
from zoo.precision.quantization import choose_quantizer
from zoo.spec import ModelSpec
from zoo.testing.contract import Contract, not_run
from zoo.testing.models import checkpoint_of, random_model, shrunk, some_tokens

TEXT = "Once upon a time, \N{SNOWMAN}!"


class ConverterContract(Contract, standard=True):
    """A format by its name. One that is only read needs `make_file`.

    Attributes:
        model: a registered model, cut down, that is written in this format.
        quantizer: whose layers are written, in a format of such directories.
    """

    kind = "converter"
    model: ClassVar[str] = "llama-2-7b"
    quantizer: ClassVar[str | None] = None

    def make_spec(self) -> ModelSpec:
        """What is written."""
        return shrunk(self.registry().model(self.model).spec)

    def make_source(self, directory: Path) -> Checkpoint:
        """A small model in memory, every parameter random, with a tokenizer."""
        family: Family = self.registry().load("family", self.registry().model(self.model).family)
        model = random_model(family, self.make_spec())
        return checkpoint_of(family, model, self.make_spec(), directory / "source")

    def make_file(self, directory: Path, source: Checkpoint) -> Path:
        """Write the model of ``source`` in this format, by default with the converter itself; returns where."""
        writer = self.make_converter()
        if not isinstance(writer, Writer):
            not_run("it writes nothing: override make_file")
        path = directory / f"written{next(iter(self.record.matches), '')}"
        quantizer = self.quantizer and choose_quantizer(self.quantizer, device="cpu", registry=self.registry())
        export_model(source, path, writer=writer, quantizer=quantizer or None)
        return path

    def make_converter(self) -> Converter:
        """A new converter."""
        made: Converter = self.load()()
        return made

    def opened(self, directory: Path) -> tuple[Checkpoint, Checkpoint]:
        """A model, and the same read back."""
        source = self.make_source(directory)
        return source, self.make_converter().open(self.make_file(directory, source), self.registry())

    def test_values_come_back_to_the_bit(self, tmp_path: Path) -> None:
        """Every parameter is where it was, nothing is rounded, swapped or transposed."""
        source, again = self.opened(tmp_path)
        written, read = dict(source.parameters()), dict(again.parameters())
        assert written.keys() == read.keys(), f"not in both: {sorted(written.keys() ^ read.keys())[:4]}"
        wrong = [name for name, values in written.items() if not _same(values, read[name])]
        assert not wrong, f"{wrong[:4]} did not come back as they were"

    def test_the_model_is_the_same(self, tmp_path: Path) -> None:
        """What the file says of the architecture is all of it; and the model computes what its parameters say."""
        source, again = self.opened(tmp_path)
        lost = what_is_lost(source.spec, again.spec, lambda number: float(torch.tensor(number)))
        assert not [line for line in lost if "norm_eps" not in line], f"the file does not say {lost}"
        models = [load_any(checkpoint, Eager(), dtype=torch.float32) for checkpoint in (source, again)]
        same = _with_values(models[0], dict(again.parameters(torch.float32)))
        with torch.no_grad():
            torch.testing.assert_close(same(some_tokens()), models[1](some_tokens()))

    def test_shapes_are_told_by_the_header(self, tmp_path: Path) -> None:
        """Names, shapes and dtypes are those of the tensors, before any is read."""
        _, again = self.opened(tmp_path)
        reader = again.tensors
        for name in again.located():
            shape, dtype = reader.shape(name), reader.dtype(name)
            tensor = reader.get(name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
            assert reader.get(name, torch.float64).dtype == torch.float64, name

    def test_it_knows_its_files(self, tmp_path: Path) -> None:
        """It reads its own, no other format claims them, and it claims no others'."""
        path = self.make_file(tmp_path, self.make_source(tmp_path))
        assert self.make_converter().reads(path), f"reads() refuses {path.name}"
        opened = open_checkpoint(path, self.registry())
        assert opened.spec == self.make_converter().open(path, self.registry()).spec
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").write_text("no model")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "data.json").write_text("{}")
        claimed = [p for p in ("empty", "notes.txt", "other") if self.make_converter().reads(tmp_path / p)]
        assert not claimed, f"reads() claims {claimed}"

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        """Nothing is left at random values in silence."""
        _, again = self.opened(tmp_path)
        lost = next(reversed(again.located()))
        with pytest.raises(FileFormatError) as refused:
            replace(again, tensors=_Other(again, without=lost)).located()
        assert lost in str(refused.value), f"{lost} is missing: {refused.value}"

    def test_an_unexpected_tensor_is_named(self, tmp_path: Path) -> None:
        """Nothing that a file holds is dropped in silence."""
        _, again = self.opened(tmp_path)
        with pytest.raises(FileFormatError, match="spare_tensor_of_the_contract"):
            replace(again, tensors=_Other(again, extra="spare_tensor_of_the_contract")).located()

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        """A download that broke off is named, and nothing is half-loaded."""
        path = self.make_file(tmp_path, self.make_source(tmp_path))
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        largest = max(files, key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        with pytest.raises(InputError) as refused:
            dict(self.make_converter().open(path, self.registry()).parameters())
        assert largest.name in str(refused.value), f"the message does not name {largest.name}: {refused.value}"

    def test_reading_changes_nothing(self, tmp_path: Path) -> None:
        """Files are read and not written to."""
        path = self.make_file(tmp_path, self.make_source(tmp_path))
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
        dict(self.make_converter().open(path, self.registry()).parameters())
        assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
        assert path.is_file() or files == sorted(p for p in path.rglob("*") if p.is_file())

    def test_the_tokenizer_comes_along(self, tmp_path: Path) -> None:
        """A format that holds one gives the same ids back; another says that there is none."""
        source, again = self.opened(tmp_path)
        try:
            tokenizer = again.load_tokenizer()
        except MissingTokenizerError:
            not_run("the format holds no tokenizer")
        assert tokenizer.encode(TEXT) == source.load_tokenizer().encode(TEXT)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


class _Other:
    """The tensors of a checkpoint, without one, or with another."""

    def __init__(self, checkpoint: Checkpoint, *, without: str = "", extra: str = "") -> None:
        self._real = checkpoint.tensors
        names = [name for name in self._real.names() if name != without]
        self._names = [*names, extra] if extra else names
        self._like = names[0]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._real.shape(name if name in self._real.names() else self._like)

    def dtype(self, name: str) -> torch.dtype:
        return self._real.dtype(name if name in self._real.names() else self._like)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._real.get(name if name in self._real.names() else self._like, dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _with_values(model: torch.nn.Module, values: Mapping[str, Tensor]) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model
