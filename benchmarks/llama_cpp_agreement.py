"""Whether llama.cpp says with a GGUF file what zoo says with it: greedy text, and the ids of some hundred strings.

zoo computes in float32, from the weights as they are stored. llama.cpp rounds activations to the type of the weights
before each product, so that two candidates which are almost equally likely may come out the other way round; where
the texts part, the gap between the two candidates in zoo's logits is printed.

    python benchmarks/llama_cpp_agreement.py MODEL.gguf... --llama-cpp-python PYTHON [--tokens 32]

PYTHON is the interpreter of an environment that has llama-cpp-python: python -m venv E; E/bin/pip install
llama-cpp-python (it compiles for some minutes).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import zoo

PROMPTS = ["Once upon a time", "The king said to", "First, we have to", "1 2 3 4"]
PARTS = (
    "Hello", " world", "  ", "\n", "\n\n", "\t", " I'm", "WE'LL", " 123", "45678", "3.14", "a_b", "camelCase", "...",
    " //x", "(y)=>{", "\u00e9", "caf\u00e9", " na\u00efve", "\u041f\u0440\u0438\u0432\u0435\u0442", "\u4f60\u597d", "\ud55c\uad6d", "\U0001f600",
    "\U0001f1e9\U0001f1ea", "\u2019s", "\u201cq\u201d", " $5", "100%", "!", "??", " z", "Q", "\u00a0", "\r\n", "-", " --", "#", "\u00df", "\u00b2",
)  # fmt: skip
"""What the strings are put together from. Composed characters only: llama.cpp does not normalize."""

LLAMA_CPP = """
import json, sys
import llama_cpp
request = json.load(sys.stdin)
llm = llama_cpp.Llama(request["model"], n_ctx=request["n_ctx"], n_threads=2, n_batch=64, verbose=False,
                      type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)
def ids_of(text):
    return llm.tokenize(text.encode(), add_bos=True, special=True)
def greedy(prompt):
    llm.reset()
    found = []
    for token in llm.generate(ids_of(prompt), temp=0.0, repeat_penalty=1.0):
        if token in request["stop_ids"] or len(found) == request["tokens"]:
            break
        found.append(token)
    return found
json.dump({"ids": [ids_of(text) for text in request["strings"]],
           "replies": [greedy(prompt) for prompt in request["prompts"]]}, sys.stdout)
"""


@dataclass
class Tally:
    """What was compared and what of it agreed."""

    compared: int = 0
    agreed: int = 0

    def add(self, agrees: bool) -> str:
        """Count one; returns the word for it."""
        self.compared += 1
        self.agreed += agrees
        return "OK" if agrees else "DIFFERENT"


def strings(count: int = 400) -> list[str]:
    """Random strings of hard parts, and the empty one."""
    rng = random.Random(0)
    return ["", *("".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count))]


def ask_llama_cpp(python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp says, in a process of its own."""
    done = subprocess.run(
        [str(python), "-c", LLAMA_CPP], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"llama.cpp failed on {request['model']}:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(model: Path, python: Path, n_tokens: int) -> bool:
    """Print both texts of each prompt; returns whether everything agreed."""
    lm = zoo.load(model, precision="32-true", device="cpu")
    texts = strings()
    request = {"model": str(model), "n_ctx": min(512, lm.spec.max_seq_len), "tokens": n_tokens, "prompts": PROMPTS}
    theirs = ask_llama_cpp(python, request | {"strings": texts, "stop_ids": sorted(lm.stop_ids)})
    click.echo(f"== {model.name}")
    words, replies = Tally(), Tally()
    for text, ids in zip(texts, theirs["ids"], strict=True):
        if words.add(lm.tokenizer.encode(text) == ids) != "OK":
            click.echo(f"   {text!r}: zoo {lm.tokenizer.encode(text)}, llama.cpp {ids}")
    click.echo(f"   ids of strings: {words.agreed} of {words.compared} equal")
    for prompt, ids in zip(PROMPTS, theirs["replies"], strict=True):
        ours = lm.generate(prompt, max_new_tokens=n_tokens, temperature=0.0, stream=True, repetition_penalty=1.0).read()
        word = replies.add(list(ours.ids) == ids)
        click.echo(
            f"   {prompt!r}\n     zoo       {ours.text!r}\n     llama.cpp {lm.tokenizer.decode(ids)!r}\n     {word}"
        )
        if word != "OK":
            click.echo(f"     {parting(lm, lm.tokenizer.encode(prompt), list(ours.ids), ids)}")
    return words.agreed == words.compared and replies.agreed == replies.compared


def parting(lm: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """How close the decision was at the first token that differs."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return f"one ends after {min(len(ours), len(theirs))} tokens"
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt + ours[:at]]))[0, -1]
    gap = logits[ours[at]] - logits[theirs[at]]
    return f"token {at}: zoo's choice leads llama.cpp's by {gap:.4f} (logits from {logits.min():.1f} to {logits.max():.1f})"


@click.command()
@click.argument(
    "models", metavar="MODEL.gguf...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("--llama-cpp-python", "python", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=32, show_default=True, help="Tokens to generate from each prompt.")
def main(models: tuple[Path, ...], python: Path, tokens: int) -> None:
    """Compare zoo with llama.cpp on GGUF files."""
    agreed = [compare(model, python, tokens) for model in models]
    click.echo("all agree" if all(agreed) else "DIFFERENT")
    sys.exit(not all(agreed))


if __name__ == "__main__":
    main()
