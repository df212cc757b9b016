"""``hf:org/name[@revision]``: model repositories of the Hugging Face Hub."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from zoo.errors import InputError, ZooError
from zoo.sources.address import Address
from zoo.sources.base import Fetched, FetchOptions, SourceError, require_space, resumes

_REPO = re.compile(r"(?!.*(--|\.\.))[\w.-]+(/[\w.-]+)?", re.ASCII)
_NEEDED = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "license*")
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_OTHER_COPY = re.compile(r"consolidated.*|.*\.(fp16|bf16|fp32|fp8|int8)(-\d+-of-\d+)?\.safetensors")
_TORCH_FILE = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_TORCH_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


@dataclass(frozen=True)
class _Repo:
    """Where to ask, and for what."""

    name: str
    revision: str | None
    endpoint: str
    token: str | None = field(repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc


@resumes
def fetch(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Bring what is needed to run the model: weights, configs, the tokenizer and the licence.

    Files that an interrupted fetch finished are not fetched again. ``HF_ENDPOINT``, ``HF_TOKEN`` and
    ``HF_HUB_OFFLINE`` are honoured. Raises as `zoo.sources.base.Fetch`.
    """
    repo = _parse(address, options)
    if blocker := _offline_by(options):
        raise _offline(repo, blocker)
    try:
        # Without a timeout, a firewall that drops packets would make this wait for minutes.
        info = HfApi(endpoint=repo.endpoint, token=repo.token).model_info(
            repo.name, revision=repo.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {file.rfilename: file for file in info.siblings or ()}
        wanted = [files[name] for name in select_files(files, repo.name)]
        missing_bytes = sum(file.size or 0 for file in wanted if not (destination / file.rfilename).is_file())
        require_space(destination, missing_bytes, f"hf:{address}")
        with _progress(options.progress):
            for file in wanted:
                _download(repo, str(info.sha), file.rfilename, destination)
    except ZooError:
        raise
    except Exception as error:  # four libraries raise through this one
        raise _explained(error, repo) from error
    _check(destination, wanted, repo)
    digests = {file.rfilename: file.lfs.sha256 for file in wanted if file.lfs}
    return Fetched(f"{repo.name}@{info.sha}", digests)


def select_files(names: Iterable[str], repo: str) -> list[str]:
    """Those files of a repository that are needed, each weight once.

    Subdirectories (``original/``, ``onnx/``, ...) hold other copies of the same weights, and so do ``consolidated*``
    and ``*.fp16.safetensors`` beside a complete set. ``pytorch_model*.bin`` are taken where there are no safetensors.

    Raises:
        SourceError: there are neither; the message says what there is.
    """
    top = sorted(name for name in names if "/" not in name and "\\" not in name)
    weights, index = _safetensors(top) or _torch_files(top)
    if not weights:
        raise _no_weights(repo, top)
    others = [
        name
        for name in top
        if any(fnmatchcase(name.lower(), pattern) for pattern in _NEEDED) and not name.endswith(".index.json")
    ]
    return sorted({*others, *index}) + weights


def _safetensors(top: list[str]) -> tuple[list[str], list[str]] | None:
    """One set of weights and its index, if there are any."""
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        return None
    shards = [name for name in weights if _SHARD.fullmatch(name)]
    if _ONE_FILE in weights:
        return [_ONE_FILE], []
    if shards:
        return shards, [name for name in top if name == _INDEX]
    weights = [name for name in weights if not _OTHER_COPY.fullmatch(name)] or weights
    return weights, [name for name in top if name.endswith(".safetensors.index.json")]


def _torch_files(top: list[str]) -> tuple[list[str], list[str]]:
    """What ``torch.save`` wrote, and its index; shards are of no use without one."""
    if _TORCH_FILE in top:
        return [_TORCH_FILE], []
    index = [name for name in top if name == _TORCH_INDEX]
    return [name for name in top if index and _TORCH_SHARD.fullmatch(name)], index


def _parse(address: str, options: FetchOptions) -> _Repo:
    parsed = Address.parse(address)
    name = parsed.path.strip("/")
    if not _REPO.fullmatch(name) or parsed.fragment:
        raise InputError(f"{address!r} is no Hub repository.", fix="Write hf:org/name or hf:org/name@revision.")
    if parsed.revision and options.revision and parsed.revision != options.revision:
        raise InputError(
            f"hf:{address} already names a revision, and {options.revision!r} is asked for.", fix="Name one of them."
        )
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return _Repo(name, parsed.revision or options.revision, endpoint.rstrip("/"), options.token)


def _download(repo: _Repo, commit: str, name: str, destination: Path) -> None:
    # One by one in this thread, not snapshot_download: its pool keeps Ctrl-C waiting until the running files are
    # complete, and it takes a directory that an interrupted call left for the model when the Hub does not answer.
    hf_hub_download(repo.name, name, revision=commit, local_dir=destination, endpoint=repo.endpoint, token=repo.token)


def _check(destination: Path, wanted: Iterable[RepoSibling], repo: _Repo) -> None:
    """Compare what is there with the repository's listing, and remove everything else."""
    expected = {file.rfilename: file for file in wanted}
    for name, file in expected.items():
        path = destination / name
        if not path.is_file() or _differs(path, file):
            path.unlink(missing_ok=True)
            raise SourceError(
                f"{repo.host} did not give {name} of {repo.name!r} as it is listed.", fix="Run the command again."
            )
    for path in destination.iterdir():
        if path.is_dir():
            shutil.rmtree(path)  # the bookkeeping of huggingface_hub
        elif path.name not in expected and not path.name.startswith("."):
            path.unlink()  # left by an interrupted fetch of another commit


def _differs(path: Path, file: RepoSibling) -> bool:
    if file.size is not None and path.stat().st_size != file.size:
        return True
    if file.lfs or not file.blob_id:
        return False  # its sha256 is compared by whoever called fetch
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() != file.blob_id


@contextmanager
def _progress(wanted: bool) -> Iterator[None]:
    """No progress bars unless they are wanted; if they are, huggingface_hub shows them to terminals alone."""
    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _offline_by(options: FetchOptions) -> str | None:
    """What forbids to use the network, if anything."""
    if options.offline:
        return "--offline"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE"
    return None


def _no_weights(repo: str, names: Iterable[str]) -> SourceError:
    pickled = [name for name in names if name.endswith(_PICKLED) and not name.startswith(_NO_WEIGHTS)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if pickled:
        found = f"{repo!r} only has pickled weights of other names ({_some(pickled)})."
    elif gguf:
        found = f"{repo!r} only has GGUF files ({_some(gguf)})."
        return SourceError(found, fix="Download one of them and give its path.")
    else:
        found = f"{repo!r} has no weights at its top level."
    return SourceError(found, fix="Use a repository or a revision that has *.safetensors, or pytorch_model.bin.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _offline(repo: _Repo, blocker: str) -> SourceError:
    return SourceError(
        f"{repo.name!r} is on {repo.host}, and {blocker} forbids to use the network.",
        fix="Allow it once, or give the path of a model directory that is there.",
    )


def _explained(error: BaseException, repo: _Repo) -> Exception:
    """The error to raise for what huggingface_hub raised."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return _offline(repo, "HF_HUB_OFFLINE")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo)
    if isinstance(error, HFValidationError):
        return InputError(f"{repo.name!r} is no name of a Hub repository.", fix="Write hf:org/name.")
    if "No space left on device" in str(error):
        return OSError(errno.ENOSPC, "No space left on device")
    if isinstance(error, OSError) and error.errno is not None:
        return error  # the disk's, not the Hub's
    return SourceError(
        f"{repo.host} can not be reached, or stopped answering ({_reason(error)}).",
        fix="Check the network and run it again; without one, use --offline with a model directory that is there.",
    )


def _refused(error: HfHubHTTPError, repo: _Repo) -> SourceError:
    status = error.response.status_code
    page = f"{repo.endpoint}/{repo.name}"
    pass_a_token = f"set HF_TOKEN to a token from {repo.endpoint}/settings/tokens, or pass --token"
    if isinstance(error, GatedRepoError):
        who = "the account of this token has no access to it" if _sent_token(error) else "no token was sent"
        return SourceError(
            f"{repo.name!r} is gated, and {who}.", fix=f"Accept its licence at {page}, then {pass_a_token}."
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{repo.name!r} has no revision {repo.revision or 'main'!r}.", fix=f"See {page}/tree/main.")
    # To whoever sends no token, the Hub answers 401 for repositories that do not exist as well.
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not _sent_token(error)):
        return SourceError(
            f"{repo.host} has no model repository {repo.name!r}, or a private one ({status}).",
            fix=f"Check the name; for a private one, {pass_a_token}.",
        )
    if status in (401, 403):
        what = "did not accept the token" if _sent_token(error) else "wants a token"
        return SourceError(f"{repo.host} {what} for {repo.name!r} ({status}).", fix=f"To go on, {pass_a_token}.")
    detail = f": {error.server_message}" if error.server_message else ""
    return SourceError(f"{repo.host} answered {status}{detail}.", fix="Run the command again later.")


def _sent_token(error: HfHubHTTPError) -> bool:
    return "authorization" in error.response.request.headers


def _reason(error: BaseException) -> str:
    """The innermost reason, on one line."""
    innermost = error
    while (inner := innermost.__cause__ or innermost.__context__) is not None:
        innermost = inner
    if isinstance(innermost, OSError) and innermost.strerror:
        return innermost.strerror
    return " ".join(str(error).split()) or type(error).__name__
