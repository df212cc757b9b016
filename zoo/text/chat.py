"""Chat templates: Jinja as Hugging Face models carry it, rendered in a sandbox.

Templates for training put ``{% generation %}`` and ``{% endgeneration %}`` around what the assistant says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zoo.errors import InputError
from zoo.text.samples import Message

__all__ = ["Message", "find_replies", "marks_replies", "render_chat", "render_chat_with_replies"]

_REPLIES = "_zoo_replies"
"""The template variable that collects where replies lie."""


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    today: date | None = None,
) -> str:
    """The text of a conversation, as ``transformers``' ``apply_chat_template(tokenize=False)`` renders it.

    Args:
        today: the date that templates see, for text that has to be the same tomorrow. By default the true one.

    Raises:
        InputError: there are no messages, the template is no valid Jinja, or it refuses them (say, two user turns
            in a row).
    """
    variables = {**special_tokens, **_clock(today), "add_generation_prompt": add_generation_prompt}
    return "".join(_rendered(template, messages, variables))


def render_chat_with_replies(
    template: str, messages: Sequence[Message], *, special_tokens: Mapping[str, str], today: date | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and from where to where in it the template says that the assistant speaks.

    Raises:
        InputError: as `render_chat`, or the template does not mark what the assistant says.
    """
    if not marks_replies(template):
        raise InputError(
            "the chat template does not mark what the assistant says.",
            fix="Put {% generation %} and {% endgeneration %} around it in the template.",
        )
    written: list[str] = []
    replies: list[tuple[int, int]] = []
    variables = {**special_tokens, **_clock(today), "add_generation_prompt": False}

    def note(text: str) -> None:
        # Jinja yields a piece before it goes on, so what was written so far is where this one starts.
        start = sum(map(len, written))
        replies.append((start, start + len(text)))

    for piece in _rendered(template, messages, {**variables, _REPLIES: note}):
        written.append(piece)
    return "".join(written), replies


def marks_replies(template: str) -> bool:
    """Whether the template says where the assistant speaks."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def find_replies(
    template: str, messages: Sequence[Message], *, special_tokens: Mapping[str, str], today: date | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """As `render_chat_with_replies`, for a template without marks: the conversation is rendered up to each reply.

    A reply goes from where the prompt for it ends to where the conversation up to it ends.

    Raises:
        InputError: as `render_chat`, or the template writes earlier turns otherwise once later ones follow.
    """

    def render(count: int, *, prompt: bool) -> str:
        return render_chat(
            template, messages[:count], special_tokens=special_tokens, add_generation_prompt=prompt, today=today
        )

    whole = render(len(messages), prompt=False)
    replies: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        after = whole if number + 1 == len(messages) else render(number + 1, prompt=False)
        # Nothing can be rendered before a conversation that the assistant begins, so its words are looked for.
        before = render(number, prompt=True) if number else after.partition(str(message.get("content")).strip())[0]
        # Some templates end a whole conversation, and only that, with EOS.
        ends = [after, *(after.rstrip().removesuffix(token) for token in special_tokens.values())]
        end = next((len(text) for text in ends if whole.startswith(text)), 0)
        if not whole.startswith(before) or end < len(before):
            raise InputError(
                f"the chat template writes turn {number + 1} of this conversation in another way than when it was the "
                "last, so what the assistant says in it can not be told.",
                fix="Put {% generation %} and {% endgeneration %} into the template, take another prompt style, or "
                "conversations of one turn.",
            )
        replies.append((len(before), end))
    return whole, replies


def _clock(today: date | None) -> dict[str, Any]:
    return {} if today is None else {"strftime_now": today.strftime}


def _rendered(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> Iterator[str]:
    if not messages:
        raise InputError("a conversation needs at least one message.")
    # A key without a value counts as absent: templates would write "None".
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        yield from _compile(template).generate(messages=plain, tools=None, documents=None, **variables)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # it is foreign code
        raise InputError(f"the chat template refuses this conversation: {error}.") from None


class _Generation(Extension):
    """``{% generation %}``: writes its body, and notes where it lies if the one who renders asks for it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_write", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, context: Context, caller: Macro) -> str:
        text = str(caller())
        note = context.get(_REPLIES)
        if note is not None:
            note(text)
        return text


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which templates do not expect.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
