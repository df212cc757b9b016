"""How good a model is on data: how well it predicts it, and how often its answers are exactly those of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from zoo.data.batches import Batch, collate, deal
from zoo.data.encode import encode_samples
from zoo.data.token_file import TokenFile
from zoo.errors import InputError, ZooError
from zoo.generate.reply import Reply, Request
from zoo.generate.sampling import SamplingOptions
from zoo.language_model import DEFAULT_BATCH_SIZE, LanguageModel
from zoo.registry import Registry
from zoo.runs.data import left_out
from zoo.runs.evaluation_data import EvaluationData, bytes_of_supervised, bytes_of_tokens, n_windows, windows
from zoo.text.prompts import PromptStyle, choose_prompt_style
from zoo.text.samples import Message, Sample
from zoo.train.loss import supervised_loss

MORE_TOKENS = 16
"""An answer may have so many tokens more than the one of the data, by default: a longer one is wrong anyhow."""

Watch = Callable[[str, int, int], None]
"""Called with what is counted, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class ExactMatch:
    """Answers, compared with those of the data but for white space at their ends.

    Attributes:
        n_right: those that ended by themselves and are the same.
        n_asked: prompts that were answered.
        n_unfinished: answers that were cut off at the limit of new tokens; none of them is right.
        n_not_asked: prompts that are empty, or to whose answers the context has no room.
    """

    n_right: int
    n_asked: int
    n_unfinished: int
    n_not_asked: int

    @property
    def share(self) -> float | None:
        """Right ones of those that were asked."""
        return self.n_right / self.n_asked if self.n_asked else None


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        nats: negative log-likelihood of all predicted tokens together.
        n_tokens: how many those are. Of examples: what the assistant says, and the tokens that end it.
        n_bytes: UTF-8 bytes of their text.
        style: the prompt style of examples.
        counts: what became of examples, as `zoo.data.encode.EncodingReport` has it.
        left_out: the same in words; nothing, if all is there.
        window, stride: of a text: see `zoo.runs.evaluation_data.windows`.
    """

    data: str
    format: str
    nats: float
    n_tokens: int
    n_bytes: int
    style: str | None = None
    counts: dict[str, Any] | None = None
    left_out: str = ""
    window: int | None = None
    stride: int | None = None
    exact: ExactMatch | None = None

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as the loss is not."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rates included."""
        rates = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        exact = None if self.exact is None else {**asdict(self.exact), "share": self.exact.share}
        return {**asdict(self), **rates, "exact": exact}


def evaluate(
    lm: LanguageModel,
    data: EvaluationData,
    registry: Registry,
    *,
    prompt_style: str | None = None,
    max_seq_len: int | None = None,
    stride: int | None = None,
    exact_match: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    report: Callable[[str], None] = lambda line: None,
    watch: Watch = lambda what, done, of: None,
) -> Evaluation:
    """Evaluate a model, with the adapters that are active.

    Args:
        data: what `read_evaluation_data` returned.
        prompt_style: a registered one or a template, as in training. By default the one that the adapters were trained
            with, and otherwise the model's own.
        max_seq_len: tokens of an example or a window, at most; by default what the model can see.
        stride: of a text: tokens by which windows move on; by default a window's size, so that they do not overlap.
        exact_match: answer the prompts of examples too, greedily and without any penalty.
        max_new_tokens: of an answer; by default `MORE_TOKENS` more than the one of the data has.
        report: told what an option outvotes.

    Raises:
        InputError: an option does not fit the data or the model, or there is nothing to predict.
        ZooError: the model's logits are no finite numbers.
    """
    work = _Work(lm, _size(lm, max_seq_len, batch_size), batch_size, watch)
    if data.samples:
        if stride is not None:
            raise InputError("--stride is for running text, and this data is examples.", fix="Leave it out.")
        style = _style(lm, data, prompt_style, registry, report)
        return _of_samples(work, data, style, exact_match=exact_match, max_new_tokens=max_new_tokens)
    for is_given, option in ((prompt_style is not None, "--prompt-style"), (exact_match, "--exact-match")):
        if is_given:
            raise InputError(f"{option} is for examples, and this data is running text.", fix="Leave it out.")
    return _of_text(work, data, stride)


@dataclass(frozen=True)
class _Work:
    """A model, how much it takes at a time, and who watches."""

    lm: LanguageModel
    size: int
    batch_size: int
    watch: Watch


def _size(lm: LanguageModel, max_seq_len: int | None, batch_size: int) -> int:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    context = lm.spec.max_seq_len
    if max_seq_len is not None and max_seq_len > context:
        raise InputError(f"max_seq_len {max_seq_len} is beyond the model's context of {context} tokens.")
    if max_seq_len is not None and max_seq_len < 2:
        raise InputError(f"max_seq_len must be at least 2, not {max_seq_len}.")
    return max_seq_len or context


def _style(
    lm: LanguageModel, data: EvaluationData, name: str | None, registry: Registry, report: Callable[[str], None]
) -> PromptStyle:
    """The one that is named, the adapters', or the model's own, in this order."""
    if name is None and (trained_with := lm.style_with()) is not None:
        return trained_with
    plain = data.format in ("completion", "text")
    style = choose_prompt_style(name, lm.tokenizer, registry, plain=plain)
    for adapter, other in lm.adapter_styles.items():
        if (other.template, other.stop) != (style.template, style.stop):
            report(f"prompt style {style.name}, as given; the adapter {adapter} was trained with {other.name}.")
    return style


def _of_samples(
    work: _Work, data: EvaluationData, style: PromptStyle, *, exact_match: bool, max_new_tokens: int | None
) -> Evaluation:
    tokenizer = work.lm.tokenizer
    questions = _questions(data, style) if exact_match else []
    encoded = encode_samples(data.samples, style, tokenizer, max_seq_len=work.size)
    rows = [(sequence,) for sequence in encoded.sequences]
    batches = deal(rows, rank=0, world_size=1, micro_batch_size=work.batch_size, packed=False)
    nats, n_tokens = _predict(work, batches, len(batches))
    counts = encoded.report
    return Evaluation(
        data=data.name,
        format=data.format,
        nats=nats,
        n_tokens=n_tokens,
        n_bytes=sum(bytes_of_supervised(sequence, tokenizer) for sequence in encoded.sequences),
        style=style.name,
        counts={**counts.to_dict(), "n_without_reply": data.n_without_reply},
        left_out=left_out(data.n_without_reply, counts.n_truncated, counts.n_masked, work.size),
        exact=_compare(work, questions, style, max_new_tokens) if exact_match else None,
    )


def _of_text(work: _Work, data: EvaluationData, stride: int | None) -> Evaluation:
    """Texts begin as the tokenizer begins a text, and each has windows of its own. A token file is as it is."""
    tokenizer, size = work.lm.tokenizer, work.size
    if data.tokens is not None:
        ids = [TokenFile.open(data.tokens, tokenizer).ids]
        n_bytes, before = bytes_of_tokens(ids[0], tokenizer), []
    else:
        located = tokenizer.locate(data.texts)
        ids = [np.asarray(one.ids, np.int32) for one in located]
        before = tokenizer.ends[0]
        starts = [0 if before or not one.offsets else one.offsets[0][1] for one in located]
        n_bytes = sum(len(text[start:].encode()) for text, start in zip(data.texts, starts, strict=True))
    longest = size + 1 - max(1, len(before))
    if stride is not None and not 1 <= stride <= longest:
        raise InputError(
            f"stride must be from 1 to {longest}, which is what a window of {size} predicts, not {stride}."
        )
    stride = stride or longest
    n = sum(n_windows(len(one), n_before=len(before), size=size, stride=stride) for one in ids)
    if not n:
        raise InputError(f"{data.name} has a single token, and nothing to predict.")
    rows = chain.from_iterable(windows(one, before, size=size, stride=stride) for one in ids)
    groups = iter(lambda: [(window,) for window in islice(rows, work.batch_size)], [])
    batches = (collate(group, packed=False) for group in groups)
    nats, n_tokens = _predict(work, batches, -(-n // work.batch_size))
    return Evaluation(data.name, data.format, nats, n_tokens, n_bytes, window=size, stride=stride)


@torch.no_grad()
def _predict(work: _Work, batches: Iterable[Batch], n_batches: int) -> tuple[float, int]:
    """Nats of all targets, and how many there are."""
    nats, n_tokens, lm = 0.0, 0, work.lm
    lm.model.eval()
    for number, batch in enumerate(batches, 1):
        loss, n_targets = supervised_loss(lm.model, batch.to(lm.device))
        nats, n_tokens = nats + float(loss), n_tokens + n_targets
        work.watch("batches", number, n_batches)
    if not math.isfinite(nats):
        raise ZooError(
            f"the loss is {nats}: the model's logits are no finite numbers.", fix="Take --precision 32-true."
        )
    return nats, n_tokens


def _questions(data: EvaluationData, style: PromptStyle) -> list[tuple[Sequence[Message], str]]:
    found = [question for sample in data.samples if (question := _question(sample, style)) is not None]
    if not found:
        raise InputError(
            f"--exact-match compares answers, and {data.name} has no prompt with an answer in text.",
            fix="Leave it out, or give prompts with completions, or conversations.",
        )
    return found


def _question(sample: Sample, style: PromptStyle) -> tuple[Sequence[Message], str] | None:
    """What comes before the last answer that is learnt, and that answer."""
    messages = style.messages(sample)
    learnt = (i for i, one in enumerate(messages) if one.get("role") == "assistant" and one.get("weight", 1))
    last = max(learnt, default=0)
    answer = messages[last].get("content") if last else None
    return (messages[:last], answer) if isinstance(answer, str) else None


def _compare(
    work: _Work, questions: Sequence[tuple[Sequence[Message], str]], style: PromptStyle, max_new_tokens: int | None
) -> ExactMatch:
    made = [(_request(work.lm, asked, answer, style, max_new_tokens), answer) for asked, answer in questions]
    fitting = [(request, answer.strip()) for request, answer in made if request is not None]
    n_right = n_unfinished = 0
    replies = _replies(work, [request for request, _ in fitting])
    for number, (place, reply) in enumerate(replies, 1):
        ended = reply.finish_reason == "stop"
        n_unfinished += not ended
        n_right += ended and reply.text.strip() == fitting[place][1]
        work.watch("answers", number, len(fitting))
    return ExactMatch(n_right, len(fitting), n_unfinished, len(made) - len(fitting))


def _request(
    lm: LanguageModel, asked: Sequence[Message], answer: str, style: PromptStyle, max_new_tokens: int | None
) -> Request | None:
    """Greedy. ``None``: the context has no room for the answer and the token that ends it, or nothing is asked."""
    ids = lm.tokenizer.encode(style.render(asked, lm.tokenizer), add_special_tokens=False)
    needed = len(lm.tokenizer.encode(answer, add_special_tokens=False))
    room = lm.spec.max_seq_len - len(ids)
    if not ids or room <= needed:
        return None
    return Request(
        prompt_ids=ids,
        max_new_tokens=min(room, max_new_tokens or needed + MORE_TOKENS),
        sampling=SamplingOptions(temperature=0.0),
        stop=style.stop,
        stop_ids=lm.stop_ids,
    )


def _replies(work: _Work, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
    for place, outcome in work.lm.run(requests, batch_size=work.batch_size) if requests else ():
        if not isinstance(outcome, Reply):
            raise outcome
        yield place, outcome
