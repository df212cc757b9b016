"""Contracts of zoo's own components that need more than their name. All others are checked by their name alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zoo.convert.base import Checkpoint
from zoo.convert.nanogpt import KEYS
from zoo.spec import ModelSpec
from zoo.testing.adapters import AdapterContract
from zoo.testing.attention import AttentionContract
from zoo.testing.command import CommandContract
from zoo.testing.converter import ConverterContract
from zoo.testing.dataset import DatasetContract
from zoo.testing.sampler import SamplerContract
from zoo.testing.source import SourceContract


class Flex(AttentionContract):
    """It compiles each case anew."""

    component = "flex"
    every_case = False


class LoRA(AdapterContract):
    """With its defaults."""

    component = "lora"


class DoRA(AdapterContract):
    """Norms of the outputs; the weights' own are not computed to the bit."""

    component = "lora"
    options: ClassVar = {"r": 4, "alpha": 4, "dora": True, "targets": ("all-linear",)}
    start_tolerance: ClassVar = {torch.float32: 1e-5, torch.bfloat16: 0.1}


class LLaMAAdapter(AdapterContract):
    """Few prompts: the context is short."""

    component = "llama-adapter"
    options: ClassVar = {"prompt_length": 5}


class LLaMAAdapterV2(AdapterContract):
    """Likewise."""

    component = "llama-adapter-v2"
    options: ClassVar = {"prompt_length": 5}


class Quantized(ConverterContract):
    """What is written are integers."""

    component = "quantized"
    quantizer = "int8"
    expected_failures: ClassVar = {"test_values_come_back_to_the_bit": "it rounds to integers of eight bits"}


class NanoGPT(ConverterContract):
    """Read, and not written: a file as train.py saves it."""

    component = "nanogpt"
    model = "gpt2"
    file = "ckpt.pt"

    def make_spec(self) -> ModelSpec:
        """With nanoGPT's activation and the dropout of its file."""
        none: dict[str, Any] = {"embed_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
        return replace(super().make_spec(), activation="gelu", tie_embeddings=True, **none)

    def make_file(self, directory: Path, source: Checkpoint) -> Path:
        """A checkpoint with the weights and the sizes."""
        spec = source.spec
        sizes = {"n_layer": spec.n_layers, "n_head": spec.n_heads, "n_embd": spec.d_model}
        args = {**sizes, "block_size": spec.max_seq_len, "vocab_size": spec.vocab_size, "bias": True, "dropout": 0.0}
        path = directory / self.file
        torch.save({"model": _nano_tensors(source), "model_args": args}, path)
        return path


class MinGPT(ConverterContract):
    """Likewise, a bare state dict and a config.json."""

    component = "mingpt"
    model = "gpt2"

    def make_spec(self) -> ModelSpec:
        """With minGPT's activation."""
        return replace(super().make_spec(), activation="gelu_tanh", tie_embeddings=True)

    def make_file(self, directory: Path, source: Checkpoint) -> Path:
        """What its trainer writes, in a directory of its own."""
        place = directory / "run"
        place.mkdir()
        torch.save(_nano_tensors(source), place / "model.pt")
        (place / "config.json").write_text(f'{{"model": {{"n_head": {source.spec.n_heads}}}}}')
        return place


def _nano_tensors(source: Checkpoint) -> dict[str, Tensor]:
    parameters = dict(source.parameters())
    tied = {"head.weight": parameters["embed.weight"]}
    stored = {r.stored: r.merge([parameters[name] for name in r.ours]) for r in KEYS.rules(source.spec)}
    return {**stored, "lm_head.weight": tied["head.weight"]}


class Http(SourceContract):
    """From a real server on this machine."""

    component = "http"
    _servers: ClassVar[list[ThreadingHTTPServer]] = []

    @pytest.fixture(autouse=True)
    def _stopped(self) -> Iterator[None]:
        yield
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()

    def make_address(self, files: Mapping[str, bytes], directory: Path) -> str:
        """The last of the files, served."""
        directory.mkdir(parents=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(directory)))
        Thread(target=server.serve_forever, daemon=True).start()
        self._servers.append(server)
        return f"//127.0.0.1:{server.server_port}/{list(files)[-1]}"


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


class TinyStories(DatasetContract):
    """Its publisher gives no digest."""

    component = "tinystories"
    expected_failures: ClassVar = {"test_it_says_where_it_is": "2 GB that the publisher may replace, without a digest"}


class RepetitionPenalty(SamplerContract):
    """CTRL's formula, token by token."""

    component = "repetition-penalty"
    options: ClassVar = {"penalty": 1.3}

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """Each seen token once."""
        changed = logits_V.tolist()
        for token in set(seen):
            changed[token] = changed[token] / 1.3 if changed[token] > 0 else changed[token] * 1.3
        return torch.tensor(changed)


class Temperature(SamplerContract):
    """A division."""

    component = "temperature"
    options: ClassVar = {"temperature": 0.7}

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """Number by number."""
        return torch.tensor([x / 0.7 for x in logits_V.tolist()])


class TopK(SamplerContract):
    """The five likeliest."""

    component = "top-k"
    options: ClassVar = {"k": 5}

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """By sorting."""
        kept = sorted(range(len(logits_V)), key=lambda i: -float(logits_V[i]))[:5]
        return _kept(logits_V, kept)


class TopP(SamplerContract):
    """The fewest that make up 80 %."""

    component = "top-p"
    options: ClassVar = {"p": 0.8}

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """Added up one by one, until there is enough."""
        weights, kept, total = logits_V.double().softmax(-1).tolist(), [], 0.0
        for token in sorted(range(len(weights)), key=lambda i: -weights[i]):
            if total >= 0.8:
                break
            kept.append(token)
            total += weights[token]
        return _kept(logits_V, kept)


class MinP(SamplerContract):
    """At least a tenth as likely as the likeliest."""

    component = "min-p"
    options: ClassVar = {"p": 0.1}

    def expected(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """By the probabilities."""
        weights = logits_V.double().softmax(-1).tolist()
        return _kept(logits_V, [i for i, weight in enumerate(weights) if weight >= 0.1 * max(weights)])


def _kept(logits_V: Tensor, tokens: list[int]) -> Tensor:
    return torch.tensor([x if i in tokens else -math.inf for i, x in enumerate(logits_V.tolist())])


class ListCommand(CommandContract):
    """What there is."""

    component = "list"
    arguments = ("attention",)


class ShowCommand(CommandContract):
    """One model."""

    component = "show"
    arguments = ("gpt2",)


class PluginsCommand(CommandContract):
    """Installed plugins."""

    component = "plugins"
    arguments = ("list",)


class DoctorCommand(CommandContract):
    """This machine."""

    component = "doctor"
    arguments = ()


class PrepareCommand(CommandContract):
    """Four rows of a file."""

    component = "prepare"
    arguments = ("rows.jsonl", "--out", "prepared")

    def prepare(self, directory: Path) -> None:
        """The file."""
        rows = [f'{{"prompt": "{n} ", "completion": "is {n}"}}\n' for n in range(20)]
        (directory / "rows.jsonl").write_text("".join(rows))


class DownloadCommand(CommandContract):
    """Without a name it lists."""

    component = "download"
    arguments = ()
