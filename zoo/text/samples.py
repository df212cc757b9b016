"""A training example before and after it became token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Message = Mapping[str, Any]
"""``{"role": "user", "content": "Hi"}``."""

INPUT_SEPARATOR = "\n\n"
"""Between the instruction and the input of an Alpaca row, in the message that both become."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example: a conversation, a prompt with its completion, or a text.

    Attributes:
        messages: a conversation; what the assistant says in it is learnt.
        prompt, completion: given and learnt, exactly as they are written.
        text: learnt as a whole.
        input: of an Alpaca row with an input: the end of its last user message, after `INPUT_SEPARATOR`. Prompt styles
            with a place of its own for it take it off that message.
        origin: ``file:line``, for errors.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    input: str | None = None
    origin: str = ""

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages; a prompt is what the user says, and its completion the answer. A text has none."""
        if self.messages is not None:
            return self.messages
        if self.prompt is None:
            return ()
        return ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion or ""})

    @property
    def teaches(self) -> bool:
        """Whether there is anything to learn: a text, or words of the assistant."""
        return bool(self.text) or any(message.get("role") == "assistant" for message in self.conversation)

    def to_dict(self) -> dict[str, Any]:
        """As one row of a file, which `zoo.data.formats` reads back."""
        if self.messages is None:
            values = {"prompt": self.prompt, "completion": self.completion, "text": self.text}
            return {key: value for key, value in values.items() if value is not None}
        row: dict[str, Any] = {"messages": [dict(message) for message in self.messages]}
        return row if self.input is None else {**row, "input": self.input}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids of one example, and which of them are to be predicted from those before.

    Attributes:
        ids: int32, (T,).
        supervised: bool, (T,). The first token never is: nothing is before it.
        origin: that of the sample.
        truncated: its end was cut off.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    origin: str = ""
    truncated: bool = False

    @property
    def n_supervised(self) -> int:
        """Tokens that are to be predicted."""
        return int(self.supervised.sum())

    def __len__(self) -> int:
        return len(self.ids)
