"""What precisions and quantizers change: KL divergence to float32, in nats per token, on a text.

`python benchmarks/divergence.py smollm2-135m-instruct FILE.txt`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import zoo

CHOICES = {"bf16": None, "int8": "int8", "int4": "int4"}
WINDOW = 512


def log_probabilities(model: str, windows_BT: Tensor, *, precision: str, quantize: str | None = None) -> Tensor:
    """Log probabilities (B, T, V), float32."""
    lm = zoo.load(model, precision=precision, device="cpu", quantize=quantize)
    with torch.inference_mode():
        return torch.cat([lm.model(row_T[None]).float().log_softmax(-1) for row_T in windows_BT])


def main() -> None:
    """Parse the command line, print a line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what zoo loads")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="rounded up to windows of 512")
    arguments = parser.parse_args()
    tokenizer = zoo.load(arguments.model, precision="32-true", device="cpu").tokenizer
    n_windows = -(-arguments.tokens // WINDOW)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")[: 16 * n_windows * WINDOW])
    windows_BT = torch.tensor(ids[: n_windows * WINDOW]).view(n_windows, WINDOW)
    exact = log_probabilities(arguments.model, windows_BT, precision="32-true")
    for name, quantize in CHOICES.items():
        found = log_probabilities(arguments.model, windows_BT, precision="bf16-true", quantize=quantize)
        divergence = (exact.exp() * (exact - found)).sum(-1).mean()
        print(f"{name:5} {divergence:.4f} nats per token over {windows_BT.numel()} tokens")


if __name__ == "__main__":
    main()
