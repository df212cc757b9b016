"""``zoo evaluate`` on what ``zoo finetune`` and ``zoo pretrain`` left; and chat and merge with a run for an adapter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import zoo
from tests import reference
from zoo.cli.main import cli
from zoo.errors import InputError
from zoo.text.prompts import read_prompt_style

FAST = {**os.environ, "OMP_NUM_THREADS": "1"}
PLACE = ("--device", "cpu", "--precision", "32-true")


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=FAST, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def inside(*arguments: object) -> Result:
    """In this process: torch is imported already."""
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done


def write(path: Path, n: int, seed: int) -> Path:
    draw = random.Random(seed)
    rows = [{"prompt": f"{i} and " + "ab" * draw.randint(1, 9), "completion": f" {i % 7}!"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_loss(run_directory: Path) -> float:
    lines = map(json.loads, (run_directory / "metrics.jsonl").read_text().splitlines())
    loss: float = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    return loss


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``val.jsonl`` and ``run``: an adapter in the style chatml, which is not the model's."""
    folder = tmp_path_factory.mktemp("evaluate")
    reference.save_tiny_chat_model(folder / "model", max_position_embeddings=128)
    write(folder / "train.jsonl", 40, 0)
    write(folder / "val.jsonl", 9, 1)
    run("finetune", folder / "model", "--data", folder / "train.jsonl", "--val-data", folder / "val.jsonl",
        "--out", folder / "run", "--prompt-style", "chatml", "--max-steps", 10, "--batch-size", 8, "--lr", 0.01,
        "--set", "adapter.targets=[all-linear]", *PLACE)  # fmt: skip
    return folder


def test_the_loss_is_the_one_that_training_showed(finetuned: Path) -> None:
    """Guards the prompt style, the mask and the weights of the run, all of which the number depends on."""
    base = ("evaluate", finetuned / "model", "--data", finetuned / "val.jsonl", *PLACE)
    done = run(*base, "--adapter", finetuned / "run", "--json", "--exact-match", "--max-new-tokens", 4)
    found = json.loads(done.stdout)
    assert found["loss"] == pytest.approx(last_loss(finetuned / "run"), rel=1e-5)
    assert (found["style"], found["format"], found["counts"]["n_kept"]) == ("chatml", "completion", 9)
    assert found["exact"]["n_asked"] == 9
    assert "prompt style chatml" in done.stderr
    other = inside(*base, "--adapter", finetuned / "run", "--prompt-style", "plain", "--json")
    assert json.loads(other.stdout)["style"] == "plain"
    assert "prompt style plain, as given; the adapter adapter-0 was trained with chatml" in other.stderr
    assert json.loads(other.stdout)["loss"] > found["loss"] + 0.1


def test_what_is_printed(finetuned: Path) -> None:
    base = ("evaluate", finetuned / "model", "--data", finetuned / "val.jsonl", *PLACE)
    shown = inside(*base, "--max-samples", 4, "--exact-match", "--max-new-tokens", 2).stdout
    facts = {line.split("  ")[-2].strip(): line.split("  ")[-1] for line in shown.splitlines()}
    assert facts["data"].endswith("its first 4 samples: completion, 4 examples, prompt style model")
    assert facts["exact match"] == "0 of 4 (0.0%); 4 answers did not end within --max-new-tokens"
    assert set(facts) == {"data", "loss", "perplexity", "bits per byte", "exact match"}


def test_chat_speaks_as_the_adapter_learnt(finetuned: Path) -> None:
    """Guards ``chat MODEL --adapter RUN``: the style's prompt, and its stop string."""
    said = run("chat", finetuned / "model", "--adapter", finetuned / "run", "--prompt", "3 and abab",
               "--temperature", 0, "--max-new-tokens", 12, *PLACE).stdout  # fmt: skip
    lm = zoo.load(finetuned / "model", device="cpu", precision="32-true", adapters=[finetuned / "run" / "adapter"])
    style = read_prompt_style(finetuned / "run" / "adapter")
    assert style is not None
    text = style.render([{"role": "user", "content": "3 and abab"}], lm.tokenizer)
    assert "<|im_start|>" in text
    expected = lm.generate(text, temperature=0.0, max_new_tokens=12, stop=style.stop)
    assert said.encode(errors="replace") == f"{expected}\n".encode(errors="replace")


def test_a_run_is_merged(finetuned: Path, tmp_path: Path) -> None:
    """Guards ``merge MODEL RUN OUT``, and the style on its way into a model that needs no adapter."""
    inside("merge", finetuned / "model", finetuned / "run", tmp_path / "out", "--device", "cpu")
    base = ("--data", finetuned / "val.jsonl", "--json", *PLACE)
    found = json.loads(inside("evaluate", tmp_path / "out", *base).stdout)
    assert found["style"] == "chatml"
    assert found["loss"] == pytest.approx(last_loss(finetuned / "run"), rel=1e-4)


def test_a_whole_model_keeps_its_style(finetuned: Path, tmp_path: Path) -> None:
    """Guards a model that was trained to end its answers in text, which it then is to be stopped at."""
    out = tmp_path / "run"
    run("finetune", finetuned / "model", "--data", finetuned / "val.jsonl", "--out", out, "--prompt-style", "chatml",
        "--adapter", "full", "--max-steps", 2, "--batch-size", 4, *PLACE)  # fmt: skip
    lm = zoo.load(out, device="cpu")
    request = lm.request([{"role": "user", "content": "Hi"}])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.tokenizer.decode(request.prompt_ids) == text
    assert request.stop == ("<|im_end|>",)
    assert lm.tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == text


def test_a_pretrained_run_is_a_model(tmp_path: Path) -> None:
    """Guards MODEL as a run, and token files with the tokenizer and the windows that the run had."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} und {n + 1} wären {2 * n + 1}.\n" for n in range(200)), encoding="utf-8")
    spec = {"n_layers": 1, "n_heads": 2, "d_model": 16, "n_kv_heads": 2, "d_ffn": 32}
    changed = [part for key, value in spec.items() for part in ("--set", f"spec.{key}={value}")]
    out = tmp_path / "run"
    run("pretrain", "gpt2", "--data", text, "--tokenizer", "char", "--out", out, "--max-seq-len", 32,
        "--device", "cpu", "--max-steps", 6, "--batch-size", 8, "--lr", 0.01, *changed)  # fmt: skip
    found = json.loads(inside("evaluate", out, "--data", out / "tokens", "--json", *PLACE).stdout)
    assert found["loss"] == pytest.approx(last_loss(out), rel=1e-5)
    n_characters = len(text.read_text(encoding="utf-8"))
    assert n_characters // 10 - 1 <= found["n_tokens"] <= n_characters // 10
    assert found["n_bytes"] > found["n_tokens"]  # ä takes two
    whole = inside("evaluate", out, "--data", text, "--stride", 8, "--json", *PLACE)
    assert json.loads(whole.stdout)["n_tokens"] == n_characters - 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--compile",), "--compile serves one text at a time"),
        (("--max-new-tokens", "3"), "without --exact-match"),
        (("--max-samples", "0"), "--max-samples must be at least 1, not 0"),
        (("--stride", "-1"), "--stride must be at least 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        ((), "there is no file or directory 'no/data.jsonl'"),
    ],
)
def test_bad_options(options: tuple[str, ...], said: str) -> None:
    """Guards against a model that is loaded, or downloaded, for nothing."""
    arguments: list[Any] = ["evaluate", "no/model", "--data", "no/data.jsonl", *options]
    with pytest.raises(InputError, match=said):
        cli.main(arguments, standalone_mode=False)
