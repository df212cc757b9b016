"""What the model writes on its way: the same prompts, greedily, at each evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from zoo.generate.reply import Reply
from zoo.language_model import LanguageModel
from zoo.text.samples import Message, Sample
from zoo.train.metrics import read_metrics

N_SAMPLES = 3
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that the data has for it."""

    prompt: str | tuple[Message, ...]
    shown: str
    expected: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the model wrote after so many steps."""

    step: int
    prompt: str
    expected: str | None
    text: str


def questions_of(samples: Sequence[Sample], prompts: Sequence[str], *, chat: bool) -> list[Question]:
    """The prompts that are given, or else those of the first samples.

    Args:
        chat: whether prompts are what a user says, and not text to be continued.
    """
    if prompts:
        return [Question(({"role": "user", "content": text},) if chat else text, text) for text in prompts]
    return [question for sample in samples[:N_SAMPLES] if (question := _question(sample, chat=chat))]


def _question(sample: Sample, *, chat: bool) -> Question | None:
    if sample.text is not None:
        return None
    if not chat and sample.prompt is not None:
        return Question(sample.prompt, sample.prompt, sample.completion)
    messages = sample.conversation
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        return None
    asked = messages[:last]
    return Question(tuple(asked), str(asked[-1]["content"]), str(messages[last].get("content")))


class Sampler:
    """Writes answers to ``samples.jsonl``.

    Args:
        after: the step that the run resumes from; later lines are cut off.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question],
        path: Path,
        *,
        stop: Sequence[str] = (),
        after: int = 0,
        say: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self._lm, self._questions, self._path, self._stop, self._say = lm, questions, path, stop, say
        kept = [line for line in read_metrics(path) if line["step"] <= after] if after and path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def __call__(self, step: int) -> list[Answer]:
        """Answer all questions with the model as it is."""
        with _writing(self._lm):
            texts = self._texts()
        answers = [Answer(step, q.shown, q.expected, text) for q, text in zip(self._questions, texts, strict=True)]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        for answer in answers:
            self._say(answer)
        return answers

    def _texts(self) -> list[str]:
        """All answers as one batch."""
        requests = [self._lm.request(q.prompt, stop=self._stop, temperature=0.0) for q in self._questions]
        requests = [replace(r, max_new_tokens=min(MAX_NEW_TOKENS, r.max_new_tokens)) for r in requests]
        outcomes = dict(self._lm.run(requests))
        return [
            outcome.text.strip() if isinstance(outcome, Reply) else f"({outcome})"
            for _, outcome in sorted(outcomes.items())
        ]


@contextmanager
def _writing(lm: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode, and the random generator left as it was."""
    is_training, state = lm.model.training, torch.random.get_rng_state()
    lm.model.eval()
    try:
        yield
    finally:
        lm.model.train(is_training)
        torch.random.set_rng_state(state)
