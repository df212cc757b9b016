"""The end of a run: the trained directory, the report, and what to say."""

from __future__ import annotations

import math
from pathlib import Path

from zoo.runs.directory import RunDirectory
from zoo.runs.files import AdapterFiles, ModelDirectoryFiles
from zoo.runs.outcome import Outcome, StoppedError
from zoo.runs.preflight import minutes
from zoo.train.progress import Progress
from zoo.train.recipe import Recipe
from zoo.train.report import write_report


def finish(
    recipe: Recipe,
    directory: RunDirectory,
    files: AdapterFiles | ModelDirectoryFiles,
    progress: Progress,
    ending: str,
    val_loss: float | None,
    *,
    is_first: bool,
) -> Outcome:
    """Write what is left to be written, on rank 0.

    Raises:
        StoppedError: a signal ended the run, which can go on from here.
    """
    has_best = math.isfinite(progress.best_loss)
    outcome = Outcome(
        directory=directory.path,
        ending=ending,
        model=recipe.model,
        trained=directory.trained(recipe),
        n_trained=files.trained.handle.n_trained,
        step=progress.step,
        val_loss=val_loss,
        best_loss=progress.best_loss if has_best else None,
        best_step=progress.best_step if has_best else None,
        seconds=round(progress.seconds, 2),
        report=directory.path / "report.html",
    )
    if is_first:
        _report(recipe, directory, files, outcome)
    if ending.startswith("SIG"):
        raise StoppedError(
            f"{ending}; step {progress.step} is saved in {directory.checkpoints}.",
            fix=f"Go on by: zoo {recipe.task} --out {directory.path} --resume",
        )
    if is_first:
        assert outcome.trained is not None
        files.export(outcome.trained)
        directory.end(outcome.to_dict())
    return outcome


def _report(
    recipe: Recipe, directory: RunDirectory, files: AdapterFiles | ModelDirectoryFiles, outcome: Outcome
) -> Path:
    n_all = sum(p.numel() for p in files.trained.lm.model.parameters())
    facts = {
        "model": recipe.model,
        "adapter": recipe.adapter.use,
        "data": recipe.data,
        "trained parameters": f"{outcome.n_trained:,} of {n_all:,}",
        "steps": f"{outcome.step:,}",
        "time": minutes(outcome.seconds),
        "ended because": outcome.ending,
    }
    if outcome.val_loss is not None:
        facts["validation loss"] = f"{outcome.val_loss:.4f}"
    if outcome.best_loss is not None:
        facts["lowest validation loss"] = f"{outcome.best_loss:.4f} at step {outcome.best_step}"
    title = f"{Path(recipe.model).name}: {recipe.task}" + (
        "" if recipe.task == "pretrain" else f", {recipe.adapter.use}"
    )
    return write_report(directory.path, title=title, facts=facts)
