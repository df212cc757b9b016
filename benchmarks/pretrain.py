"""nanoGPT's published CPU run and zoo's of the same model on the same text: validation loss and time, in turn.

    python benchmarks/pretrain.py --nanogpt DIRECTORY --data input.txt --seeds 3

The model has 4 layers, 4 heads, 128 wide, 64 characters of context; 2,000 steps of 12 rows. Both start as users start
them and evaluate and save on the way; time is the whole process. The loss is that of the last weights over all of the last
tenth of the text, computed in the same windows for both. Exit code 1: zoo's mean loss is higher, or it takes more than 0.6x
the time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT, STEPS, LIMIT = 64, 2000, 0.6
PUBLISHED = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SPEC = {
    "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "d_model": 128,
    "embed_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0,
}  # fmt: skip
"""What nanoGPT's line means, in the fields of a spec. GPT-2 has biases, which nanoGPT's line leaves out."""


def prepare_nanogpt(source: Path, text: str, seed: int, work: Path) -> None:
    """A copy of nanoGPT with the data that its prepare.py makes, another seed, and a save of the last weights."""
    for path in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes((source / path).read_bytes())
    script = (work / "train.py").read_text()
    assert script.count("torch.manual_seed(1337 + seed_offset)") == 1
    (work / "train.py").write_text(script.replace("torch.manual_seed(1337 ", f"torch.manual_seed({seed} "))
    import numpy as np

    data = work / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], dtype=np.uint16)
    split = int(len(ids) * 0.9)
    ids[:split].tofile(data / "train.bin")
    ids[split:].tofile(data / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_nanogpt(source: Path, data: Path, seed: int, work: Path) -> tuple[float, Path]:
    """Seconds, and the state of its last weights in zoo's format."""
    prepare_nanogpt(source, data.read_text(encoding="utf-8"), seed, work)
    command = [sys.executable, "train.py", *PUBLISHED.split(), "--always_save_checkpoint=True"]
    seconds = timed(command, work)
    out = work / "model"
    checkpoint = work / "out-shakespeare-char" / "ckpt.pt"
    subprocess.run([sys.executable, "-m", "zoo", "convert", str(checkpoint), str(out)], check=True, capture_output=True)
    return seconds, out


def run_zoo(data: Path, seed: int, work: Path, more: list[str]) -> tuple[float, Path]:
    """Seconds, and the model's directory."""
    settings = [word for name, value in SPEC.items() for word in ("--set", f"spec.{name}={json.dumps(value)}")]
    command = [
        sys.executable, "-m", "zoo", "pretrain", "gpt2", "--data", str(data), "--tokenizer", "char", "--out", str(work / "run"),
        "--max-seq-len", str(CONTEXT), "--batch-size", "12", "--max-steps", str(STEPS), "--eval-every", "250",
        "--lr", "1e-3", "--warmup-steps", "100", "--weight-decay", "0.1", "--seed", str(seed),
        "--set", "beta2=0.99", "--set", "min_lr_ratio=0.1", *settings, *more,
    ]  # fmt: skip
    return timed(command, work), work / "run" / "model"


def timed(command: list[str], directory: Path) -> float:
    """Seconds of a command. Caches of compiled code are empty at its start."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor")}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds


def validation_loss(model: Path, data: Path) -> float:
    """Nats per character over the last tenth of the text, in windows of the context, one after the other."""
    import torch

    import zoo

    lm = zoo.load(str(model), device="cpu", precision="32-true")
    text = data.read_text(encoding="utf-8")
    ids = torch.tensor(lm.tokenizer.encode(text[int(len(text) * 0.9) :]))
    n_windows = (len(ids) - 1) // CONTEXT
    tokens_NT, targets_NT = ids[: n_windows * CONTEXT].view(-1, CONTEXT), ids[1 : n_windows * CONTEXT + 1]
    with torch.inference_mode():
        logits = torch.cat([lm.model(part) for part in tokens_NT.split(256)])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets_NT))


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("more", nargs="*", help="options of zoo pretrain, after --")
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"nanoGPT": [], "zoo": []}
    data = arguments.data.resolve()
    for seed in range(1337, 1337 + arguments.seeds):
        contenders: dict[str, Any] = {"zoo": lambda seed, work: run_zoo(data, seed, work, arguments.more)}
        if arguments.nanogpt:
            contenders["nanoGPT"] = lambda seed, work: run_nanogpt(arguments.nanogpt.resolve(), data, seed, work)
        for name, run in contenders.items():
            with tempfile.TemporaryDirectory() as work:
                seconds, model = run(seed, Path(work))
                rows[name].append((seconds, validation_loss(model, data)))
            print(
                f"seed {seed}: {name:8} {rows[name][-1][0]:6.1f} s, validation loss {rows[name][-1][1]:.4f}", flush=True
            )
    if not arguments.nanogpt:
        return
    mean = {name: [statistics.mean(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    ratio = mean["zoo"][0] / mean["nanoGPT"][0]
    print(f"\n{platform.platform()}, {os.cpu_count()} cores\n")
    print("| | mean seconds | mean validation loss |\n|---|---|---|")
    for name, (seconds, loss) in mean.items():
        print(f"| {name} | {seconds:.1f} | {loss:.4f} |")
    print(f"\ntime {ratio:.2f}x (limit {LIMIT}), loss {mean['zoo'][1] - mean['nanoGPT'][1]:+.4f} (limit 0)")
    sys.exit(ratio > LIMIT or mean["zoo"][1] > mean["nanoGPT"][1])


if __name__ == "__main__":
    main()
