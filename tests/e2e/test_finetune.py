"""``zoo finetune`` and ``zoo pretrain`` as a user runs them, on a tiny model: real processes, signals and files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import zoo
from tests import reference
from zoo.train.metrics import MEASURED

COLOURS = ("red", "green", "blue", "black", "white")
COMMON = ("--precision", "32-true", "--device", "cpu", "--max-seq-len", 64, "--lr", 0.01, "--seed", 3)
FAST = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune") / "model"
    reference.save_tiny_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of different lengths, so that padding and the counts of steps differ."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    draw = random.Random(0)
    rows = []
    for number in range(60):
        colour = draw.choice(COLOURS)
        rows.append({"prompt": f"{number}: {colour}" * draw.randint(1, 2), "completion": f" {colour}!"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "zoo", *map(str, arguments)]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=FAST, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """What is the same whenever a run is repeated."""
    lines = map(json.loads, (run_directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def losses(run_directory: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in metrics(run_directory) if key in line]


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, with dropout."""
    out = tmp_path_factory.mktemp("run") / "straight"
    run("finetune", model, "--data", data, "--out", out, "--max-steps", 12, "--batch-size", 4, *COMMON,
        "--eval-every", 4, "--set", "adapter.dropout=0.1")  # fmt: skip
    return out


def test_a_run_learns_and_says_so(finished: Path, model: Path) -> None:
    """Guards against a run that trains nothing, and an adapter that nobody else reads."""
    validation = losses(finished, "val_loss")
    assert validation[-1] < validation[0] - 0.05
    result = json.loads((finished / "result.json").read_text())
    assert (result["step"], result["ending"]) == (12, "all 12 steps are done")
    assert result["val_loss"] == pytest.approx(validation[-1])
    assert "<svg" in (finished / "report.html").read_text()
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    theirs = peft.PeftModel.from_pretrained(base, finished / "adapter").eval()
    ours = zoo.load(model, precision="32-true", device="cpu", adapters=[finished / "adapter"])
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    answers = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {answer["step"] for answer in answers} == {0, 4, 8, 12}


def test_the_recipe_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    """Guards a recipe that leaves something out; and a finished run that is begun again."""
    run("finetune", "--recipe", finished / "recipe.yaml", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(finished)
    done = run("finetune", "--out", finished, "--resume")
    assert "finished already" in done.stderr


def kill_when(step: int, run_directory: Path, arguments: Sequence[object], how: signal.Signals) -> int:
    """Start a run, send it a signal once it has logged a step, and wait for its end."""
    process = subprocess.Popen(command(*arguments), env=FAST, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 240
    path = run_directory / "metrics.jsonl"
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and f'{{"step": {step},' in path.read_text():
            os.killpg(process.pid, how) if how == signal.SIGKILL else process.send_signal(how)
            break
        time.sleep(0.01)
    process.communicate(timeout=240)
    return process.returncode


@pytest.mark.parametrize("devices", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(
    devices: int, model: Path, data: Path, tmp_path: Path, finished: Path
) -> None:
    """Guards resuming to the bit: weights, optimizer, random generators, data, and the lines of the metrics."""
    options = ("finetune", model, "--data", data, "--max-steps", 12, "--batch-size", 4, *COMMON, "--eval-every", 4,
               "--set", "adapter.dropout=0.1", "--devices", devices)  # fmt: skip
    straight = finished
    if devices > 1:
        straight = tmp_path / "straight"
        run(*options, "--out", straight)
    out = tmp_path / "killed"
    assert kill_when(7, out, (*options, "--out", out), signal.SIGKILL) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    done = run("finetune", "--out", out, "--resume")
    assert "going on from step 4" in done.stderr
    assert metrics(out) == metrics(straight)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (
        straight / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_sigterm_saves_and_exits_75(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards preemption: the step is saved, nothing is said to be finished, and resuming goes on right there."""
    out = tmp_path / "run"
    options = ("finetune", model, "--data", data, "--out", out, "--epochs", 200, "--batch-size", 4, *COMMON,
               "--eval-every", 100000, "--save-every", 100000)  # fmt: skip
    assert kill_when(5, out, options, signal.SIGTERM) == 75
    assert not (out / "result.json").exists()
    steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
    assert len(steps) == 1
    assert steps[0] >= 5
    assert max(line["step"] for line in metrics(out)) == steps[0]


def test_micro_batches_and_processes_change_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards the loss's divisor: a mean of means depends on how a batch is divided."""
    common = ("finetune", model, "--data", data, "--max-steps", 5, "--batch-size", 8, *COMMON)
    ways = {"whole": (), "fours": ("--micro-batch-size", 2), "ddp": ("--devices", 2, "--micro-batch-size", 1)}
    ways["fsdp"] = ("--devices", 2, "--strategy", "fsdp")
    found = {}
    for name, options in ways.items():
        run(*common, *options, "--out", tmp_path / name)
        found[name] = losses(tmp_path / name) + losses(tmp_path / name, "val_loss")
    assert found["fours"] == pytest.approx(found["whole"], rel=1e-6)
    assert found["ddp"] == pytest.approx(found["whole"], rel=1e-6)
    assert found["fsdp"] == pytest.approx(found["whole"], rel=1e-6)
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "fsdp")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)
    assert len(found["whole"]) == 7


@pytest.mark.parametrize(("adapter", "rate"), [("llama-adapter", 0.03), ("llama-adapter-v2", 0.01), ("full", 0.002)])
def test_other_methods(adapter: str, rate: float, model: Path, data: Path, tmp_path: Path) -> None:
    """Guards that each trains, resumes from what it saved, and leaves what the commands take."""
    out = tmp_path / "run"
    options = ("finetune", model, "--data", data, "--out", out, *COMMON, "--lr", rate, "--adapter", adapter,
               "--batch-size", 4, "--max-steps", 60, "--save-every", 10, "--eval-every", 30)  # fmt: skip
    assert kill_when(12, out, options, signal.SIGKILL) == -signal.SIGKILL
    run("finetune", "--out", out, "--resume")
    validation = losses(out, "val_loss")
    assert validation[-1] < validation[0]
    result = json.loads((out / "result.json").read_text())
    assert Path(result["trained"]).name == ("model" if adapter == "full" else "adapter")
    if adapter == "full":
        run("generate", out / "model", "--prompt", "1: red", "--max-new-tokens", 4)
    else:
        run("generate", model, "--adapter", out / "adapter", "--prompt", "1: red", "--max-new-tokens", 4)


def test_pretraining(tmp_path: Path) -> None:
    """Guards the way from a text to a model that answers, with a vocabulary of its own."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(400)))
    out = tmp_path / "run"
    spec = {"n_layers": 2, "n_heads": 2, "d_model": 32, "n_kv_heads": 2, "d_ffn": 64}
    changed = [part for key, value in spec.items() for part in ("--set", f"spec.{key}={value}")]
    run("pretrain", "gpt2", "--data", text, "--tokenizer", "char", "--out", out, "--max-seq-len", 32,
        "--device", "cpu", "--max-steps", 40, "--batch-size", 8, "--lr", 0.01, *changed)  # fmt: skip
    validation = losses(out, "val_loss")
    assert validation[-1] < validation[0] - 0.5
    lm = zoo.load(out / "model", device="cpu")
    assert lm.spec.vocab_size == len(set(text.read_text()))
    n_trained = json.loads((out / "result.json").read_text())["n_trained"]
    assert n_trained == sum(p.numel() for p in lm.model.parameters()), "tied parameters count once"
    assert set(lm.generate("1 and ", max_new_tokens=8, temperature=0.0)) <= set(text.read_text())


def test_a_model_that_can_not_be_written_is_not_trained(tmp_path: Path) -> None:
    """Guards against hours of pretraining that end at the first save: GPT-2's config has no word for its biases."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 100)
    done = run("pretrain", "gpt2", "--data", text, "--tokenizer", "char", "--out", tmp_path / "run", "--max-steps", 4,
               "--max-seq-len", 16, "--set", "spec.n_layers=1", "--set", "spec.mlp_bias=false", code=2)  # fmt: skip
    assert "can not say mlp_bias = False" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_dry_run_leaves_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards --dry-run: it shows the sample with its mask, and writes no file."""
    fixed = ("finetune", model, "--data", data, "--out", tmp_path / "run", "--max-steps", 2, *COMMON, "--dry-run")
    done = run(*fixed, "--explain")
    assert "zoo: precision: 32-true\n" in done.stderr
    assert "zoo: attention: auto -> sdpa" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "!" in done.stderr.split("[[")[1].split("]]")[0]
    assert "every one of the" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--batch-size", 5, "--devices", 2), 2, "batch_size 5 does not divide into 2 processes"),
        (("--set", "adapter.rank=3"), 2, "no option of adapter 'lora' is named 'rank'"),
        (("--set", "lerning_rate=3"), 2, "lerning_rate"),
        (("--adapter", "lorra"), 2, "Did you mean 'lora'?"),
        (("--precision", "16-mixed"), 3, "needs cuda"),
        (("--precision", "16-true"), 3, "for inference"),
        (("--strategy", "deepspeed"), 3, "deepspeed"),
        (("--prompt-style", "alpacca"), 2, "Did you mean 'alpaca'?"),
        (("--max-seq-len", 100000), 2, "beyond the model's context"),
        (("--warmup-steps", 50), 2, "warmup_steps"),
        (("--logger", "tensorbord"), 2, "logger"),
    ],
)
def test_bad_options(
    options: tuple[object, ...], code: int, said: str, model: Path, data: Path, tmp_path: Path
) -> None:
    """Guards errors that come before any work, and name what is allowed."""
    base = ("finetune", model, "--data", data, "--max-steps", 4, "--device", "cpu", "--out", tmp_path / "run")
    done = run(*base, *options, code=code)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_resuming_what_is_not_there_or_has_changed(finished: Path, model: Path, data: Path, tmp_path: Path) -> None:
    done = run("finetune", model, "--out", tmp_path / "none", "--resume", code=2)
    assert "no run to go on with" in done.stderr
    again = run("finetune", model, "--data", data, "--out", finished, code=2)
    assert "holds a run" in again.stderr
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    changed = run("finetune", "--out", tmp_path / "copy", "--resume", "--lr", 0.5, code=2)
    assert "lr was 0.01 and is 0.5" in changed.stderr
