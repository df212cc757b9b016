"""A model with its weights and its tokenizer: what `zoo.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch

from zoo.adapters.attach import AttachedAdapter, attached_to
from zoo.adapters.switch import check_names, using, within
from zoo.adapting import adapt, find_adapter, load_adapter
from zoo.attention.base import AttentionBackend, AttentionRequest
from zoo.convert.adapter_names import FamilyNames
from zoo.convert.base import Checkpoint
from zoo.convert.export import Exported, export_model
from zoo.convert.from_model import from_model
from zoo.errors import InputError, UnavailableError
from zoo.families.base import Family
from zoo.generate.batch import Outcome, run_requests
from zoo.generate.chat import Conversation
from zoo.generate.compile import CompiledDecoding
from zoo.generate.decode import Session
from zoo.generate.reply import Reply, Request
from zoo.generate.sampling import SamplingOptions
from zoo.generate.speculative import DEFAULT_DRAFT_TOKENS, Drafter, ModelDrafter, NgramDrafter, Speculation
from zoo.models.decoder import Decoder, decoder_of
from zoo.precision.base import Converted
from zoo.spec import ModelSpec
from zoo.text.chat import Message
from zoo.text.prompts import PromptStyle, read_prompt_style
from zoo.text.tokenizer import Tokenizer

T = TypeVar("T")

DEFAULT_NEW_TOKENS = 128
DEFAULT_BATCH_SIZE = 16


@dataclass
class LanguageModel:
    """A model with its weights, its tokenizer and what its files say about generation."""

    model: Any
    """`zoo.models.gpt.GPT`, or the `torch.nn.Module` that its family builds."""
    checkpoint: Checkpoint
    precision: str
    attention: str
    backend: AttentionBackend | None
    """`None` for a module with an attention of its own."""
    device: torch.device
    notes: list[str]
    """What ``auto`` chose, and why."""
    quantized: str | None = None
    """The quantizer whose layers it has."""
    converted: Converted | None = None
    """What its precision made of its layers, of a model that is trained."""
    step: CompiledDecoding | None = None
    """Runs single tokens compiled."""
    adapters: list[AttachedAdapter] = field(default_factory=list)
    """Those that it was loaded with."""
    style: PromptStyle | None = None
    """How conversations become text, if not as the tokenizer's chat template says."""
    adapter_styles: dict[str, PromptStyle] = field(default_factory=dict)
    """The styles that its adapters were trained with, by their names; they outrank ``style``."""

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

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take another tokenizer, or the same with another chat template; `save` writes it with the model."""
        self._tokenizer = tokenizer
        self.checkpoint = self.checkpoint.with_tokenizer(tokenizer)

    def use_style(self, style: PromptStyle) -> None:
        """Render conversations so, whatever the adapters were trained with; `save` writes it with the model."""
        self.style = style
        self.adapter_styles.clear()

    def style_with(self, adapter: str | Sequence[str] | None = None) -> PromptStyle | None:
        """How conversations become text; ``None``: as the tokenizer's chat template says.

        Args:
            adapter: as for `generate`.

        Raises:
            InputError: two of the adapters were trained with different styles.
        """
        names = (adapter,) if isinstance(adapter, str) else adapter
        if names is None:
            names = [name for name, handle in attached_to(self.model).items() if handle.active or handle.merged]
        found = {name: self.adapter_styles[name] for name in names if name in self.adapter_styles}
        styles = {(style.template, style.stop): style for style in found.values()}
        if len(styles) > 1:
            told = ", ".join(f"{name} with {style.name}" for name, style in found.items())
            raise InputError(
                f"the adapters were trained with different prompt styles: {told}.",
                fix="Choose one of the adapters, or give the style: use_style(...), --prompt-style or --chat-template.",
            )
        return next(iter(styles.values()), self.style)

    @property
    def decoder(self) -> Decoder:
        """The model as generation sees it."""
        return decoder_of(self.model, self.spec)

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

    def load_adapter(self, path: str | Path, *, name: str = "default", **options: Any) -> AttachedAdapter:
        """Put an adapter on the model that is on disk: `zoo.load_adapter`, by the family's names."""
        outside, base = self._outside, str(self.checkpoint.path)
        notes: list[str] = []
        found, given = find_adapter(path, notes.append)
        handle = load_adapter(self.model, found, name=name, names=outside, base=base, **(given | options))
        if (style := read_prompt_style(found)) is not None:
            self.adapter_styles[name] = style
            notes.append(f"conversations are rendered as in its training: prompt style {style.name}")
        handle.notes += notes
        return handle

    def save(self, directory: str | Path) -> Exported:
        """Write the model as it is now, merged adapters included, as a Hugging Face directory.

        How conversations become text is part of it.

        Raises:
            InputError: the directory is not empty, an adapter is active and not merged, or as `style_with`.
        """
        style = self.style_with()
        checkpoint = self.checkpoint if style is None else self.checkpoint.with_style(style)
        exported = export_model(from_model(self.model, checkpoint), Path(directory))
        if style is not None:
            style.save(Path(directory))
        return exported

    @property
    def _outside(self) -> FamilyNames:
        if self.step is not None:
            raise InputError("a compiled model takes no adapter.", fix="Load it with adapters=[...].")
        return FamilyNames(self.checkpoint.family.keys, self.spec, self.family.model_type)

    def session(self) -> Session:
        """A new sequence with a cache of its own."""
        return Session(self.decoder, self.tokenizer, self.stop_ids, self.step)

    def conversation(self, *, system: str | None = None) -> Conversation:
        """A new conversation. Raises as `style_with`."""
        tokenizer, stop = self._dialogue()
        session = Session(self.decoder, tokenizer, self.stop_ids, self.step)
        return Conversation(session, system=system, stop=stop)

    def _dialogue(self, adapter: Sequence[str] | None = None) -> tuple[Tokenizer, Sequence[str]]:
        """A tokenizer that renders conversations as the adapters were trained, and the strings that end a reply."""
        style = self.style_with(adapter)
        return (self.tokenizer, ()) if style is None else (style.on(self.tokenizer), style.stop)

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
        adapter: str | Sequence[str] | None = None,
        drafter: Drafter | None = None,
        draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        **sampling: Any,
    ) -> str | Reply:
        """Continue ``prompt``; returns the new text, or with ``stream`` a `Reply` to iterate over.

        Args:
            max_new_tokens: by default 128, or what the context has room for.
            stop: strings before which the text ends.
            sample: number of the sample: those of one seed differ, and each can be had again.
            adapter: the name of the adapter to compute with, or several, or none: ``()``. By default those that are
                active.
            drafter: guesses up to ``draft_tokens`` ahead, to be verified at once; see `drafter`.
            sampling: fields of `SamplingOptions`; ``temperature=0`` is greedy.

        Raises:
            InputError: the prompt is empty, the request exceeds the context, an option is out of range, or the model
                has no such adapter.
        """
        request = self.request(
            prompt, max_new_tokens=max_new_tokens, stop=stop, sample=sample, adapter=adapter, **sampling
        )
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
        reply.pieces = self._computed_with(request.adapters, reply.pieces)
        return reply if stream else reply.read().text

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        adapter: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> list[Reply]:
        """Continue many prompts, ``batch_size`` at a time; each as `generate` does with ``sample=`` its number.

        Raises:
            InputError: as `generate`, before any work.
            UnavailableError: the attention backend can not hide padding.
            ZooError: the model's logits are not finite numbers for one of them.
        """
        requests = [
            self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, sample=number, adapter=adapter, **sampling)
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
        adapter: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> Request:
        """A text to continue or a conversation to answer, for `run`. Options as for `generate`."""
        names = (adapter,) if isinstance(adapter, str) else adapter
        check_names(self.model, names or ())
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            tokenizer, ends = self._dialogue(names)
            ids, stop = tokenizer.encode_chat(prompt), (*stop, *ends)
        room = max(1, self.spec.max_seq_len - len(ids))
        return Request(
            prompt_ids=ids,
            max_new_tokens=min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens,
            sampling=self.sampling(**sampling),
            stop=stop,
            stop_ids=self.stop_ids,
            sample=sample,
            adapters=None if names is None else tuple(names),
        )

    def run(self, requests: Sequence[Request], *, batch_size: int = DEFAULT_BATCH_SIZE) -> Iterator[Outcome]:
        """Answer requests in batches, those of one choice of adapters together.

        Yields (number, reply or what went wrong with it) as they finish.

        Raises:
            InputError: a request can not be served.
            UnavailableError: the attention backend can not hide padding.
        """
        if self.backend is not None:
            self._check_padding(self.backend)
        for request in requests:
            request.check(self.spec)  # before any work
        return self._run(requests, batch_size)

    def _run(self, requests: Sequence[Request], batch_size: int) -> Iterator[Outcome]:
        for adapters in dict.fromkeys(request.adapters for request in requests):
            numbers = [number for number, request in enumerate(requests) if request.adapters == adapters]
            chosen = [requests[number] for number in numbers]
            outcomes = run_requests(self.decoder, self.tokenizer, chosen, batch_size=batch_size)
            for place, outcome in self._computed_with(adapters, outcomes):
                yield numbers[place], outcome

    def _computed_with(self, adapters: tuple[str, ...] | None, items: Iterator[T]) -> Iterator[T]:
        return items if adapters is None else within(partial(using, self.model, adapters), items)

    def _check_padding(self, backend: AttentionBackend) -> None:
        asked = AttentionRequest.of(self.spec, device=self.device.type, dtype=self.decoder.dtype)
        asked = replace(asked, mask_features=asked.mask_features | {"padding"})
        if reasons := backend.supports(asked):
            raise UnavailableError(
                f"attention {self.attention!r} can not serve a batch: {'; '.join(reasons)}.",
                fix="Take --attention auto, or prompts one by one.",
            )

    def drafter(self, draft: LanguageModel | None = None) -> Drafter:
        """A drafter for `generate`: a smaller model, or by default earlier text with the same last tokens.

        Raises:
            InputError: the draft model has another vocabulary.
        """
        if draft is None:
            return NgramDrafter(self.spec.vocab_size)
        return ModelDrafter(draft.decoder, draft.tokenizer, self.decoder, self.tokenizer)

    def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None, **sampling: Any) -> str:
        """The assistant's answer to a conversation. Options as for `generate`.

        Raises:
            InputError: the model has no chat template, or the conversation exceeds the context.
        """
        if not messages:
            raise InputError("the conversation is empty.", fix='Give [{"role": "user", "content": "..."}].')
        tokenizer, stop = self._dialogue()
        ids = tokenizer.encode_chat(messages)
        limit = max_new_tokens or max(1, self.spec.max_seq_len - len(ids))
        if self._session is None:
            self._session = self.session()
        reply = self._session.reply(ids, max_new_tokens=limit, sampling=self.sampling(**sampling), stop=stop)
        return reply.read().text
