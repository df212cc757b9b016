"""What every logger has to do: take whatever a run measures, and never stand in its way."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.testing.contract import Contract, not_run
from zoo.train.metrics import Logger, Loggers, MetricsFile, Values, read_metrics

RECIPE = {"model": "gpt2", "adapter": {"use": "lora", "r": 8}, "lr": 1e-4, "sample_prompts": ["Hi"], "val_data": None}
"""As a recipe may be."""
STEPS: tuple[tuple[int, dict[str, float | int | str]], ...] = (
    (1, {"loss": 4.5, "lr": 1e-4, "tokens": 512, "seconds": 0.5}),
    (2, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4}),
    (2, {"val_loss": 4.25}),
    (3, {"loss": 4.125, "note": "a word, and a line\nbreak", "peak_memory": 1 << 40}),
)
"""What a run may measure: numbers that are none, two lines of one step, words."""


class LoggerContract(Contract, standard=True):
    """A logger made as a run makes it, with ``options``."""

    kind = "logger"

    def make_logger(self, run: Path) -> Logger:
        """A logger of the run."""
        options = self.make_options()
        run.mkdir(parents=True, exist_ok=True)
        made: Logger = self.load()(run, dict(RECIPE), *(() if options is None else (options,)))
        return made

    def logged(self, run: Path) -> list[tuple[int, dict[str, Any]]] | None:
        """What can be read back of a finished run: steps with their numbers, in order."""
        return None

    def run_with(self, logger: Logger, run: Path) -> tuple[list[dict[str, Any]], list[str]]:
        """The metrics of a run beside the logger, and what was said of it."""
        said: list[str] = []
        loggers = Loggers(MetricsFile(run / "metrics.jsonl"), {self.component: logger}, said.append)
        for step, values in STEPS:
            loggers.log(step, values)
        loggers.finish()
        return read_metrics(run / "metrics.jsonl"), said

    def test_a_run_is_logged(self, tmp_path: Path) -> None:
        """Every value that a run measures is taken."""
        lines, said = self.run_with(self.make_logger(tmp_path / "run"), tmp_path / "run")
        assert not said, said
        assert [line["step"] for line in lines] == [step for step, _ in STEPS]

    def test_what_was_logged_is_there(self, tmp_path: Path) -> None:
        """Numbers arrive with their steps."""
        self.run_with(self.make_logger(tmp_path / "run"), tmp_path / "run")
        found = self.logged(tmp_path / "run")
        if found is None:
            not_run("override logged to read back what was written")
        losses = [(step, values["loss"]) for step, values in STEPS if "loss" in values]
        arrived = [(step, values["loss"]) for step, values in found if "loss" in values]
        assert [(s, str(v)) for s, v in arrived] == [(s, str(v)) for s, v in losses]

    def test_an_exception_does_not_end_the_run(self, tmp_path: Path) -> None:
        """Whatever happens to it, the metrics are complete: it may raise an `Exception`, and nothing else."""
        run = tmp_path / "run"
        for break_it in (_unwritable(run), _with_values_of_other_types()):
            logger = self.make_logger(run)
            with break_it as values:
                try:
                    logger.log(1, values)
                    logger.finish()
                except Exception:  # noqa: BLE001 - this the run survives
                    pass
                except BaseException as error:
                    raise AssertionError(f"it raises {error!r}, which ends the run") from error
            shutil.rmtree(run, ignore_errors=True)
        lines, _ = self.run_with(_Failing(self.make_logger(run)), run)
        assert len(lines) == len(STEPS)

    def test_values_are_not_changed(self, tmp_path: Path) -> None:
        """Other loggers get the same mapping."""
        logger = self.make_logger(tmp_path / "run")
        for step, values in STEPS:
            given = dict(values)
            logger.log(step, given)
            assert str(given) == str(values), "the values are written to"
        logger.finish()

    def test_the_run_stays_reproducible(self, tmp_path: Path) -> None:
        """The random numbers of torch are as without it."""
        state = torch.random.get_rng_state()
        logger = self.make_logger(tmp_path / "run")
        for step, values in STEPS:
            logger.log(step, values)
        logger.finish()
        assert torch.equal(torch.random.get_rng_state(), state), "it draws from torch's random numbers"

    def test_standard_output_is_for_results(self, tmp_path: Path) -> None:
        """What it prints there would end up in what ``--json`` prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.run_with(self.make_logger(tmp_path / "run"), tmp_path / "run")
        assert printed.getvalue() == ""

    def test_it_stays_in_the_run(self, tmp_path: Path) -> None:
        """Files are written inside the run's directory."""
        self.run_with(self.make_logger(tmp_path / "run"), tmp_path / "run")
        assert [path.name for path in tmp_path.iterdir()] == ["run"], "files beside the run's directory"


class _Failing:
    """A logger whose every call raises, after the real one has had it."""

    def __init__(self, real: Logger) -> None:
        self._real = real

    def log(self, step: int, values: Values) -> None:
        self._real.log(step, values)
        raise RuntimeError("of the contract")

    def finish(self) -> None:
        self._real.finish()
        raise RuntimeError("of the contract")


@contextlib.contextmanager
def _unwritable(run: Path) -> Iterator[Any]:
    """The run's directory is gone, and a file is in its place."""
    shutil.rmtree(run)
    run.write_text("")
    try:
        yield {"loss": 1.0}
    finally:
        run.unlink()


@contextlib.contextmanager
def _with_values_of_other_types() -> Iterator[Any]:
    yield {"loss": None, "list": [1, 2], "nested": {"a": 1}}
