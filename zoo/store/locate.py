"""From a run, or a step of one, to the model or adapter directory in it, which every command takes as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from zoo.errors import FileFormatError, InputError
from zoo.store.files import Damage, check_file
from zoo.store.layout import listing, step_directories
from zoo.store.manifest import FILE_NAME, Manifest, damages, read_manifest

Kind = Literal["model", "adapter"]

RECIPE, RESULT, CHECKPOINTS = "recipe.yaml", "result.json", "checkpoints"
"""In a run: what makes it one, what is there when it has ended, and its store."""
_MODEL = "model"
"""In a step: the model or adapter directory. `zoo.store.parts` writes it, and imports much to do so."""
_CONFIG: dict[Kind, str] = {"model": "config.json", "adapter": "adapter_config.json"}


def trained_directory(path: Path, kind: Kind, report: Callable[[str], None] = lambda line: None) -> Path:
    """What a path stands for where a model or an adapter is asked for.

    A run that has ended stands for its result, a run that has not (or its store) for the newest step whose model is
    whole, a step for its model. Any other path stands for itself.

    Args:
        kind: what is asked for; a run trained one of the two.
        report: is told of newer steps that are damaged.

    Raises:
        InputError: the other kind was trained, or nothing is saved yet.
        FileFormatError: the step, or every step of the run, is damaged.
    """
    if (path / FILE_NAME).is_file():
        return _of_step(path, kind)
    if not path.is_dir() or any((path / config).is_file() for config in _CONFIG.values()):
        return path
    if (path / RECIPE).is_file():
        if (path / RESULT).is_file() and (ended := _checked(path, path, kind)):
            return ended
        return _newest(path / CHECKPOINTS, kind, report)
    return _newest(path, kind, report) if step_directories(path) else path


def _newest(store: Path, kind: Kind, report: Callable[[str], None]) -> Path:
    found = listing(store)
    damaged = dict(found.damaged)
    for step in reversed(found.steps):
        if problems := _damages(step.path, step.manifest):
            damaged[step.path] = problems
            continue
        for other, problems in damaged.items():
            report(f"{other} can not be used: {problems[0]}; {step.path} is taken.")
        return _inside(step.path, kind)
    if damaged:
        path, problems = max(damaged.items())
        raise FileFormatError(f"no step in {store} can be used: {path.name}: {problems[0]}.")
    raise InputError(f"{store} holds no step yet.", fix="Wait until the run has saved one, or has ended.")


def _of_step(path: Path, kind: Kind) -> Path:
    try:
        problems = _damages(path, read_manifest(path))
    except Damage as damage:
        problems = [str(damage)]
    if problems:
        raise FileFormatError(f"{path} can not be used: {problems[0]}.", fix="Take another step of the run.")
    return _inside(path, kind)


def _damages(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the model of a step, every byte of it read; optimizer and generators are not needed."""
    ours = {name: record for name, record in manifest.files.items() if name.startswith(f"{_MODEL}/")}
    return damages(path, ours, check_file)


def _inside(step: Path, kind: Kind) -> Path:
    inside = step / _MODEL
    if (inside / _CONFIG[kind]).is_file():
        return inside
    _refuse_other(inside, step, kind)
    raise InputError(
        f"{step} holds no {kind} directory: it was saved in shards, or by another training loop.",
        fix="Finish the run with --resume; what it trained is then in one piece.",
    )


def _checked(run: Path, shown: Path, kind: Kind) -> Path | None:
    """The result of a run; ``None``: it is not there any more."""
    if (run / kind / _CONFIG[kind]).is_file():
        return run / kind
    _refuse_other(run / ("adapter" if kind == "model" else "model"), shown, kind)
    return None


def _refuse_other(directory: Path, shown: Path, kind: Kind) -> None:
    """Say so if the directory holds the kind that was not asked for."""
    if kind == "adapter" and (directory / _CONFIG["model"]).is_file():
        raise InputError(f"{shown} trained a whole model, and no adapter.", fix=f"Give it as the model: {shown}.")
    if kind == "model" and (directory / _CONFIG["adapter"]).is_file():
        base = json.loads((directory / _CONFIG["adapter"]).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise InputError(
            f"{shown} trained an adapter, and no model.",
            fix=f"Give the model that it was trained on: {base or 'MODEL'} --adapter {shown}.",
        )
