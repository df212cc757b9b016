"""Every error zoo raises on purpose: a sentence with the value, what is allowed, the remedy, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class ZooError(Exception):
    """The work failed. ``fix`` says what to do, when we know."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message


class InputError(ZooError):
    """What the user gave can not be used: a value out of range, a name nobody knows, a file that is damaged."""

    exit_code = 2


class UnknownNameError(InputError):
    """No component, model or key has this name; the nearest ones are offered."""

    def __init__(self, what: str, name: str, known: Iterable[str], *, fix: str | None = None) -> None:
        names = sorted(set(known))
        near = _nearest(name, names)
        if near:
            hint = f"Did you mean {' or '.join(repr(n) for n in near)}?"
        elif names and len(names) <= 12:
            hint = f"Known: {', '.join(names)}."
        else:
            hint = ""
        super().__init__(f"no {what} is named {name!r}.", fix=" ".join(filter(None, (hint, fix))) or None)
        self.name = name
        self.nearest = near


def _nearest(name: str, names: list[str]) -> list[str]:
    """The likeliest spellings: up to three, none much farther off than the best."""
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    ratios = {n: SequenceMatcher(None, n, name).ratio() for n in near}
    return [n for n in near if ratios[n] > max(ratios.values()) - 0.2]


class FileFormatError(InputError):
    """A file is damaged, incomplete or of a kind that zoo does not read. The message names the file."""


class MissingTokenizerError(FileFormatError):
    """Weights came without a tokenizer; the message says where one was looked for."""


class UnavailableError(ZooError):
    """A component exists but can not be used on this machine; the reasons say why."""

    exit_code = 3
