"""Stop strings: text ends before the first of them, even when it spans several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.errors import InputError


class StopStrings:
    """Holds text back while it could still become a stop string.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise InputError("a stop string must not be empty.")
        self._strings = tuple(strings)
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found."""

    def push(self, piece: str) -> str:
        """The text that is safe to show now that ``piece`` has come; nothing after a hit."""
        text = self._held + piece
        found = [(text.find(s), s) for s in self._strings if s in text]
        if found:
            position, self.hit = min(found)
            self._held = ""
            return text[:position]
        keep = self._could_continue(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _could_continue(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self._strings):
                return n
        return 0
