"""The Python API: load a model and use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from zoo.adapters.attach import AttachedAdapter
from zoo.adapting import adapt, default_registry, load_adapter
from zoo.attention.base import AttentionBackend, AttentionRequest, choose_attention
from zoo.convert.adapter_names import FamilyNames
from zoo.convert.base import Checkpoint
from zoo.convert.load import load_model, open_checkpoint
from zoo.convert.load_quantized import load_quantized
from zoo.convert.peft import read_config
from zoo.errors import InputError, UnavailableError
from zoo.families.base import Family
from zoo.generate.batch import Outcome, run_requests
from zoo.generate.chat import Conversation
from zoo.generate.compile import CompiledDecoding, require_compiler
from zoo.generate.decode import Session
from zoo.generate.reply import Reply, Request
from zoo.generate.sampling import SamplingOptions
from zoo.generate.speculative import DEFAULT_DRAFT_TOKENS, Drafter, ModelDrafter, NgramDrafter, Speculation
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.precision.base import choose_precision
from zoo.precision.quantization import Quantizer, choose_quantizer
from zoo.registry import Registry
from zoo.sources.base import FetchOptions
from zoo.sources.resolve import resolve_model
from zoo.spec import ModelSpec
from zoo.text.chat import Message
from zoo.text.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128
DEFAULT_BATCH_SIZE = 16


def checkpoints_directory() -> Path:
    """Where weights are kept: ``ZOO_CHECKPOINTS``, or ``checkpoints`` in the working directory."""
    return Path(os.environ.get("ZOO_CHECKPOINTS", "checkpoints"))


@dataclass
class LanguageModel:
    """A model with its weights, its tokenizer and what its files say about generation."""

    model: GPT
    checkpoint: Checkpoint
    precision: str
    attention: str
    backend: AttentionBackend
    device: torch.device
    notes: list[str]
    """What ``auto`` chose, and why."""
    quantized: str | None = None
    """The quantizer whose layers it has."""
    step: CompiledDecoding | None = None
    """Runs single tokens compiled."""
    adapters: list[AttachedAdapter] = field(default_factory=list)
    """Those that it was loaded with."""

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self._session: Session | None = None

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return self.checkpoint.spec

    @property
    def family(self) -> Family:
        """How it maps to the outside."""
        return self.checkpoint.family

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer.

        Raises:
            FileFormatError: the model came without one.
        """
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.load_tokenizer()
        return self._tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text, from generation_config.json, config.json and the tokenizer, in this order."""
        for found in (self.checkpoint.generation.get("eos_token_id"), self.checkpoint.config.get("eos_token_id")):
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
        return frozenset() if self.tokenizer.eos_id is None else frozenset({self.tokenizer.eos_id})

    def sampling(self, **given: Any) -> SamplingOptions:
        """Sampling options: what is given (not ``None``), then what generation_config.json says, then the defaults."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {name: self.checkpoint.generation.get(name) for name in names}
        options |= {name: value for name, value in given.items() if value is not None}
        return SamplingOptions(**{name: value for name, value in options.items() if value is not None})

    def adapt(self, adapter: str = "lora", *, name: str = "default", **options: Any) -> AttachedAdapter:
        """Put an adapter on the model: `zoo.adapt`, saved under the names of the model's family."""
        return adapt(self.model, adapter, name=name, names=self._outside, base=str(self.checkpoint.path), **options)

    def load_adapter(self, directory: str | Path, *, name: str = "default") -> AttachedAdapter:
        """Put an adapter directory on the model, PEFT's or zoo's: `zoo.load_adapter`, by the family's names."""
        return load_adapter(self.model, directory, name=name, names=self._outside, base=str(self.checkpoint.path))

    @property
    def _outside(self) -> FamilyNames:
        if self.step is not None:
            raise InputError("a compiled model takes no adapter.", fix="Load it with adapters=[...].")
        return FamilyNames(self.checkpoint.family.keys, self.spec)

    def session(self) -> Session:
        """A new sequence with a cache of its own."""
        return Session(self.model, self.tokenizer, self.stop_ids, self.step)

    def conversation(self, *, system: str | None = None) -> Conversation:
        """A new conversation."""
        return Conversation(self.session(), system=system)

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Reply: ...

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        sample: int = 0,
        drafter: Drafter | None = None,
        draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        **sampling: Any,
    ) -> str | Reply:
        """Continue ``prompt``; returns the new text, or with ``stream`` a `Reply` to iterate over.

        Args:
            max_new_tokens: by default 128, or what the context has room for.
            stop: strings before which the text ends.
            sample: number of the sample: those of one seed differ, and each can be had again.
            drafter: guesses up to ``draft_tokens`` ahead, to be verified at once; see `drafter`.
            sampling: fields of `SamplingOptions`; ``temperature=0`` is greedy.

        Raises:
            InputError: the prompt is empty, the request exceeds the context, or an option is out of range.
        """
        request = self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, sample=sample, **sampling)
        if self._session is None:
            self._session = self.session()
        reply = self._session.reply(
            request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            stop=stop,
            sample=sample,
            speculation=None if drafter is None else Speculation(drafter, draft_tokens),
        )
        return reply if stream else reply.read().text

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        **sampling: Any,
    ) -> list[Reply]:
        """Continue many prompts, ``batch_size`` at a time; each as `generate` does with ``sample=`` its number.

        Raises:
            InputError: as `generate`, before any work.
            UnavailableError: the attention backend can not hide padding.
            ZooError: the model's logits are not finite numbers for one of them.
        """
        requests = [
            self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, sample=number, **sampling)
            for number, prompt in enumerate(prompts)
        ]
        replies: dict[int, Reply] = {}
        for number, outcome in self.run(requests, batch_size=batch_size):
            if not isinstance(outcome, Reply):
                raise outcome
            replies[number] = outcome
        return [replies[number] for number in range(len(requests))]

    def request(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        sample: int = 0,
        **sampling: Any,
    ) -> Request:
        """A text to continue or a conversation to answer, for `run`. Options as for `generate`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        room = max(1, self.spec.max_seq_len - len(ids))
        return Request(
            prompt_ids=ids,
            max_new_tokens=min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens,
            sampling=self.sampling(**sampling),
            stop=stop,
            stop_ids=self.stop_ids,
            sample=sample,
        )

    def run(self, requests: Sequence[Request], *, batch_size: int = DEFAULT_BATCH_SIZE) -> Iterator[Outcome]:
        """Answer requests in batches; yields (number, reply or what went wrong with it) as they finish.

        Raises:
            InputError: a request can not be served.
            UnavailableError: the attention backend can not hide padding.
        """
        asked = AttentionRequest.of(self.spec, device=self.device.type, dtype=self.model.dtype)
        asked = replace(asked, mask_features=asked.mask_features | {"padding"})
        if reasons := self.backend.supports(asked):
            raise UnavailableError(
                f"attention {self.attention!r} can not serve a batch: {'; '.join(reasons)}.",
                fix="Take --attention auto, or prompts one by one.",
            )
        return run_requests(self.model, self.tokenizer, requests, batch_size=batch_size)

    def drafter(self, draft: LanguageModel | None = None) -> Drafter:
        """A drafter for `generate`: a smaller model, or by default earlier text with the same last tokens.

        Raises:
            InputError: the draft model has another vocabulary.
        """
        if draft is None:
            return NgramDrafter(self.spec.vocab_size)
        return ModelDrafter(draft.model, draft.tokenizer, self.model, self.tokenizer)

    def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None, **sampling: Any) -> str:
        """The assistant's answer to a conversation. Options as for `generate`.

        Raises:
            InputError: the model has no chat template, or the conversation exceeds the context.
        """
        if not messages:
            raise InputError("the conversation is empty.", fix='Give [{"role": "user", "content": "..."}].')
        ids = self.tokenizer.encode_chat(messages)
        limit = max_new_tokens or max(1, self.spec.max_seq_len - len(ids))
        if self._session is None:
            self._session = self.session()
        return self._session.reply(ids, max_new_tokens=limit, sampling=self.sampling(**sampling)).read().text


def load(
    model: str | Path,
    *,
    precision: str = "auto",
    attention: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    compile: bool = False,  # noqa: A002 - as torch calls it
    adapters: Sequence[str | Path] = (),
    fetch: FetchOptions | None = None,
    registry: Registry | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """Load a model for inference.

    Args:
        model: a registry name, a model directory, a GGUF file, or a source such as ``hf:org/name``. What is not there
            yet is downloaded to `checkpoints_directory`.
        precision: a registered precision; ``auto`` takes the stored one where the device computes in it.
        attention: a registered backend; ``auto`` takes the first that can serve the model.
        device: ``auto`` (cuda, mps or cpu), or a torch device.
        quantize: a registered quantizer (``int8``, ``int4``); weights are quantized as they are read. By default the
            one that the directory was written for, if any.
        compile: decode with a compiled model; the first token then takes about a minute. Adapters are merged for it.
        adapters: adapter directories, PEFT's or zoo's, that apply one after the other.
        fetch: revision, token and offline mode for downloads.
        report: called with a line when something takes long.

    Raises:
        InputError: the model is unknown or damaged, or its config is not understood.
        UnavailableError: a choice can not be used on this machine.
    """
    registry = registry or default_registry()
    checkpoint = _open(model, fetch or FetchOptions(), registry, report)
    target = choose_device(device)
    quantizer = _choose_quantizer(quantize, checkpoint, target, registry)
    stored = checkpoint.tensors.dtype(next(iter(checkpoint.located())))
    is_quantized = checkpoint.quantized or quantizer is not None
    chosen = choose_precision(precision, stored=stored, quantized=is_quantized, device=target.type, registry=registry)
    request = AttentionRequest.of(checkpoint.spec, device=target.type, dtype=chosen.param_dtype)
    if compile:
        require_compiler()
        request = replace(request, mask_features=request.mask_features | {"queries"})
    backend = choose_attention(attention, request, registry)
    for directory in adapters:
        read_config(Path(directory))  # before any work
    notes = [f"{name} attention was not possible: {'; '.join(why)}" for name, why in backend.rejected.items()]
    if quantizer is None:
        loaded = load_model(checkpoint, backend.backend, dtype=chosen.param_dtype, device=target)
    else:
        loaded = load_quantized(checkpoint, backend.backend, quantizer, dtype=chosen.param_dtype, device=target)
    quantized = quantizer.name if quantizer else None
    lm = LanguageModel(loaded, checkpoint, chosen.name, backend.name, backend.backend, target, notes, quantized)
    for directory in adapters:
        adapter = lm.load_adapter(directory, name=f"adapter-{len(lm.adapters)}")
        lm.adapters.append(adapter)
        if compile:
            adapter.merge()
    lm.step = CompiledDecoding(loaded, report=report) if compile else None
    return lm


def _open(model: str | Path, options: FetchOptions, registry: Registry, report: Callable[[str], None]) -> Checkpoint:
    found = resolve_model(str(model), registry, checkpoints=checkpoints_directory(), options=options, report=report)
    return open_checkpoint(found.path, registry)


def _choose_quantizer(
    name: str | None, checkpoint: Checkpoint, device: torch.device, registry: Registry
) -> Quantizer | None:
    """The named one, or the one that the files were written for."""
    if name is not None:
        return choose_quantizer(name, device=device.type, registry=registry)
    if checkpoint.quantizer is None:
        return None
    fix = f"Take --device cpu, or dequantize it: zoo convert {checkpoint.path} NEW --to hf."
    return choose_quantizer(checkpoint.quantizer, device=device.type, registry=registry, fix=fix)


def build(
    model: str | ModelSpec,
    *,
    attention: str = "auto",
    seed: int | None = None,
    registry: Registry | None = None,
    **overrides: Any,
) -> GPT:
    """A randomly initialised model (float32, CPU).

    Args:
        model: a registry name, or a spec.
        overrides: fields of the spec to change; what the registry entry derives (head size, ffn width) follows.

    Raises:
        InputError: the name or a field is unknown, or a value is out of range.
    """
    registry = registry or default_registry()
    if isinstance(model, ModelSpec):
        spec = ModelSpec.from_dict({**model.to_dict(), **overrides})
    else:
        spec = ModelSpec.from_dict({**registry.model(model).spec_values, **overrides})
    request = AttentionRequest.of(spec, device="cpu", dtype=torch.float32, training=True)
    built = GPT(spec, choose_attention(attention, request, registry).backend)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    init_weights(built, generator)
    return built


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` cuda, then mps, then cpu.

    Raises:
        InputError: torch knows no such device.
        UnavailableError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {name!r}.", fix="Take auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU was found"
        raise UnavailableError(f"device {name!r} can not be used: {why}.", fix="Take --device cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {name!r} can not be used: there are {torch.cuda.device_count()} GPUs.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UnavailableError("device 'mps' can not be used: it needs an Apple GPU.", fix="Take --device cpu or auto.")
    return device
