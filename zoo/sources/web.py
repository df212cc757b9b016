"""``https://host/path/file[#sha256=HEX]``: one file from the web, resumed where it broke off, and compared.

``#git-blob=HEX`` is the id that git gives to the content.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zoo.errors import InputError, ZooError
from zoo.sources.address import Address
from zoo.sources.base import Fetched, FetchOptions, SourceError, require_space, resumes

_CHECK = re.compile(r"sha256=(?P<sha256>[0-9a-f]{64})|git-blob=(?P<blob>[0-9a-f]{40})")
_LOCAL = ("localhost", "127.0.0.1", "::1")
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


@resumes
def fetch(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Bring one file over https. ``HTTPS_PROXY`` and its kin are honoured.

    Raises as `zoo.sources.base.Fetch`, and `ZooError` if the content is not the one that the address promises.
    """
    return _fetch("https", address, destination, options)


@resumes
def fetch_plain(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Bring one file over http: from this machine, or one whose digest is known. Raises as `fetch`."""
    if urlsplit(address).hostname not in _LOCAL and "#" not in address:
        raise InputError(
            f"http:{address} may be altered on its way.", fix="Take https, or add #sha256=HEX to the address."
        )
    return _fetch("http", address, destination, options)


def _fetch(scheme: str, address: str, destination: Path, options: FetchOptions) -> Fetched:
    path, name, promised = _parse(address, options)
    url = f"{scheme}:{path}"
    if options.offline:
        raise SourceError(
            f"{url} is on the web, and --offline forbids to use the network.",
            fix="Allow it once, or give the path of a file that is there.",
        )
    destination.mkdir(parents=True, exist_ok=True)
    target, partial = destination / name, destination / f"{name}.incomplete"
    if not target.exists():
        _download(url, partial, options)
        partial.replace(target)
    sha256, blob = _digests(target)
    if promised and promised not in (sha256, blob):
        target.unlink()
        raise ZooError(
            f"{name} from {url} is not what it should be: its digests are {sha256} and {blob}, and {promised} is "
            "promised.",
            fix="It has been removed. The file was damaged on the way, or replaced: run it again.",
        )
    return Fetched(address if promised else f"{path}#sha256={sha256}")


def _parse(address: str, options: FetchOptions) -> tuple[str, str, str | None]:
    """What follows the scheme, the name of the file, and the promised digest."""
    parsed = Address.parse(address)
    match = _CHECK.fullmatch(parsed.fragment) if parsed.fragment else None
    name = unquote(urlsplit(parsed.path).path).rpartition("/")[2]
    if not parsed.path.startswith("//") or not name or name.startswith(".") or (parsed.fragment and match is None):
        raise InputError(
            f"{address!r} is no file on the web.", fix="Write https://host/path/file, and #sha256=HEX if you know it."
        )
    if options.revision or parsed.revision:
        raise InputError(f"a file on the web has no revision {options.revision or parsed.revision!r}.")
    return parsed.path, name, match["sha256"] or match["blob"] if match else None


def _download(url: str, partial: Path, options: FetchOptions) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "zoo"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            resumed = response.status == 206
            size = int(response.headers.get("Content-Length") or 0)
            require_space(partial.parent, size, url)
            with partial.open("ab" if resumed else "wb") as file, _bar(url, start * resumed, size, options) as show:
                received = 0
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    received += len(chunk)
                    show(len(chunk))
            if received < size:
                raise http.client.IncompleteRead(b"", size - received)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is there is not the beginning of what the server has now
            partial.unlink(missing_ok=True)
        raise SourceError(
            f"{url} answered {error.code} ({error.reason}).", fix="Check the address; or try later."
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise SourceError(
            f"{urlsplit(url).netloc} can not be reached, or stopped answering ({' '.join(str(reason).split())}).",
            fix="Check the network and run it again, it goes on from there; or give the path of a file that you have.",
        ) from None


@contextmanager
def _bar(url: str, start: int, size: int, options: FetchOptions) -> Iterator[Any]:
    """A progress bar, if a person watches."""
    from huggingface_hub.utils.tqdm import tqdm

    hidden = None if options.progress else True  # None: hidden unless it is a terminal
    what = {"total": start + size if size else None, "initial": start, "desc": url.rpartition("/")[2]}
    with tqdm(unit="B", unit_scale=True, disable=hidden, **what) as bar:  # type: ignore[no-untyped-call]
        yield bar.update


def _digests(path: Path) -> tuple[str, str]:
    """sha256 and the id of the git blob."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()
