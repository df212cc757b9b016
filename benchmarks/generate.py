"""Prefill and decoding speed of zoo and its peers on one model, in turn, as ratios.

    python benchmarks/generate.py smollm2-135m-instruct --llama-cpp-python PYTHON --litgpt-python PYTHON

Every contender runs in a process of its own, one after the other, round after round; the median of the rounds counts.
All get the same weights, token ids and threads. Absolute numbers of a shared machine mean little: read the ratios.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, float]
ZOO = {
    "zoo bf16": {},
    "zoo int8": {"quantize": "int8"},
    "zoo int4": {"quantize": "int4"},
    "zoo bf16 compiled": {"compile": True},
    "zoo int8 compiled": {"quantize": "int8", "compile": True},
    "zoo int4 compiled": {"quantize": "int4", "compile": True},
}
PEERS = ("transformers bf16", "litgpt bf16", "llama.cpp")
PROMPT = list(range(1000, 1512))
"""512 token ids: speed does not depend on what they mean."""


def worker_zoo(model: str, n_new: int, **options: Any) -> Result:
    """Load, warm up, then time one prefill and the decoding of ``n_new`` tokens."""
    started = time.perf_counter()
    zoo = import_zoo()
    from zoo.generate.sampling import SamplingOptions

    lm = zoo.load(model, precision="bf16-true", device="cpu", **options)
    loaded = time.perf_counter()
    greedy = SamplingOptions(temperature=0.0)

    def run(n_tokens: int) -> Any:
        session = lm.session()
        session.stop_ids = frozenset()
        return session.reply(PROMPT, max_new_tokens=n_tokens, sampling=greedy).read().stats

    run(8)
    ready = time.perf_counter()
    stats = run(n_new)
    return {
        "load": loaded - started,
        "first": ready - loaded,
        "prefill": stats.prefill_tokens_per_second,
        "decode": stats.decode_tokens_per_second,
    }


def import_zoo() -> Any:
    """As ``python -m zoo`` does it: threads bound to cores, freed memory kept."""
    from zoo.cli.torch_process import import_torch

    import_torch()
    import zoo

    return zoo


def worker_batch(model: str, n_new: int) -> Result:
    """Prompts of about 512 tokens, sixteen at once and one alone; tokens of all rows by time, without the prefill."""
    lm = import_zoo().load(model, precision="bf16-true", device="cpu")
    lm.checkpoint.generation["eos_token_id"] = []
    prompts = [f"Number {i}:" + " once upon a time" * 127 for i in range(16)]

    def rate(prompts: list[str]) -> float:
        lm.generate_batch(prompts, max_new_tokens=2, temperature=0.0)
        times = []
        for n_tokens in (1, n_new):
            started = time.perf_counter()
            lm.generate_batch(prompts, max_new_tokens=n_tokens, temperature=0.0)
            times.append(time.perf_counter() - started)
        return len(prompts) * (n_new - 1) / (times[1] - times[0])

    alone = rate(prompts[:1])
    batch = rate(prompts)
    return {"decode": batch, "gain": batch / alone}


def worker_transformers(directory: str, n_new: int) -> Result:
    """The same with the reference library's ``generate``, bfloat16, SDPA."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.tensor([PROMPT])

    def run(n_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    return _rates(run, n_new)


def worker_litgpt(directory: str, n_new: int) -> Result:
    """The same with ``litgpt.LLM`` on a converted directory, bfloat16."""
    import torch
    from litgpt import LLM

    llm = LLM.load(directory, distribute=None)
    llm.distribute(accelerator="cpu", devices=1, precision="bf16-true", fixed_kv_cache_size=len(PROMPT) + n_new)
    model = llm.model
    ids = torch.tensor(PROMPT)

    @torch.inference_mode()
    def run(n_tokens: int) -> float:
        from litgpt.generate.base import generate

        started = time.perf_counter()
        generate(model, ids, max_returned_tokens=len(PROMPT) + n_tokens, temperature=0.0, eos_id=None)
        return time.perf_counter() - started

    return _rates(run, n_new)


def worker_llama_cpp(gguf: str, n_new: int) -> Result:
    """The same with llama.cpp on the GGUF itself."""
    import llama_cpp

    llama = llama_cpp.Llama(gguf, n_ctx=1024, n_batch=512, n_threads=_threads(), verbose=False)

    def run(n_tokens: int) -> float:
        llama.reset()
        started = time.perf_counter()
        for i, _ in enumerate(llama.generate(PROMPT, temp=0.0, reset=True), start=1):
            if i == n_tokens:
                break
        return time.perf_counter() - started

    return _rates(run, n_new)


def _rates(run: Callable[[int], float], n_new: int) -> Result:
    run(4)
    first, whole = run(1), run(n_new)
    return {"prefill": len(PROMPT) / first, "decode": (n_new - 1) / (whole - first)}


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(contender: str, model: str, n_new: int) -> None:
    """One measurement, printed as JSON."""
    if contender in ZOO:
        result = worker_zoo(model, n_new, **ZOO[contender])
    else:
        workers = {"zoo batch 16": worker_batch, "transformers bf16": worker_transformers}
        workers |= {"litgpt bf16": worker_litgpt, "llama.cpp": worker_llama_cpp}
        result = workers[contender](model, n_new)
    print("RESULT " + json.dumps(result))


def measure(python: str, contender: str, model: str, n_new: int) -> Result | None:
    """Run one contender in its own process."""
    command = [python, __file__, model, "--worker", contender, "--new-tokens", str(n_new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: Result = json.loads(line.removeprefix("RESULT "))
            return result
    print(f"{contender}: failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return None


def machine() -> dict[str, float]:
    """Memory bandwidth in GB/s and bfloat16 and float32 matmul peaks in GFLOP/s."""
    import torch

    def best(function: Callable[[], Any], n: int = 7) -> float:
        times = []
        for _ in range(n):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return min(times)

    big = torch.ones(1 << 28)
    facts = {"memory GB/s": big.nbytes / best(big.sum) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        square = torch.randn(2048, 2048).to(dtype)
        facts[f"{name} GFLOP/s"] = 2 * 2048**3 / best(lambda square=square: square @ square) / 1e9
    return facts


def contenders(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Contender -> (interpreter, what it loads)."""
    found = dict.fromkeys((*ZOO, "zoo batch 16"), (sys.executable, arguments.model))
    subprocess.run(
        [sys.executable, "-m", "zoo", "convert", arguments.model, folder / "hf", "--dtype", "bf16"],
        check=True,
        capture_output=True,
    )
    found["transformers bf16"] = (sys.executable, str(folder / "hf"))
    if arguments.litgpt_python:
        convert = [sys.executable, "-m", "zoo", "convert", folder / "hf", folder / "litgpt", "--to", "litgpt"]
        subprocess.run(convert, check=True, capture_output=True)
        found["litgpt bf16"] = (arguments.litgpt_python, str(folder / "litgpt"))
    if arguments.llama_cpp_python and arguments.gguf:
        found["llama.cpp"] = (arguments.llama_cpp_python, arguments.gguf)
    return found


def report(rounds: dict[str, list[Result]]) -> None:
    """The medians, and zoo's rates over the peers'."""
    medians = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in rounds.items()
        if results
    }
    print(f"{'':20} {'decode/s':>9} {'prefill/s':>10} {'first run s':>12}" + "".join(f"{'/ ' + p:>20}" for p in PEERS))
    for name, row in medians.items():
        ratios = [
            f"{row['decode'] / medians[peer]['decode']:.2f} {_ratio(row.get('prefill'), medians[peer]['prefill'])}"
            if peer in medians
            else "-"
            for peer in PEERS
        ]
        first = f"{row['first']:.1f}" if "first" in row else ""
        print(
            f"{name:20} {row['decode']:9.1f} {_rate(row.get('prefill')):>10} {first:>12}"
            + "".join(f"{ratio:>20}" for ratio in ratios)
        )
        if "gain" in row:
            print(f"{'':20} {row['gain']:9.1f} times one of its rows alone")
    print("ratios: decode, then prefill, of the row over the peer of the column")


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


def _ratio(rate: float | None, peer: float) -> str:
    return "-" if rate is None else f"{rate / peer:.2f}"


def main() -> None:
    """Parse the command line and run all contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what zoo loads: a registry name, a directory or a GGUF file")
    parser.add_argument("--gguf", help="what llama.cpp loads")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    parser.add_argument("--litgpt-python", metavar="PYTHON", help="interpreter that has litgpt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--only", action="append", metavar="NAME", help="run this contender alone, or these")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.model, arguments.new_tokens)
        return
    facts = " ".join(f"{key} {value:.0f}" for key, value in machine().items())
    print(f"{platform.processor() or platform.machine()}, {_threads()} threads, {facts}")
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(arguments, Path(folder))
        found = {name: what for name, what in found.items() if name in (arguments.only or found)}
        rounds: dict[str, list[Result]] = {name: [] for name in found}
        for _ in range(arguments.rounds):
            for name, (python, model) in found.items():
                if (result := measure(python, name, model, arguments.new_tokens)) is not None:
                    rounds[name].append(result)
    report(rounds)


if __name__ == "__main__":
    main()
