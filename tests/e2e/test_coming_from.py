"""docs/coming-from.md: every command and snippet of zoo that it names runs, or it is said here why it can not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import zoo
from tests import gguf_files, karpathy, reference

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8").replace("\\|", "|")
COMMANDS = re.findall(r"`(zoo [a-z][^`]*)`", TEXT)
NOT_RUN = {
    "zoo download stablelm-base-alpha-3b": "it is seven gigabytes",
    "zoo prepare alpaca": "the network; tests/e2e/test_prepare.py runs it on a server of its own",
    "zoo pretrain gpt2 --data input.txt --tokenizer char ...": "it is shortened; pretraining.md has all of it",
}
STANDS_FOR = {
    **dict.fromkeys(("stablelm-base-alpha-3b", "MODEL", "SRC", "runs/mine/model"), "tiny"),
    **{"model.gguf": "tiny.gguf", "FILE": "data.jsonl", "ADAPTER": "adapter", "DIR": "out", "DST": "out"},
}
"""Models that a test can have, in the place of those that are named."""
BRIEF = {"generate": "--max-new-tokens 2", "chat": "--max-new-tokens 2", "finetune": "--max-steps 1 --max-seq-len 64"}
SPECIAL = {
    "zoo pretrain MODEL --data FILE --tokenizer NAME": "pretrain pythia-14m --data text.txt --tokenizer byte "
    "--max-steps 1 --max-seq-len 16 --set spec.n_layers=1",
    "zoo finetune ... --packing --attention flash": "finetune tiny --data data.jsonl --packing --attention flash",
    "zoo generate ... --attention flash": "generate tiny --prompt a --attention flash",
    "zoo chat stablelm-tuned-alpha-3b --chat-template FILE": "chat tiny --chat-template template.jinja",
    "zoo finetune MODEL --data FILE --devices 8": "finetune tiny --data data.jsonl --devices 2 --max-steps 1 "
    "--max-seq-len 64",
}
"""Commands that need more than other names."""
ENDS = {"flash": (2, 3), "tiny.gguf": (0, 2)}
"""Exit codes of what names these: the plugin or its GPU is not there; the tiny file has no tokenizer to answer with."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model in each format, an adapter, and data."""
    place = tmp_path_factory.mktemp("coming")
    model = reference.save_tiny_chat_model(place / "tiny", max_position_embeddings=128)
    rows = "".join(f'{{"prompt": "{i}", "completion": "{i + 1}"}}\n' for i in range(40))
    (place / "data.jsonl").write_text(rows)
    (place / "text.txt").write_text("To be, or not to be. " * 200)
    (place / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    zoo.adapt(model, "lora", r=2).save(place / "adapter")
    gguf_files.write_llama(place / "tiny.gguf")
    return place


def run(place: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoo", *shlex.split(arguments)],
        cwd=place, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ZOO_DEVICE": "cpu"},
    )  # fmt: skip


def test_all_are_known() -> None:
    """Guards this file: a command of the guide that is neither run nor excused."""
    assert set(NOT_RUN) | set(SPECIAL) <= set(COMMANDS)
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(COMMANDS) if c not in NOT_RUN])
def test_commands(command: str, place: Path, tmp_path: Path) -> None:
    """Guards against a guide that sends people to commands and options that do not exist."""
    for name in ("tiny", "tiny.gguf", "adapter", "data.jsonl", "text.txt", "template.jinja"):
        (tmp_path / name).symlink_to(place / name)
    if "ckpt.pt" in command:
        karpathy.save_nanogpt(tmp_path / "ckpt.pt", karpathy.KarpathyGPT(karpathy.SIZES))
    line = SPECIAL.get(command)
    if line is None:
        words = shlex.split(command.removeprefix("zoo ").partition("|")[0])
        brief = BRIEF.get(words[0], "") if "--" not in words else ""
        line = shlex.join([STANDS_FOR.get(word, word) for word in words]) + f" {brief}"
    done = run(tmp_path, line)
    allowed = next((codes for word, codes in ENDS.items() if word in line.split()), (0,))
    assert done.returncode in allowed, f"zoo {line}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    if "| grep" in command:
        assert command.rsplit(maxsplit=1)[-1] in done.stdout


SNIPPETS = (
    'zoo.build("pythia-14m", n_layers=2)',
    'zoo.adapt(model, "lora", r=16)',
    'zoo.adapt(model, "lora", parts={"c_attn": (8, 0, 8)})',
    "handle.save(directory)",
    "zoo.load_adapter(model, path)",
    "handle.merge()",
    "handle.unmerge()",
    "zoo.load(dir).model",
    "lm.tokenizer.render_chat(messages)",
    "lm.generate(text, temperature=0.0)",
    "zoo.CheckpointStore(directory, fabric=fabric).save(step, state)",
    "store.load(state)",
)


def test_snippets(place: Path, tmp_path: Path) -> None:
    """Guards the guide's Python, line by line, in one namespace."""
    import lightning

    for snippet in SNIPPETS:
        assert f"`{snippet}`" in TEXT, snippet
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=97, n_positions=32)
    fused, model = transformers.GPT2LMHeadModel(config), torch.nn.Sequential(torch.nn.Linear(32, 32))
    names: dict[str, Any] = {"zoo": zoo, "fabric": fabric, "dir": str(place / "tiny"), "text": "a", "step": 1}
    names |= {
        "directory": str(tmp_path / "saved"),
        "path": str(tmp_path / "saved"),
        "messages": [{"role": "user", "content": "a"}],
    }
    assert eval(SNIPPETS[0], names).spec.n_layers == 2
    handle = eval(SNIPPETS[1], {**names, "model": model})
    eval(SNIPPETS[2], {**names, "model": fused})
    names |= {"handle": handle, "model": torch.nn.Sequential(torch.nn.Linear(32, 32))}
    for snippet in SNIPPETS[3:7]:
        eval(snippet, names)
    names["lm"] = zoo.load(str(place / "tiny"), device="cpu")
    for snippet in SNIPPETS[7:10]:
        assert eval(snippet, names) is not None
    weights = {"weight": torch.arange(4.0)}
    names |= {"directory": str(tmp_path / "steps"), "state": {"model": weights}}
    eval(SNIPPETS[10], names)
    other = {"model": {"weight": torch.zeros(4)}}
    with zoo.CheckpointStore(tmp_path / "steps", read_only=True) as store:
        eval(SNIPPETS[11], {"store": store, "state": other})
    assert torch.equal(other["model"]["weight"], weights["weight"])
