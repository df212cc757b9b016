"""From a recipe to a run: everything that is registered put together, checked, shown, and trained."""

from __future__ import annotations

from pathlib import Path

from zoo.api import choose_device
from zoo.errors import InputError
from zoo.precision.base import Precision, load_precision
from zoo.precision.builtin import FP32_TRUE
from zoo.registry import Registry
from zoo.runs.assembly import Assembly
from zoo.runs.composition import compose
from zoo.runs.directory import RunDirectory
from zoo.runs.outcome import Display, Outcome
from zoo.runs.processes import check_processes, others_run
from zoo.runs.provenance import check_plugins, with_plugins
from zoo.store.fence import Fence
from zoo.store.signals import StopSignals
from zoo.train.launch import make_fabric
from zoo.train.recipe import Recipe


def run(
    recipe: Recipe,
    *,
    registry: Registry,
    display: Display,
    resume: bool = False,
    dry_run: bool = False,
    explain: bool = False,
) -> Outcome:
    """Do what a recipe says.

    Args:
        display: shows rank 0's progress.
        resume: go on from the newest checkpoint of the run that is there.
        dry_run: show and prove everything, and train nothing.
        explain: tell what every choice became, and why.

    Raises:
        InputError, UnavailableError: the recipe can not be followed; nothing is lost.
        StoppedError: a signal came; the run is saved and can be resumed.
        ZooError: it failed.
    """
    directory = RunDirectory(Path(recipe.out))
    if resume and (result := directory.finished()):
        display.say(f"{directory.path} is finished already: {result['ending']}.")
        return Outcome.of(directory.path, result)
    check_processes(recipe.devices, recipe.num_nodes)
    if not dry_run and not others_run():  # else the first of them may have begun to write
        directory.check_same(recipe) if resume else directory.check_new()
    check_plugins(recipe, registry)
    resolutions = compose(recipe, registry, display.say)
    recipe = with_plugins(recipe, registry)
    for resolution in resolutions if explain else ():
        display.say(str(resolution))
    device = choose_device(recipe.device)
    fabric = make_fabric(recipe, device, _precision(recipe, registry))
    fabric.launch()
    with Fence.connect(fabric) as fence, StopSignals() as signals:
        assembly = Assembly(recipe, directory, registry, fabric, fence, signals, display)
        return assembly.run(resume=resume, dry_run=dry_run)


def _precision(recipe: Recipe, registry: Registry) -> Precision:
    if recipe.precision.use == "auto":
        return FP32_TRUE  # whatever is stored: without autocast Fabric does nothing
    precision = load_precision(recipe.precision.use, recipe.precision.options, registry)
    if recipe.activation_checkpointing != "none" and not precision.recomputes:
        raise InputError(
            f"precision {precision.name!r} and activation_checkpointing {recipe.activation_checkpointing!r} do not go "
            "together: its layers can not be computed a second time.",
            fix="Take activation_checkpointing: none, or --precision bf16-true.",
        )
    return precision
