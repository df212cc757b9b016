"""FP8 from the command line: listed with what each precision needs, refused where it can not run, trained emulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests import reference
from tests.plugin_environment import Environment
from zoo.train.metrics import MEASURED

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-transformer-engine"
NOT_INSTALLED = "needs transformer-engine>=2.0 (not installed)"
FIX = 'python -m pip install --no-build-isolation "transformer-engine[pytorch]>=2.0"'
COMMON = ("--device", "cpu", "--batch-size", "4", "--lr", "0.01", "--seed", "3", "--precision", "fp8-emulated")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(PLUGIN)
    return environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8") / "model"
    reference.save_tiny_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}: red", "completion": " red!" * (1 + n % 3)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def val_losses(run: Path) -> list[float]:
    return [line["val_loss"] for line in metrics(run) if "val_loss" in line]


def test_they_are_listed_and_refused(environment: Environment, model: Path, data: Path) -> None:
    """Guards against a bare ImportError, and another precision in its place."""
    rows = {row["name"]: row for row in environment.zoo_json("list", "precisions")}
    assert rows["fp8-emulated"]["state"] == "unprobed" and not rows["fp8-emulated"]["reasons"]
    for name in ("transformer-engine", "transformer-engine-float16"):
        assert (rows[name]["state"], rows[name]["origin"]) == ("unavailable", "zoo-transformer-engine 0.1.0")
        assert rows[name]["reasons"][0] == NOT_INSTALLED and FIX in rows[name]["fix"]
        refused = environment.zoo(
            "finetune", model, "--data", data, "--out", "refused", "--precision", name, exit_code=3
        )
        assert f"precision '{name}' is unavailable: needs transformer-engine" in refused.stderr
        assert FIX in refused.stderr and "Traceback" not in refused.stderr
    refused = environment.zoo("generate", model, "--prompt", "Hi", "--precision", "fp8-emulated", exit_code=3)
    assert "precision 'fp8-emulated' is for training. Take bf16-true, or 32-true." in refused.stderr
    shown = environment.zoo_json("show", "precision", "fp8-emulated")
    assert shown["options"]["amax_history_len"] == 1024 and shown["options"]["skip"] == ["head", "*lm_head"]


def test_finetuning(environment: Environment, model: Path, data: Path, tmp_path: Path) -> None:
    """Guards options on their way to the layers, what is said of the layers, and what a checkpoint holds."""
    run = tmp_path / "run"
    options = ("--set", "precision.margin=1", "--set", "precision.amax_history_len=4", "--eval-every", "4")
    said = environment.zoo(
        "finetune", model, "--data", data, "--out", run, *COMMON, *options, "--max-steps", "8"
    ).stderr
    assert "linears in FP8 with delayed scaling (max of 4 steps, margin 1), E4M3 forward, E5M2 for gradients" in said
    assert "head stays as it is: named by skip" in said
    assert val_losses(run)[-1] < val_losses(run)[0]
    recipe = YAML(typ="safe").load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["precision"] == {"use": "fp8-emulated", "margin": 1, "amax_history_len": 4}
    step = max((run / "checkpoints").iterdir())
    histories = [load_file(path) for path in step.rglob("*.safetensors")]
    (history,) = [tensors[name] for tensors in histories for name in tensors if name.endswith("amax_history")]
    assert history.shape[0] == 4 and (history[1:] > 0).any(dim=1).all() and not history[0].any()


def test_going_on_to_the_bit(environment: Environment, model: Path, data: Path, tmp_path: Path) -> None:
    """Guards factors that a checkpoint leaves out."""
    common = ("finetune", model, "--data", data, *COMMON, "--adapter", "full", "--lr", "0.001", "--eval-every", "3")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    environment.zoo(*common, "--out", straight, "--max-steps", "6", "--schedule", "constant")
    environment.zoo(*common, "--out", resumed, "--max-steps", "3", "--schedule", "constant")
    recipe = (resumed / "recipe.yaml").read_text(encoding="utf-8").replace("max_steps: 3", "max_steps: 6")
    (resumed / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (resumed / "result.json").unlink()
    environment.zoo("finetune", "--out", resumed, "--resume")
    assert metrics(resumed)[-4:] == metrics(straight)[-4:]


def test_pretraining(environment: Environment, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    shape = ("spec.n_layers=2", "spec.d_model=32", "spec.n_heads=2", "spec.d_ffn=64")
    sets = [part for setting in shape for part in ("--set", setting)]
    done = environment.zoo(
        "pretrain", "gpt2", "--data", text, "--tokenizer", "byte", "--out", tmp_path / "run", "--max-seq-len", "32",
        "--max-steps", "20", *COMMON, *sets, "--set", "precision.scaling=current",
    )  # fmt: skip
    assert "12 of 13 linears in FP8 with current scaling" in done.stderr
    losses = val_losses(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.5


def test_what_can_not_be(environment: Environment, model: Path, data: Path) -> None:
    common = ("finetune", model, "--data", data, "--out", "never", *COMMON)
    said = environment.zoo(*common, "--set", "precision.margins=1", exit_code=2)
    assert "no option of precision 'fp8-emulated' is named 'margins'. Did you mean 'margin'?" in said.stderr
    said = environment.zoo(*common, "--set", "precision.scaling=mxfp8", "--set", "precision.margin=1", exit_code=2)
    assert "margin is an option of delayed scaling, and the scaling is mxfp8" in said.stderr
    said = environment.zoo(*common, "--precision", "bf16-true", "--set", "precision.margin=1", exit_code=2)
    assert "precision 'bf16-true' has no option 'margin': it has none" in said.stderr


def test_its_own_tests(environment: Environment) -> None:
    """Guards the plugin as it is installed."""
    ran = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=", PLUGIN / "tests")
    assert " passed" in ran.stdout and " failed" not in ran.stdout
    where = environment.run("-c", "import zoo_transformer_engine; print(zoo_transformer_engine.__file__)").stdout
    assert Path(where).is_relative_to(environment.directory)
