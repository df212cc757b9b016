"""What each way of finetuning costs and brings: parameters, memory, time, validation loss, and BLEU of the answers.

    python benchmarks/e2e_records.py e2e_nlg_valid.txt E2E
    python benchmarks/methods.py smollm2-135m-instruct --data E2E

Each method trains for the same steps on the same batches, in a process of its own, as ``zoo finetune`` with its defaults.
BLEU (sacrebleu) is that of answers to held-out meanings, each against all descriptions that people gave of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("--set", "adapter.r=8"),
    "llama-adapter": (),
    "llama-adapter-v2": (),
    "full": (),
}
MAX_NEW_TOKENS = 80


def train(method: str, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One run; what its files say of it."""
    command = [
        sys.executable, "-m", "zoo", "finetune", arguments.model, "--out", str(out), "--adapter", method,
        "--data", str(arguments.data / "train.json"), "--val-data", str(arguments.data / "val.json"),
        "--batch-size", "8", "--max-steps", str(arguments.steps), "--eval-every", str(arguments.steps), "--seed", "1",
        *METHODS[method],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return {
        "trained": json.loads((out / "result.json").read_text())["n_trained"],
        "memory": max(line["peak_memory"] for line in steps),
        "seconds": statistics.median(line["seconds"] for line in steps[5:]),
        "before": losses[0],
        "after": losses[-1],
    }


def answer(model: str, adapters: list[Path], arguments: argparse.Namespace) -> tuple[float, str]:
    """BLEU of greedy answers to the held-out meanings, and one of them."""
    import sacrebleu

    import zoo

    references: dict[str, list[str]] = json.loads((arguments.data / "references.json").read_text())
    meanings = list(references)[: arguments.answers]
    instruction = json.loads((arguments.data / "val.json").read_text())[0]["instruction"]
    lm = zoo.load(model, adapters=adapters)
    requests = [
        lm.request(
            [{"role": "user", "content": f"{instruction}\n\n{meaning}"}], temperature=0.0, max_new_tokens=MAX_NEW_TOKENS
        )
        for meaning in meanings
    ]
    replies: dict[int, Any] = dict(lm.run(requests, batch_size=16))
    texts = [replies[number].text.strip() for number in range(len(meanings))]
    most = max(len(references[meaning]) for meaning in meanings)
    columns = [[(references[meaning] + [""] * most)[i] for meaning in meanings] for i in range(most)]
    return sacrebleu.corpus_bleu(texts, columns).score, texts[0]


def main() -> None:
    """Train and measure in turn; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="what e2e_records.py has written")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        adapters = [Path(name) for name in arguments.worker]
        print(json.dumps(answer(arguments.model, adapters, arguments)))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores; {arguments.model}, {arguments.steps} steps of 8 records\n")
    print(
        "| method | trained | peak GiB | s a step | validation loss | BLEU | an answer |\n|---|---|---|---|---|---|---|"
    )
    bleu, text = answer_apart(arguments.model, [], arguments)
    print(f"| none | 0 | | | | {bleu:.1f} | {text.splitlines()[0]} |", flush=True)
    for method in arguments.only or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            found = train(method, arguments, out)
            is_whole = method == "full"
            model = str(out / "model") if is_whole else arguments.model
            bleu, text = answer_apart(model, [] if is_whole else [out / "adapter"], arguments)
        print(
            f"| {method} | {found['trained']:,} | {found['memory'] / 2**30:.2f} | {found['seconds']:.2f} | "
            f"{found['before']:.3f} to {found['after']:.3f} | {bleu:.1f} | {text.splitlines()[0]} |",
            flush=True,
        )


def answer_apart(model: str, adapters: list[Path], arguments: argparse.Namespace) -> tuple[float, str]:
    """`answer`, in a process of its own."""
    command = [sys.executable, __file__, model, "--data", str(arguments.data), "--answers", str(arguments.answers)]
    done = subprocess.run([*command, "--worker", *map(str, adapters)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    bleu, text = json.loads(done.stdout.splitlines()[-1])
    return bleu, text


if __name__ == "__main__":
    main()
