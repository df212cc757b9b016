"""A model learns a small task, from data to answers, in minutes on a laptop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.api import load
from zoo.generate.reply import Reply
from zoo.language_model import LanguageModel
from zoo.registry import Registry
from zoo.runs.outcome import Display, Outcome
from zoo.runs.quickstart_data import write_data
from zoo.runs.run import run
from zoo.text.prompts import PromptStyle, read_prompt_style
from zoo.train.recipe import Recipe

MODEL = "smollm2-135m-instruct"
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answers:
    """What a model says to the rows of the test set."""

    texts: Sequence[str]
    expected: Sequence[str]

    @property
    def exact(self) -> float:
        """The part that is exactly as expected."""
        right = sum(a == b for a, b in zip(self.texts, self.expected, strict=True))
        return right / len(self.expected)


@dataclass(frozen=True)
class Quickstart:
    """What came out."""

    prompts: Sequence[str]
    before: Answers
    after: Answers
    outcome: Outcome
    losses: tuple[float, float]
    """On the validation set, before and after."""


def quickstart(directory: Path, *, model: str, registry: Registry, display: Display, steps: int) -> Quickstart:
    """Train on generated data, and answer rows that are not in it, before and after.

    Args:
        directory: for the data and the run; must be new.
    """
    paths = write_data(directory / "data")
    rows = [json.loads(line) for line in paths["test"].read_text(encoding="utf-8").splitlines()]
    prompts, expected = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    recipe = Recipe.model_validate(
        {
            "model": model,
            "data": str(paths["train"]),
            "val_data": str(paths["val"]),
            "out": str(directory / "run"),
            "adapter": {"use": "lora", "r": 8, "targets": ["attn.q", "attn.v", "mlp.up", "mlp.down"]},
            "lr": 1e-3,
            "batch_size": 8,
            "max_steps": steps,
            "eval_every": max(1, steps // 3),
        }
    )
    display.say(f"answering {len(prompts)} rows with the model as it is")
    before = Answers(_answers(load(model, registry=registry), prompts), expected)
    outcome = run(recipe, registry=registry, display=display)
    assert outcome.trained is not None and outcome.val_loss is not None
    display.say(f"answering {len(prompts)} rows with what it has learnt")
    trained = load(model, adapters=[outcome.trained], registry=registry)
    after = Answers(_answers(trained, prompts, read_prompt_style(outcome.trained)), expected)
    lines = (
        json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    first = next(line["val_loss"] for line in lines if "val_loss" in line)
    return Quickstart(prompts, before, after, outcome, (first, outcome.val_loss))


def _answers(lm: LanguageModel, prompts: Sequence[str], style: PromptStyle | None = None) -> list[str]:
    if style is not None:
        lm.use_tokenizer(style.on(lm.tokenizer))
    requests = [
        lm.request([{"role": "user", "content": prompt}], temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
        for prompt in prompts
    ]
    outcomes = dict(lm.run(requests))
    replies = [outcomes[number] for number in range(len(prompts))]
    return [reply.text.strip() if isinstance(reply, Reply) else f"({reply})" for reply in replies]
