"""How a source is written: ``scheme:path[@revision][#fragment]``, as in ``hf:org/name@v1.0``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from zoo.errors import InputError

# Two characters at least: ``C:\models`` is a path.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<address>.*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIRECTORY_NAME = re.compile(r"[a-z0-9_][A-Za-z0-9_.@=+-]*")
_WEIGHT_SUFFIXES = (".gguf", ".safetensors")


@dataclass(frozen=True)
class Address:
    """What follows the scheme."""

    path: str
    revision: str | None = None
    fragment: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Split ``path[@revision][#fragment]``.

        Raises:
            InputError: one of the parts is written but empty.
        """
        rest, hash_, fragment = text.partition("#")
        path, at, revision = rest.partition("@")
        if not path or (at and not revision) or (hash_ and not fragment):
            raise InputError(f"{text!r} is no address.", fix="Write PATH, PATH@REVISION or PATH#FRAGMENT.")
        return cls(path, revision or None, fragment or None)

    def __str__(self) -> str:
        return (
            self.path + (f"@{self.revision}" if self.revision else "") + (f"#{self.fragment}" if self.fragment else "")
        )


@dataclass(frozen=True)
class Source:
    """A place that weights can be had from."""

    scheme: str
    address: Address

    @classmethod
    def parse(cls, text: str) -> Source:
        """Split ``scheme:address``.

        Raises:
            InputError: there is no scheme, or the address is malformed.
        """
        match = _SCHEME.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is no source.", fix="Write SCHEME:ADDRESS, such as hf:org/name.")
        return cls(match["scheme"], Address.parse(match["address"]))

    def __str__(self) -> str:
        return f"{self.scheme}:{self.address}"

    def at(self, revision: str | None) -> Source:
        """The source at ``revision``; as it is, if that is ``None``.

        Raises:
            InputError: it is written with another revision.
        """
        if revision is None or revision == self.address.revision:
            return self
        if self.address.revision is not None:
            raise InputError(
                f"{self} already names a revision, and {revision!r} is asked for.", fix="Name one of them."
            )
        return replace(self, address=replace(self.address, revision=revision))

    def may_be(self, other: Source) -> bool:
        """Whether both can be the same weights. A branch and a commit may be; two commits or digests must be equal."""
        mine, theirs = self.address, other.address
        if (self.scheme, mine.path.casefold()) != (other.scheme, theirs.path.casefold()):
            return False
        revisions_differ = (
            mine.revision != theirs.revision and _is_commit(mine.revision) and _is_commit(theirs.revision)
        )
        fragments_differ = (
            mine.fragment != theirs.fragment and mine.fragment is not None and theirs.fragment is not None
        )
        return not revisions_differ and not fragments_differ

    @property
    def directory_name(self) -> str:
        """The directory that its weights get when they have no name: the path's last part, lower case, ``@revision``.

        Raises:
            InputError: the last part can not name a directory.
        """
        name = self.address.path.rstrip("/").rpartition("/")[2].lower()
        for suffix in _WEIGHT_SUFFIXES:
            name = name.removesuffix(suffix)
        if self.address.revision:
            name += "@" + self.address.revision.replace("/", "-")
        if not _DIRECTORY_NAME.fullmatch(name):
            raise InputError(
                f"{self} does not end in a name for a directory: {name!r}.", fix="Use A-Z, a-z, 0-9, '.', '_' and '-'."
            )
        return name


def brief(source: str) -> str:
    """The source without its fragment, for a line that a person reads."""
    return source.partition("#")[0]


def is_source(text: str) -> bool:
    """Whether ``text`` begins with a scheme."""
    return _SCHEME.fullmatch(text) is not None


def _is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None
