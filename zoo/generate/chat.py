"""A conversation: messages in the model's own template, turn after turn on one cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo.errors import InputError
from zoo.generate.decode import Session
from zoo.generate.reply import Reply
from zoo.generate.sampling import SamplingOptions
from zoo.text.chat import Message


class Conversation:
    """Messages so far and the session that answers them.

    Args:
        session: answers on its cache, so a turn costs only its new tokens.
        system: the system message, if any.
        stop: strings that end every answer.
    """

    def __init__(self, session: Session, *, system: str | None = None, stop: Sequence[str] = ()) -> None:
        self._session, self._stop = session, tuple(stop)
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All messages, the system one first."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def check(self) -> None:
        """See whether the model can chat at all.

        Raises:
            InputError: it has no chat template.
        """
        self._session.tokenizer.render_chat([{"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def send(
        self, text: str, *, max_new_tokens: int | None, sampling: SamplingOptions, stop: Sequence[str] = ()
    ) -> Reply:
        """Answer ``text``. What was said of the answer is kept, even when the reading of it is broken off.

        Args:
            max_new_tokens: ``None``: as many as the context has room for.

        Raises:
            InputError: the model has no chat template, or the conversation exceeds the context.
        """
        asked: Message = {"role": "user", "content": text}
        prompt = self._session.tokenizer.encode_chat([*self.messages, asked])
        room = self._session.model.spec.max_seq_len - len(prompt)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt)} tokens; this model's context holds {room + len(prompt)}.",
                fix="Start anew with /reset.",
            )
        limit = room if max_new_tokens is None else min(max_new_tokens, room)
        reply = self._session.reply(prompt, max_new_tokens=limit, sampling=sampling, stop=(*self._stop, *stop))
        reply.pieces = self._recorded(asked, reply, reply.pieces)
        return reply

    def save(self, path: Path) -> None:
        """Write the messages as a JSON list of role and content.

        Raises:
            InputError: the file can not be written.
        """
        try:
            path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"can not write {path}: {error.strerror}.") from None

    def _recorded(self, asked: Message, reply: Reply, pieces: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.turns += [asked, {"role": "assistant", "content": said}]
