"""The flags of ``finetune`` and ``pretrain``: each is a key of the recipe. Free of pydantic and torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.train.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
CHECKPOINTING = ("none", "block", "selective")

DATA = {
    "data": click.option("--data", metavar="FILE", help="A file, a directory, a data set's name or hf:org/name."),
    "val_data": click.option("--val-data", metavar="FILE", help="Validation data. [default: a part of --data]"),
    "val_fraction": click.option("--val-fraction", type=float, help="Part that is held out. [default: 0.05]"),
    "max_seq_len": click.option("--max-seq-len", type=int, help="Tokens of a row. [default: the model's context]"),
}
EXAMPLES = {
    "prompt_style": click.option(
        "--prompt-style", metavar="NAME", help="See: zoo list prompts. [default: the model's]"
    ),
    "train_on_prompt": click.option("--train-on-prompt", is_flag=True, default=None, help="Learn the prompts too."),
    "packing": click.option("--packing", is_flag=True, default=None, help="Several samples in a row, kept apart."),
}
METHOD = {
    "adapter": click.option("--adapter", metavar="NAME", help="lora, llama-adapter, full, ...: zoo list adapters."),
    "precision": click.option("--precision", help="See: zoo list precisions. [default: auto]"),
    "attention": click.option("--attention", help="See: zoo list attention. [default: auto]"),
    "quantize": click.option("--quantize", metavar="NAME", help="Of the frozen weights; see: zoo list quantizers."),
    "activation_checkpointing": click.option(
        "--activation-checkpointing", type=click.Choice(CHECKPOINTING), help="Compute again instead of keeping."
    ),
    "compile": click.option("--compile", is_flag=True, default=None, help="Compile the model's blocks."),
}
PLACE = {
    "device": click.option("--device", help="auto, cpu, cuda, cuda:1, mps. [default: auto]"),
    "devices": click.option("--devices", type=int, help="Processes on each machine. [default: 1]"),
    "num_nodes": click.option("--num-nodes", type=int, help="Machines. [default: 1]"),
    "strategy": click.option("--strategy", type=click.Choice(STRATEGIES), help="How they divide the work."),
}
BATCHES = {
    "batch_size": click.option("--batch-size", type=int, help="Rows of an optimizer step, in all. [default: 16]"),
    "micro_batch_size": click.option("--micro-batch-size", type=int, help="Rows computed at a time. [default: all]"),
}
LENGTH = {
    "max_steps": click.option("--max-steps", type=int, help="Optimizer steps."),
    "epochs": click.option("--epochs", type=float, help="Times that all data is seen. [finetune: 3]"),
    "max_tokens": click.option("--max-tokens", type=int, help="Tokens that are seen."),
    "max_minutes": click.option("--max-minutes", type=float, help="Time."),
}
OPTIMIZER = {
    "lr": click.option("--lr", type=float, help="Highest learning rate. [default: what suits the adapter]"),
    "schedule": click.option("--schedule", help="cosine, linear, constant or wsd. [default: cosine]"),
    "warmup_steps": click.option("--warmup-steps", type=int, help="[default: a tenth of the steps, at most 100]"),
    "weight_decay": click.option("--weight-decay", type=float, help="[default: 0.01]"),
    "grad_clip": click.option("--grad-clip", type=float, help="Largest norm of the gradients; 0 is off. [default: 1]"),
    "seed": click.option("--seed", type=int, help="[default: 42]"),
}
WATCHING = {
    "eval_every": click.option("--eval-every", type=int, metavar="STEPS", help="[default: a tenth of the run]"),
    "save_every": click.option("--save-every", type=int, metavar="STEPS", help="[default: as --eval-every]"),
    "keep": click.option("--keep", type=int, help="Checkpoints that stay, besides the best. [default: 2]"),
    "patience": click.option("--patience", type=int, help="End after so many evaluations without a better loss."),
    "log_every": click.option("--log-every", type=int, metavar="STEPS", help="[default: 1]"),
    "loggers": click.option("--logger", "loggers", multiple=True, help="tensorboard, wandb: zoo list loggers."),
    "sample_prompts": click.option(
        "--sample-prompt", "sample_prompts", multiple=True, metavar="TEXT", help="Answered at each evaluation."
    ),
}
OUT = {"out": click.option("--out", metavar="DIR", help="The run's directory. [default: runs/...]")}
GROUPS = (OUT, DATA, EXAMPLES, METHOD, BATCHES, LENGTH, OPTIMIZER, WATCHING, PLACE)

RUN_OPTIONS = (
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key: --set adapter.r=16."),
    click.option("--recipe", "recipe_file", metavar="FILE", type=click.Path(path_type=Path), help="Read a recipe."),
    click.option("--resume", is_flag=True, help="Go on with the run in --out, from its newest checkpoint."),
    click.option("--dry-run", is_flag=True, help="Check, show and prove everything, and train nothing."),
    click.option("--explain", is_flag=True, help="Tell what every choice became, and why."),
)


def recipe_options(*groups: Mapping[str, Callable[[Any], Any]]) -> Callable[[F], F]:
    """The flags of these groups, and those of every run."""

    def decorate(function: F) -> F:
        options = [option for group in groups for option in group.values()]
        for option in reversed([*options, *RUN_OPTIONS]):
            function = option(function)
        return function

    return decorate


def make_recipe(
    task: str, flags: dict[str, Any], settings: tuple[str, ...], recipe_file: Path | None, *, resume: bool
) -> Recipe:
    """The recipe that the command line asks for: a file, the flags on top, and then ``--set``.

    Raises:
        InputError: it says all that is wrong.
    """
    from zoo.runs.directory import RunDirectory
    from zoo.train.recipe_file import Draft, parse_setting, read_recipe, recipe_values

    if resume and recipe_file is None:
        if not flags.get("out"):
            raise InputError("--resume goes on with a run that --out names.", fix="Give --out DIR.")
        before = RunDirectory(Path(flags["out"])).read()
        draft = Draft(recipe_values(before), {})
    else:
        draft = Draft() if recipe_file is None else read_recipe(recipe_file)
    draft.values.setdefault("task", task)
    if draft.values["task"] != task:
        raise InputError(f"this is a recipe to {draft.values['task']}.", fix=f"zoo {draft.values['task']} follows it.")
    for key, value in flags.items():
        if value is not None and value != ():
            draft.put((key,), list(value) if isinstance(value, tuple) else value, f"--{key.replace('_', '-')}")
    for setting in settings:
        key_path, value = parse_setting(setting)
        draft.put(key_path, value, f"--set {setting}")
    if "out" not in draft.values and isinstance(draft.values.get("model"), str):
        draft.values["out"] = _default_out(task, draft.values)
    return draft.finish()


def _default_out(task: str, values: dict[str, Any]) -> str:
    adapter = values.get("adapter", "lora" if task == "finetune" else "full")
    name = adapter.get("use", "") if isinstance(adapter, dict) else adapter
    model = Path(str(values["model"])).name.replace(":", "-")
    return f"runs/{task}-{model}" + (f"-{name}" if task == "finetune" else "")
