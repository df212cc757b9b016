"""LoRA finetuning: throughput, memory and validation loss of zoo, PEFT with transformers, and litgpt, in turn.

    python benchmarks/finetune.py smollm2-135m-instruct --data records.json --litgpt-python PYTHON

All train rank 8 on q and v, in bfloat16 with float32 adapters, on the same batches in the same order, with the learning
rates, AdamW and clipping of the same recipe; peers pad to the longest row of a batch. zoo runs as ``zoo finetune`` does.
Throughput counts the supervised samples of the steps after the first ones, over the median time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RANK, ALPHA, BATCH, WARM = 8, 16, 8, 5
Result = dict[str, float]


def plan(arguments: argparse.Namespace, folder: Path) -> Path:
    """The batches of each step and of the validation set, as zoo makes them, and the learning rates."""
    import zoo
    from zoo.adapting import default_registry
    from zoo.runs.data import finetuning_data
    from zoo.train.schedule import build_schedule

    lm = zoo.load(arguments.model, device="cpu")
    recipe = make_recipe(arguments, folder)
    data = finetuning_data(recipe, lm.tokenizer, lm.spec.max_seq_len, default_registry(), print).data
    schedule = build_schedule(
        "cosine", lr=arguments.lr, total_steps=arguments.steps, warmup_steps=arguments.steps // 10
    )
    rows = [_rows(data.step(number, rank=0, world_size=1, micro_batch_size=BATCH)) for number in range(arguments.steps)]
    held_out = [_rows([batch]) for batch in data.validation(rank=0, world_size=1, micro_batch_size=BATCH)]
    rates = [schedule(number) for number in range(arguments.steps)]
    path = folder / "plan.json"
    path.write_text(json.dumps({"steps": rows, "validation": held_out, "rates": rates}))
    return path


def _rows(batches: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row, as transformers wants them: the label of a token is the token itself, or -100."""
    rows = []
    for batch in batches:
        for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            end = max(i for i, target in enumerate(targets) if target != -100) + 1
            rows.append(([*tokens[:end], targets[end - 1]], [-100, *targets[:end]]))
    return rows


def make_recipe(arguments: argparse.Namespace, folder: Path) -> Any:
    """The recipe that zoo runs."""
    from zoo.train.recipe import Recipe

    return Recipe.model_validate(
        {
            "model": arguments.model,
            "data": arguments.data,
            "out": str(folder / "run"),
            "adapter": {"use": "lora", "r": RANK, "alpha": ALPHA, "targets": ["attn.q", "attn.v"]},
            "precision": "bf16-true",
            "batch_size": BATCH,
            "max_steps": arguments.steps,
            "lr": arguments.lr,
            "weight_decay": 0.01,
            "eval_every": arguments.steps,
            "val_fraction": 0.05,
            "seed": 1,
        }
    )


def worker_zoo(arguments: argparse.Namespace, *, compiled: bool) -> Result:
    """``zoo finetune``, by its recipe."""
    from zoo.train.recipe_file import write_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(make_recipe(arguments, folder).model_copy(update={"compile": compiled}), folder / "recipe.yaml")
        started = time.perf_counter()
        command = [sys.executable, "-m", "zoo", "finetune", "--recipe", str(folder / "recipe.yaml")]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        return {
            "seconds": statistics.median(line["seconds"] for line in steps[WARM:]),
            "memory": max(line["peak_memory"] for line in steps),
            "val_loss": [line["val_loss"] for line in lines if "val_loss" in line][-1],
            "all": time.perf_counter() - started,
        }


def worker_peft(directory: str, plan_file: str) -> Result:
    """PEFT on transformers, with gradients clipped and rates set as zoo does."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.config.use_cache = False
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)  # keeps A and B in float32

    def loss(ids: Any, labels: Any, mask: Any) -> Any:
        return adapted(input_ids=ids, attention_mask=mask, labels=labels).loss

    return _train(adapted, loss, plan_file)


def worker_litgpt(directory: str, plan_file: str) -> Result:
    """Litgpt's LoRA model and its chunked loss."""
    import torch
    from litgpt.lora import GPT, Config, lora_filter, mark_only_lora_as_trainable  # noqa: F401
    from litgpt.utils import chunked_cross_entropy

    config = Config.from_file(
        Path(directory) / "model_config.yaml",
        lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, lora_query=True, lora_key=False, lora_value=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = GPT(config)
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(torch.load(Path(directory) / "lit_model.pth", mmap=True), strict=False)
    mark_only_lora_as_trainable(model)

    def loss(ids: Any, labels: Any, mask: Any) -> Any:
        return chunked_cross_entropy(model(ids)[..., :-1, :], labels[..., 1:])

    return _train(model, loss, plan_file)


def _train(model: Any, loss: Callable[..., Any], plan_file: str) -> Result:
    import torch

    planned = json.loads(Path(plan_file).read_text())
    started = time.perf_counter()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    times = []
    model.train()
    for rows, rate in zip(planned["steps"], planned["rates"], strict=True):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss(*_padded(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.eval()
    return {
        "seconds": statistics.median(times[WARM:]),
        "memory": memory,
        "val_loss": _validate(loss, planned["validation"]),
        "all": time.perf_counter() - started,
    }


def _validate(loss: Callable[..., Any], batches: list[Any]) -> float:
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for rows in batches:
            ids, labels, mask = _padded(rows)
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + float(loss(ids, labels, mask)) * n, count + n
    return total / count


def _padded(rows: list[Any]) -> Iterator[Any]:
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return iter((ids, labels, mask))


def measure(python: str, contender: str, arguments: list[str]) -> Result | None:
    """Run one contender in its own process."""
    command = [python, __file__, *sys.argv[1:], "--worker", contender, *arguments]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: Result = json.loads(line.removeprefix("RESULT "))
            return result
    print(f"{contender}: failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return None


def report(rounds: dict[str, list[Result]]) -> None:
    """The medians, and the ratios to the peers."""
    medians = {name: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for name, rs in rounds.items() if rs}
    peers = [name for name in medians if not name.startswith("zoo")]
    print(
        f"{'':14} {'samples/s':>10} {'peak GiB':>9} {'val loss':>9} {'all s':>7}"
        + "".join(f"{'/ ' + p:>24}" for p in peers)
    )
    for name, row in medians.items():
        ratios = [
            f"{medians[p]['seconds'] / row['seconds']:.2f}x, {row['memory'] / medians[p]['memory']:.2f} mem, "
            f"{row['val_loss'] / medians[p]['val_loss'] - 1:+.2%}"
            for p in peers
        ]
        numbers = (
            f"{BATCH / row['seconds']:10.2f} {row['memory'] / 2**30:9.2f} {row['val_loss']:9.4f} {row['all']:7.0f}"
        )
        print(f"{name:14} {numbers}" + "".join(f"{ratio:>24}" for ratio in ratios))
    print("ratios: throughput, peak memory, validation loss, of the row over the peer of the column")


def main() -> None:
    """Parse the command line and run all contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what zoo loads")
    parser.add_argument("--data", required=True, help="records in any format that zoo reads")
    parser.add_argument("--litgpt-python", metavar="PYTHON", help="interpreter that has litgpt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="NAME", help="run this contender alone, or these")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, *rest = arguments.worker
        workers = {"peft": worker_peft, "litgpt": worker_litgpt}
        compiled = name == "zoo compiled"
        result = workers[name](*rest) if name in workers else worker_zoo(arguments, compiled=compiled)
        print("RESULT " + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        convert = [sys.executable, "-m", "zoo", "convert"]
        hf, lit = Path(folder) / "hf", Path(folder) / "litgpt"
        subprocess.run([*convert, arguments.model, hf, "--dtype", "bf16"], check=True, capture_output=True)
        planned = str(plan(arguments, Path(folder)))
        found: dict[str, tuple[str, list[str]]] = {"zoo": (sys.executable, []), "zoo compiled": (sys.executable, [])}
        found["peft"] = (sys.executable, [str(hf), planned])
        if arguments.litgpt_python:
            subprocess.run([*convert, hf, lit, "--to", "litgpt"], check=True, capture_output=True)
            found["litgpt"] = (arguments.litgpt_python, [str(lit), planned])
        found = {name: what for name, what in found.items() if name in (arguments.only or found)}
        rounds: dict[str, list[Result]] = {name: [] for name in found}
        for _ in range(arguments.rounds):
            for name, (python, rest) in found.items():
                if (result := measure(python, name, rest)) is not None:
                    rounds[name].append(result)
    report(rounds)


if __name__ == "__main__":
    main()
