"""Prompt styles: how a conversation becomes text, the same in training, in chat and in what is exported.

A style is a chat template as Hugging Face models carry it, with ``{% generation %}`` around what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.text.samples import INPUT_SEPARATOR, Encoded, Message, Sample

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

    from zoo.text.tokenizer import Tokenizer

FILE_NAME = "prompt_style.json"
"""Beside an adapter, or in a run: the style that it was trained with."""
MODEL = "model"
"""Name of the style that is the model's own chat template."""
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@dataclass(frozen=True)
class Rendered:
    """The text of one example.

    Attributes:
        text: to be encoded.
        replies: from which to which character of it the assistant speaks.
        bare: the tokenizer puts its own tokens before it, as before the prompt of ``generate``; otherwise ``text`` has
            all of them.
        ends: whether EOS follows, to be predicted.
    """

    text: str
    replies: list[tuple[int, int]]
    bare: bool = False
    ends: bool = False


@dataclass(frozen=True)
class PromptStyle:
    """How a conversation becomes text. `choose_prompt_style` makes one complete for a tokenizer.

    Attributes:
        name: the registered one, or where it came from.
        template: Jinja; ``None`` stands for the model's own, which `choose_prompt_style` fills in.
        stop: strings that end a reply. Found by `choose_prompt_style` where they are not given.
        bare: a prompt is encoded as `generate` does, so that its tokens are those of the same text there.
        splits_input: users' messages get a key ``input``, where the data has one apart from the instruction.
        today: the day (ISO) that templates see as the present one, so that a run which goes on tomorrow encodes the
            same ids. ``None``: the true one.
    """

    name: str
    template: str | None
    stop: tuple[str, ...] = ()
    bare: bool = False
    splits_input: bool = False
    today: str | None = None

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as chat sends it.

        Raises:
            InputError: the template refuses the messages.
        """
        from zoo.text.chat import render_chat

        return render_chat(
            self._template,
            messages,
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=add_generation_prompt,
            today=self._day,
        )

    def messages(self, sample: Sample) -> Sequence[Message]:
        """The conversation of an example, as the template sees it."""
        messages = sample.conversation
        return _with_input(messages, sample.input) if self.splits_input and sample.input else messages

    def rendered(self, sample: Sample, tokenizer: Tokenizer) -> Rendered:
        """The text of an example, and where it is learnt.

        Raises:
            InputError: the template refuses it, or writes earlier turns otherwise once later ones follow.
        """
        from zoo.text.chat import find_replies, marks_replies, render_chat_with_replies

        if sample.text is not None:
            return Rendered(sample.text, [(0, len(sample.text))], bare=True, ends=True)
        messages = self.messages(sample)
        marked = marks_replies(self._template)
        find = render_chat_with_replies if marked else find_replies
        text, replies = find(self._template, messages, special_tokens=tokenizer.special_tokens, today=self._day)
        if not marked:
            said = [message.get("content") for message in messages if message.get("role") == "assistant"]
            replies = [(a, _reply_end(text, a, b, c, tokenizer)) for (a, b), c in zip(replies, said, strict=True)]
        replies = _weighed(messages, replies)
        bos = _automatic_bos(tokenizer) or ""
        if self.bare and text.startswith(bos):
            return Rendered(text[len(bos) :], [(a - len(bos), b - len(bos)) for a, b in replies], bare=True)
        return Rendered(text, replies)

    def encode(self, sample: Sample, tokenizer: Tokenizer, *, train_on_prompt: bool = False) -> Encoded:
        """Ids of an example, and which of them are learnt: a token is when any of its characters is.

        Raises:
            InputError: as `rendered`; the tokenizer has no token for a character.
        """
        rendered = self.rendered(sample, tokenizer)
        placed = place(tokenizer.locate([rendered.text])[0])
        return assemble(rendered, placed, tokenizer, train_on_prompt=train_on_prompt, origin=sample.origin)

    def on(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with this style for its chat template: for chat, and for what is exported."""
        from zoo.text.tokenizer import Tokenizer

        return Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": self._template})

    def to_dict(self) -> dict[str, Any]:
        """All of it, the template included: what was trained does not change with a later version of zoo."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptStyle:
        """What `to_dict` returned.

        Raises:
            InputError: it is something else.
        """
        known = {field.name for field in fields(cls)}
        stop = values.get("stop", ())
        if not {"name", "template"} <= values.keys() <= known or not isinstance(values["template"], str):
            raise InputError(f"no prompt style: {', '.join(map(str, values)) or 'it is empty'}.")
        return cls(**{**values, "stop": tuple(stop)})

    def save(self, directory: Path) -> None:
        """Write `FILE_NAME` into an adapter or run directory."""
        text = json.dumps({"schema": 1, **self.to_dict()}, indent=2, ensure_ascii=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @property
    def _template(self) -> str:
        assert self.template is not None, "a style is completed by choose_prompt_style"
        return self.template

    @property
    def _day(self) -> date | None:
        return None if self.today is None else date.fromisoformat(self.today)


def read_prompt_style(directory: Path) -> PromptStyle | None:
    """The style that an adapter or run directory was trained with, if it says so.

    Raises:
        FileFormatError: the file is damaged.
    """
    from zoo.text.json_files import read_json_object

    path = directory / FILE_NAME
    if not path.is_file():
        return None
    values = read_json_object(path)
    if values.pop("schema", None) != 1:
        raise FileFormatError(f"{path} is of another version of zoo.", fix="It must have 'schema': 1.")
    try:
        return PromptStyle.from_dict(values)
    except InputError as error:
        raise FileFormatError(f"{path}: {error.message}") from None


def choose_prompt_style(
    name: str | None, tokenizer: Tokenizer, registry: Registry, *, plain: bool = False
) -> PromptStyle:
    """The style of that name, complete: with the model's template and BOS where they are wanted, and its stop strings.

    Args:
        name: a registered one, or the path of a Jinja template (``*.jinja``). ``None`` and ``auto``: the model's own
            chat template, and without one ``plain`` if the data is prompts with completions, or text.
        plain: whether it is.

    Raises:
        InputError: the model has no chat template; the style needs an EOS that the tokenizer lacks.
        UnknownNameError: no style has this name.
    """
    if name in (None, "auto"):
        name = "plain" if plain and tokenizer.chat_template is None else MODEL
    if name.endswith(".jinja"):
        return complete(PromptStyle(Path(name).stem, _read_template(Path(name))), tokenizer)
    style: PromptStyle = registry.load("prompt", name)
    if style.template is None:
        if tokenizer.chat_template is None:
            others = ", ".join(ref for ref, _ in registry.components("prompt") if ref != MODEL)
            raise InputError(
                "this model has no chat template, so how a conversation becomes text is your choice.",
                fix=f"Give --prompt-style: {others}, or the path of a template, FILE.jinja.",
            )
        style = replace(style, template=tokenizer.chat_template)
        return style if style.stop else replace(style, stop=_stop_strings(style, tokenizer))
    return complete(style, tokenizer)


def complete(style: PromptStyle, tokenizer: Tokenizer) -> PromptStyle:
    """A style with BOS in front where the tokenizer puts one before every text, and its stop strings.

    Raises:
        InputError: the template needs a token that the tokenizer lacks, or is no valid template.
    """
    if "eos_token" in style._template and "eos_token" not in tokenizer.special_tokens:
        raise InputError(
            f"the prompt style {style.name!r} ends replies with the tokenizer's end-of-text token, and it has none.",
            fix="Take a tokenizer that has one, such as 'byte'.",
        )
    bos = _automatic_bos(tokenizer)
    if bos and not style.render(_PROBE[:1], tokenizer).startswith(bos):
        style = replace(style, template="{{- bos_token }}" + style._template)
    return style if style.stop else replace(style, stop=_stop_strings(style, tokenizer))


class Placed(NamedTuple):
    """The tokens of a text: ids (T,) int32, and from which to which character each lies, (T, 2)."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]


def place(located: tokenizers.Encoding) -> Placed:
    """What `Tokenizer.locate` found for a text, as arrays."""
    import numpy as np

    return Placed(np.array(located.ids, np.int32), np.array(located.offsets, np.int64).reshape(-1, 2))


def assemble(
    rendered: Rendered,
    placed: Placed,
    tokenizer: Tokenizer,
    *,
    train_on_prompt: bool = False,
    origin: str = "",
) -> Encoded:
    """The ids of a rendered example and its mask, from the places of its tokens."""
    import numpy as np

    ids, offsets = placed
    learnt = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.replies:
        learnt |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    if rendered.bare:
        before, after = tokenizer.ends
        if rendered.ends and not after and tokenizer.eos_id is not None:
            after = [tokenizer.eos_id]
        after = after if rendered.ends else []
        ids = np.concatenate([np.asarray(before, np.int32), ids, np.asarray(after, np.int32)])
        learnt = np.concatenate([np.zeros(len(before), bool), learnt, np.ones(len(after), bool)])
    if train_on_prompt:
        learnt[:] = True
    learnt[:1] = False
    return Encoded(ids, learnt, origin)


def n_straddling(rendered: Rendered, placed: Placed) -> int:
    """Replies that begin inside a token: a prompt that ends there has other tokens than it had in training."""
    first, last = placed.offsets.T
    return sum(bool(((first < start) & (start < last)).any()) for start, _ in rendered.replies)


def _with_input(messages: Sequence[Message], given: str) -> list[Message]:
    """The messages with the input taken off the end of the last that the user sent."""
    last = max(i for i, message in enumerate(messages) if message.get("role") == "user")
    text = messages[last]["content"].removesuffix(INPUT_SEPARATOR + given)
    split = {**messages[last], "content": text, "input": given}
    return [*messages[:last], split, *messages[last + 1 :]]


def _weighed(messages: Sequence[Message], replies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The replies without those whose message has ``weight`` 0, as in OpenAI's format."""
    weights = [message.get("weight", 1) for message in messages if message.get("role") == "assistant"]
    if all(weight == 1 for weight in weights):
        return replies
    if len(weights) != len(replies):
        raise InputError("the chat template marks its replies in pieces, so a weight of 0 can not be told apart.")
    return [reply for reply, weight in zip(replies, weights, strict=True) if weight]


def _reply_end(text: str, start: int, end: int, said: Any, tokenizer: Tokenizer) -> int:
    """Where a reply ends: with the first special token after what was said. What follows is layout."""
    said = said.strip() if isinstance(said, str) else ""
    found = text.rfind(said, start, end) if said else -1
    after = start if found < 0 else found + len(said)
    ends = [place + len(token) for token in tokenizer.marks if (place := text.find(token, after, end)) >= 0]
    return min(ends, default=end)


def _automatic_bos(tokenizer: Tokenizer) -> str | None:
    """The BOS that the tokenizer puts before every text, if it does."""
    bos = tokenizer.special_tokens.get("bos_token")
    return bos if bos is not None and tokenizer.bos_id in tokenizer.ends[0] else None


def _stop_strings(style: PromptStyle, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What the style writes after a reply; nothing for templates that refuse to tell."""
    try:
        found = style.rendered(Sample(messages=_PROBE), tokenizer)
    except InputError:
        return ()
    said = found.text[slice(*found.replies[-1])] if found.replies else ""
    end = said.rpartition(_PROBE[1]["content"])[2].strip()
    return (end,) if end else ()


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can not read the chat template {path}: {error}.") from None
