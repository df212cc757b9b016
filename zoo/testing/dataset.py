"""What every named data set has to do: say what it is, and be read the same by everybody."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zoo.data.finetuning import FinetuningData
from zoo.data.load import DataSource, LoadedData, load_samples, resolve_data
from zoo.data.named import NamedDataset
from zoo.sources.address import Source
from zoo.testing.contract import Contract, not_run
from zoo.text.new_tokenizers import byte_tokenizer
from zoo.text.prompt_styles import PLAIN
from zoo.text.prompts import complete
from zoo.text.samples import Encoded, Sample


class DatasetContract(Contract, standard=True):
    """A data set by its name. What is read is checked on the rows that `make_rows` writes: no network is needed."""

    kind = "dataset"

    def make_rows(self, directory: Path) -> Path | None:
        """Write a file with a dozen of its rows, as they are where it lies; ``None``: there are none at hand."""
        return None

    @property
    def dataset(self) -> NamedDataset:
        """What is registered."""
        found: NamedDataset = self.load()
        assert isinstance(found, NamedDataset), f"the target is a zoo.data.named.NamedDataset, not {found!r}"
        return found

    def source(self, directory: Path) -> DataSource:
        """The rows at hand, read as the data set says."""
        path = self.make_rows(directory)
        if path is None:
            not_run("no rows at hand: override make_rows")
        named = self.dataset
        found = resolve_data(str(path), self.registry())
        return replace(found, columns=named.columns, is_corpus=named.corpus, separator=named.separator)

    def loaded(self, directory: Path, *, seed: int = 0) -> LoadedData:
        """Its samples, a fifth of them for validation."""
        source = self.source(directory)
        if source.is_corpus:
            not_run("a corpus has no samples")
        return load_samples(source, val_fraction=0.2, seed=seed)

    def test_it_says_where_it_is(self) -> None:
        """Every address has a scheme that some source reads, and what comes from the web says its digest."""
        named = self.dataset
        for address in filter(None, (named.source, named.validation)):
            source = Source.parse(address)
            assert source.scheme == "hf" or self.registry().match("source", source.scheme), f"nobody reads {address}"
            if source.scheme in ("http", "https"):
                digest = source.address.fragment or ""
                assert re.fullmatch(r"sha256=[0-9a-f]{64}|git-blob=[0-9a-f]{40}", digest), f"{address} has no digest"

    def test_it_says_what_it_is(self) -> None:
        """A licence, for whoever trains on it; and as many rows as there are, if it says so."""
        named = self.dataset
        assert named.license.strip(), "license= is what a user has to know before training on it"
        assert named.rows is None or named.rows > 0
        assert named.separator is None or named.corpus, "a separator lies between the documents of a corpus"
        assert len(set(named.columns.values())) == len(named.columns), "two columns are taken for one"

    def test_every_row_is_read(self, tmp_path: Path) -> None:
        """No row is lost: each is on one side of the split, and every column is made use of or named as ignored."""
        loaded, source = self.loaded(tmp_path), self.source(tmp_path)
        n_rows = sum(1 for _ in source.train())
        n_samples = len(loaded.train) + len(loaded.validation)
        assert n_samples + loaded.n_without_reply == n_rows, f"{n_rows} rows became {n_samples} samples"
        assert not loaded.n_without_reply, f"{loaded.n_without_reply} rows have nothing to learn: are columns right?"

    def test_it_is_the_same_each_time(self, tmp_path: Path) -> None:
        """Read twice, the samples are the same, and so is the split; it is a function of the seed."""
        first, again = self.loaded(tmp_path), self.loaded(tmp_path)
        assert _texts(first.train) == _texts(again.train) and _texts(first.validation) == _texts(again.validation)
        sides = {tuple(_texts(self.loaded(tmp_path, seed=seed).validation)) for seed in range(8)}
        assert len(sides) > 1, "the seed does not change the split"

    def test_the_split_is_clean(self, tmp_path: Path) -> None:
        """Nothing that is validated on is trained on."""
        loaded = self.loaded(tmp_path)
        assert not set(_texts(loaded.train)) & set(_texts(loaded.validation))

    def test_the_order_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        """Each epoch has every sample once, in an order that the seed gives."""
        encoded = self.encoded(self.loaded(tmp_path).train)

        def order(seed: int) -> list[int]:
            data = FinetuningData(encoded, batch_size=2, seed=seed)
            return [row for step in range(data.steps_per_epoch) for row in data.rows_of(step)]

        assert order(1) == order(1)
        assert sorted(order(1)) == list(range(len(encoded)))
        assert len({tuple(order(seed)) for seed in range(8)}) > 1

    def encoded(self, samples: Sequence[Sample]) -> list[Encoded]:
        """The samples as ids."""
        tokenizer = byte_tokenizer()
        style = complete(PLAIN, tokenizer)
        return [style.encode(sample, tokenizer) for sample in samples]

    def test_a_corpus_is_read(self, tmp_path: Path) -> None:
        """A corpus is text in order, the same each time."""
        source = self.source(tmp_path)
        if not source.is_corpus:
            not_run("it is no corpus")
        rows = [row.values for row in source.train()]
        assert rows and rows == [row.values for row in source.train()]


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [str(sample.to_dict()) for sample in samples]
