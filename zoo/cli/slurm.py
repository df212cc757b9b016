"""``zoo slurm ... -- finetune ...``: a SLURM job that trains, and goes on when its time is over."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import ZooCommand
from zoo.cli.recipe_options import make_recipe
from zoo.commands import COMMANDS
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.train.recipe import Recipe

TRAINING = ("finetune", "pretrain")
AT_LEAST_1 = click.IntRange(min=1)


@click.command(cls=ZooCommand, context_settings={"allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND ...")
@click.option("--nodes", type=AT_LEAST_1, default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=AT_LEAST_1, help="GPUs of each, with a process for each.")
@click.option("--ntasks-per-node", type=AT_LEAST_1, help="Processes on each. [default: --gpus-per-node, else 1]")
@click.option("--cpus-per-task", type=AT_LEAST_1, help="Cores of each process.")
@click.option("--time", help="As sbatch takes it: 4:00:00, 2-12.")
@click.option("--partition")
@click.option("--account")
@click.option("--job-name", help="[default: the name of the run's directory]")
@click.option("--output", metavar="FILE", default="slurm-%x-%j.out", show_default=True, help="What is said.")
@click.option("--signal", default="USR1@120", show_default=True, help="Sent so many seconds before the time is over.")
@click.option("--requeue/--no-requeue", default=True, show_default=True, help="Go on in a new allocation after that.")
@click.option("--sbatch", multiple=True, metavar="KEY=VALUE", help="Any other option of sbatch: qos=long, exclusive.")
@click.option("--srun", multiple=True, metavar="KEY=VALUE", help="An option of srun: cpu-bind=cores.")
@click.option("--setup", multiple=True, metavar="LINE", help="A line of shell before the command: module load cuda.")
@click.option("--submit", "submits", is_flag=True, help="Hand it to sbatch, in place of printing it.")
def command(arguments: tuple[str, ...], ntasks_per_node: int | None, submits: bool, **options: Any) -> None:
    """Write a SLURM job for a training command; without --submit it is printed.

    The command gets --devices and --num-nodes from the options, and --resume if its run is there already: before the
    time is over SLURM sends a signal, the run is saved, the job goes back into the queue and then goes on. The
    command's options are checked now.

        zoo slurm --gpus-per-node 4 --time 4:00:00 -- finetune MODEL --data FILE --out runs/mine
    """
    from zoo.runs.slurm import SlurmJob, submit

    tasks = ntasks_per_node or options["gpus_per_node"] or 1
    recipe, complete = _checked(arguments, devices=tasks, num_nodes=options["nodes"])
    _check_directory(options["output"], recipe)
    name = options.pop("job_name") or re.sub(r"[^\w.-]+", "-", Path(recipe.out).name)
    job = SlurmJob(arguments=complete, run=recipe.out, job_name=name, tasks_per_node=tasks, **options)
    click.echo(submit(job.script()) if submits else job.script(), nl=submits)


def _checked(arguments: tuple[str, ...], *, devices: int, num_nodes: int) -> tuple[Recipe, list[str]]:
    """The recipe of a training command, and the command with all that the script has to say."""
    name, *rest = arguments or ("",)
    if name not in TRAINING:
        raise InputError(
            f"a job runs {' or '.join(TRAINING)}, not {name!r}.", fix="Write: zoo slurm OPTIONS -- finetune MODEL ..."
        )
    module, _, attribute = COMMANDS[name][0].partition(":")
    training: click.Command = getattr(import_module(module), attribute)
    given = training.make_context(name, list(rest), parent=click.get_current_context()).params
    for option, by in (("devices", "--ntasks-per-node"), ("num_nodes", "--nodes"), ("resume", "the script itself")):
        if given[option]:
            raise InputError(f"--{option.replace('_', '-')} of the command is given by {by}.", fix="Leave it out.")
    settings, recipe_file = given.pop("settings"), given.pop("recipe_file")
    flags = {key: value for key, value in given.items() if key not in ("resume", "dry_run", "explain", "as_json")}
    flags |= {"devices": devices, "num_nodes": num_nodes} | ({"adapter": "full"} if name == "pretrain" else {})
    recipe = make_recipe(name, flags, settings, recipe_file, resume=False)
    if (recipe.devices, recipe.num_nodes) != (devices, num_nodes):
        raise InputError("--set devices and --set num_nodes are given by --ntasks-per-node and --nodes.")
    out = [] if flags.get("out") else ["--out", recipe.out]
    return recipe, [name, *rest, *out, "--devices", str(devices), "--num-nodes", str(num_nodes)]


def _check_directory(output: str, recipe: Recipe) -> None:
    """What would be refused when the job runs, hours later."""
    from zoo.runs.directory import RunDirectory

    directory = RunDirectory(Path(recipe.out))
    directory.check_same(recipe) if directory.recipe.is_file() else directory.check_new()
    if directory.path.resolve() in Path(output).resolve().parents:
        raise InputError(
            f"--output {output} is in the run's directory {recipe.out}, which the run makes.", fix="Give another place."
        )
