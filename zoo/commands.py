"""zoo's own commands: where each is and its help line, so that ``--help`` imports none and loads no registry."""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("zoo.cli.quickstart:command", "See a model learn a task, in five minutes on two cores."),
    "list": ("zoo.cli.list:command", "What is registered: models, families, attention backends, ..."),
    "show": ("zoo.cli.show:command", "Everything about one model or component."),
    "plugins": ("zoo.cli.plugins:command", "Installed plugins and what became of them."),
    "doctor": ("zoo.cli.doctor:command", "This machine: versions, devices, what can not be used and why."),
    "download": ("zoo.cli.download:command", "Fetch a model's weights; without a name, list what can be had."),
    "convert": ("zoo.cli.convert:command", "Write a model as a Hugging Face directory."),
    "prepare": ("zoo.cli.prepare:command", "Check, count and split data for training; text becomes token files."),
    "finetune": ("zoo.cli.finetune:command", "Train an adapter, or a whole model, on examples."),
    "pretrain": ("zoo.cli.pretrain:command", "Train a model on text, from random weights."),
    "slurm": ("zoo.cli.slurm:command", "Write, or submit, a SLURM job that trains, and goes on when it is stopped."),
    "evaluate": ("zoo.cli.evaluate:command", "Say how good a model is on data: perplexity, exact answers."),
    "generate": ("zoo.cli.generate:command", "Continue a prompt."),
    "merge": ("zoo.cli.merge:command", "Compute an adapter into the weights of its model."),
    "chat": ("zoo.cli.chat:command", "Talk with a model."),
}
"""In the order in which a user meets them."""
