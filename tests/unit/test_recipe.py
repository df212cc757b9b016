"""Recipes: everything that is wrong is said at once, with who said it; what is written reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zoo.errors import InputError
from zoo.train.recipe import Recipe
from zoo.train.recipe_file import Draft, parse_setting, read_recipe, recipe_values, write_recipe

NEEDED: dict[str, Any] = {"model": "gpt2", "data": "train.jsonl", "out": "run"}


def draft(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Draft:
    path = tmp_path / name
    path.write_text(text)
    return read_recipe(path)


def test_written_reads_back(tmp_path: Path) -> None:
    """Guards a run that is repeated from its directory: no key may be lost, no number become a string."""
    values = {
        "adapter": {"use": "lora", "r": 4, "targets": ["attn.q"]},
        "lr": 1e-5,
        "loggers": ["tensorboard", {"use": "wandb", "project": "no"}],
        "sample_prompts": ["yes: it is", "1e-5"],
    }
    recipe = Draft({**NEEDED, **values}).finish()
    write_recipe(recipe, tmp_path / "out.yaml")
    assert read_recipe(tmp_path / "out.yaml").finish() == recipe
    assert set(recipe_values(recipe)) == set(Recipe.model_fields)


def test_yaml_1_2(tmp_path: Path) -> None:
    """Guards against YAML 1.1, where 1e-5 is a string and no a boolean."""
    values = draft(tmp_path, "lr: 1e-5\nout: no\nmodel: on\ndata: 012x\n").values
    assert values == {"lr": 1e-5, "out": "no", "model": "on", "data": "012x"}
    assert [parse_setting(f"x={text}")[1] for text in ("1e-5", "no", "true", "[a, 2]")] == [1e-5, "no", True, ["a", 2]]


def test_extends_and_settings(tmp_path: Path) -> None:
    """Guards who wins: the command line over the file, the file over what it extends."""
    draft(tmp_path, "model: gpt2\ndata: a.jsonl\nout: run\nadapter: {use: lora, r: 4}\nlr: 1\n", "base.yaml")
    changed = draft(tmp_path, "extends: base.yaml\nlr: 2\nadapter:\n  alpha: 32\n")
    changed.put(("adapter", "r"), 16, "--set adapter.r=16")
    recipe = changed.finish()
    assert (recipe.lr, recipe.adapter.use, recipe.adapter.options) == (2.0, "lora", {"r": 16, "alpha": 32})
    other = draft(tmp_path, "extends: base.yaml\nadapter: {use: ia3}\n", "other.yaml")
    assert other.finish().adapter.options == {}  # another component takes none of the former's options


def test_a_setting_keeps_the_short_form() -> None:
    """Guards --adapter lora --set adapter.r=16, where the name must not be lost."""
    for given in ({}, {"adapter": "lora"}):
        made = Draft()
        for key, value in {**NEEDED, **given}.items():
            made.put((key,), value, f"--{key}")
        made.put(("adapter", "r"), 16, "--set")
        assert recipe_values(made.finish())["adapter"] == {"use": "lora", "r": 16}


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Guards against one fault per attempt, and against faults without a place."""
    made = draft(tmp_path, "model: gpt2\ndata: x\nbatch_sise: 3\nepochs: -1\nadapter: {r: 8}\n")
    made.put(("schedule",), 3, "--set schedule=3")
    with pytest.raises(InputError) as caught:
        made.finish()
    message = str(caught.value)
    assert "recipe.yaml:3: no key of a recipe is named 'batch_sise'. Did you mean 'batch_size'?" in message
    assert "recipe.yaml:4: epochs: input should be greater than 0, not -1." in message
    assert "--set schedule=3: " in message
    assert "out is missing: give --out." in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 10, "devices": 3}, "batch_size 10 does not divide into 3 processes"),
        ({"batch_size": 8, "micro_batch_size": 3}, "batch_size 8 is no multiple of micro_batch_size 3"),
        ({"batch_size": 8, "devices": 2, "micro_batch_size": 8}, "share of the batch, 4, is no multiple"),
        ({"task": "pretrain"}, "pretraining has no natural end"),
        ({"spec": {"n_layers": 2}}, "spec is for pretrain"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"strategy": "horovod"}, "'ddp'"),
    ],
)
def test_values_that_do_not_go(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Draft({**NEEDED, **values}).finish()


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n", "is no recipe"), ("a: [\n", "is no YAML"), ("extends: recipe.yaml\n", "extends itself")],
)
def test_files_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        draft(tmp_path, text)


def test_missing_file_and_setting(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can not read the recipe .*No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="--set KEY=VALUE"):
        parse_setting("adapter.r 16")
