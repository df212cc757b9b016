"""The hub source and `fetch_model`, with the real huggingface_hub against a real HTTP server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from tests import reference
from tests.hub_server import FakeHub, Handler, serve
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError, ZooError
from zoo.registry import Registry
from zoo.sources.base import Fetched, FetchOptions, SourceError, fetch_model
from zoo.sources.hub import fetch, select_files

QUIET = FetchOptions(progress=False)
WEIGHTS = bytes(range(256)) * 1024
NEEDED = {
    "config.json": b'{"model_type": "gpt2"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"MIT",
    "model.safetensors": WEIGHTS,
}
EXTRA = {
    "README.md": b"# a model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.fp16.safetensors": b"half",
    "consolidated.00.safetensors": b"other layout",
    "original/params.json": b"{}",
    "original/model.safetensors": b"original",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    import huggingface_hub

    state, servers = serve()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # What huggingface_hub read from the environment when it was imported; it asks for the first at huggingface.co.
    (tmp_path_factory.getbasetemp() / "harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
    harnesses = str(tmp_path_factory.getbasetemp() / "harnesses.json")
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", harnesses, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", harnesses + ".no-token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield state
    huggingface_hub.close_session()
    for server in servers:
        server.shutdown()
        server.server_close()


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def nothing_listens() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_only_what_is_needed_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/tiny", {**NEEDED, **EXTRA})
    fetched = fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert tree(tmp_path / "tiny") == NEEDED
    assert sorted(hub.fetched_files()) == sorted(NEEDED)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert fetched == Fetched(f"org/tiny@{commit}", {"model.safetensors": digest})


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (
            ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            ["model.safetensors"],
        ),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "consolidated.safetensors",
                "model.fp16-00001-of-00002.safetensors",
                "model.fp16.safetensors.index.json",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["model-00001-of-00001.safetensors", "consolidated.00.safetensors", "other.safetensors.index.json"],
            ["model-00001-of-00001.safetensors"],
        ),
        (["own.safetensors", "own.fp16.safetensors", "consolidated.safetensors"], ["own.safetensors"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter_config.json", "adapter_model.safetensors"]),
        (
            ["model.safetensors", "sub\\config.json", "requirements.py", "LICENSE.txt"],
            ["LICENSE.txt", "model.safetensors"],
        ),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "pytorch_model.bin.index.json"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.fp16.bin", "x.bin"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
def test_each_weight_is_taken_once(names: list[str], weights: list[str]) -> None:
    assert sorted(select_files(names, "org/tiny")) == weights


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model.pt": b"x", "training_args.bin": b"x"}, r"only has pickled weights of other names \(model.pt\)"),
        ({"pytorch_model-00001-of-00001.bin": b"x"}, r"only has pickled weights of other names \(pytorch_model-00001"),
        ({"Q4.gguf": b"x", "Q8.gguf": b"x"}, r"only has GGUF files \(Q4.gguf, Q8.gguf\)"),
        ({"config.json": b"{}", "sub/model.safetensors": b"x"}, "has no weights at its top level"),
    ],
)
def test_a_repository_without_safetensors_says_what_it_has(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    hub.add("org/tiny", files)
    with pytest.raises(SourceError, match=reason):
        fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert hub.fetched_files() == []


@pytest.mark.parametrize("in_shards", [False, True])
def test_torch_files_are_fetched_where_there_are_no_safetensors(
    hub: FakeHub, registry: Registry, tmp_path: Path, in_shards: bool
) -> None:
    """Guards a repository from before safetensors: what is fetched is complete, checked, and opens."""
    theirs = reference.save_tiny(tmp_path / "theirs", "llama", reference.LLAMA)
    state = dict(theirs.state_dict())
    (tmp_path / "theirs/model.safetensors").unlink()
    if not in_shards:
        torch.save(state, tmp_path / "theirs/pytorch_model.bin")
    else:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        weight_map = {key: names[i % 2] for i, key in enumerate(state)}
        for name in names:
            torch.save({k: t for k, t in state.items() if weight_map[k] == name}, tmp_path / "theirs" / name)
        (tmp_path / "theirs/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = tree(tmp_path / "theirs")
    commit = hub.add("org/tiny", {**files, "training_args.bin": b"x", "flax_model.msgpack": b"x"})
    assert fetch_model(["hf:org/tiny"], tmp_path / "tiny", QUIET, registry) == "hf:org/tiny"
    assert sorted(hub.fetched_files()) == sorted(files)
    record = YAML(typ="safe").load((tmp_path / "tiny/zoo.yaml").read_text())
    weights = {name: hashlib.sha256(files[name]).hexdigest() for name in files if name.endswith(".bin")}
    assert (record["source"], record["sha256"]) == (f"hf:org/tiny@{commit}", weights)
    assert open_checkpoint(tmp_path / "tiny", registry).located()


def test_a_revision_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.add("org/tiny", {**NEEDED, "config.json": b'{"old": 1}'})
    hub.add("org/tiny", NEEDED)
    hub.repos["org/tiny"].refs["refs/pr/1"] = old
    for address, options in (("org/tiny@refs/pr/1", QUIET), ("org/tiny", FetchOptions("refs/pr/1", progress=False))):
        destination = tmp_path / str(options.revision is None)
        assert fetch(address, destination, options).address == f"org/tiny@{old}"
        assert (destination / "config.json").read_bytes() == b'{"old": 1}'
    with pytest.raises(InputError, match="already names a revision"):
        fetch("org/tiny@main", tmp_path / "x", FetchOptions("refs/pr/1"))


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", NEEDED, gated=True, granted=("hf_given", "hf_environment"))
    fetch("org/tiny", tmp_path / "given", FetchOptions(token="hf_given", progress=False))
    asked = [seen for seen in hub.seen if "/cdn/" not in seen.path and "agent-harnesses" not in seen.path]
    assert {seen.token for seen in asked} == {"hf_given"}
    assert {seen.token for seen in hub.seen if "/cdn/" in seen.path} == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    fetch("org/tiny", tmp_path / "environment", QUIET)
    assert hub.seen[-1].path.startswith("/cdn/") and hub.seen[-2].token == "hf_environment"


@pytest.mark.parametrize(("token", "reason"), [(None, "no token was sent"), ("hf_other", "has no access")])
def test_a_gated_repository_says_where_to_ask(
    hub: FakeHub, registry: Registry, tmp_path: Path, token: str | None, reason: str
) -> None:
    hub.add("org/tiny", NEEDED, gated=True)
    with pytest.raises(ZooError) as caught:
        fetch_model(["hf:org/tiny"], tmp_path / "tiny", FetchOptions(token=token, progress=False), registry)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "'org/tiny' is gated" in text and reason in text
    assert f"{hub.url}/org/tiny" in text and "HF_TOKEN" in text and "--token" in text
    assert "hf_other" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [None, "hf_given"])
def test_a_missing_repository(hub: FakeHub, tmp_path: Path, token: str | None) -> None:
    with pytest.raises(SourceError, match=r"no model repository 'org/missing'.*Check the name.*set HF_TOKEN"):
        fetch("org/missing", tmp_path / "x", FetchOptions(token=token))


def test_a_token_that_is_not_accepted(hub: FakeHub, tmp_path: Path) -> None:
    hub.refused_tokens = {"hf_expired"}
    with pytest.raises(SourceError, match=r"did not accept the token for 'org/tiny' \(401\)\. .*HF_TOKEN") as caught:
        fetch("org/tiny", tmp_path / "x", FetchOptions(token="hf_expired"))
    assert "hf_expired" not in str(caught.value)


def test_a_missing_revision(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    with pytest.raises(SourceError, match="'org/tiny' has no revision 'v9'"):
        fetch("org/tiny@v9", tmp_path / "x", QUIET)


@pytest.mark.parametrize(
    "address", ["a/b/c", "org/na me", "org/na--me", "org/..", "org/-name", "", "org/name@", "org/name#x"]
)
def test_a_malformed_address(hub: FakeHub, address: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        fetch(address, tmp_path / "x", QUIET)


def test_no_network_names_the_host(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = nothing_listens()
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(SourceError) as caught:
        fetch("org/tiny", tmp_path / "x", QUIET)
    assert url.removeprefix("http://") in str(caught.value)
    assert "Connection refused" in str(caught.value) and "--offline" in str(caught.value)


def test_offline_asks_nobody(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", NEEDED)
    with pytest.raises(SourceError, match="--offline forbids"):
        fetch("org/tiny", tmp_path / "x", FetchOptions(offline=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE forbids"):
        fetch("org/tiny", tmp_path / "x", QUIET)
    assert hub.seen == [] and list(tmp_path.iterdir()) == []


def test_a_server_that_is_ill(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    hub.down = {"config.json"}
    with pytest.raises(SourceError, match="answered 500"):
        fetch("org/tiny", tmp_path / "x", QUIET)


def test_a_file_that_can_not_fit_is_refused_before_it_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    hub.sizes = {"model.safetensors": 10**18}
    with pytest.raises(ZooError, match=r"needs 1,000,000\.\d TB, and the disk of .* free") as caught:
        fetch("org/tiny", tmp_path / "x", QUIET)
    assert not isinstance(caught.value, SourceError)
    assert hub.fetched_files() == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "filled up while fetching hf:org/tiny"),
        (RuntimeError("xet: No space left on device"), "filled up while fetching hf:org/tiny"),
        (PermissionError(errno.EACCES, "Permission denied", "model.safetensors"), "can not write model.safetensors"),
    ],
)
def test_a_faulty_disk_is_not_taken_for_the_network(
    hub: FakeHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    hub.add("org/tiny", NEEDED)

    def full(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)  # a disk can not be filled in a test
    with pytest.raises(ZooError, match=reason):
        fetch_model(["hf:org/tiny", "hf:org/other"], tmp_path / "tiny", QUIET, registry)


def test_the_token_is_in_no_representation() -> None:
    assert "hf_given" not in repr(FetchOptions(token="hf_given"))


def test_a_broken_connection_is_resumed(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what it writes at a time
    hub.add("org/tiny", NEEDED)
    hub.cut = {"model.safetensors": 1000}
    fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert (tmp_path / "tiny/model.safetensors").read_bytes() == WEIGHTS
    ranges = [seen.byte_range for seen in hub.seen if seen.method == "GET" and "/cdn/" in seen.path]
    assert ranges == [None, "bytes=1000-"]


def test_an_interrupted_download_leaves_nothing_and_goes_on(hub: FakeHub, registry: Registry, tmp_path: Path) -> None:
    commit = hub.add("org/tiny", NEEDED)
    hub.cut = {"model.safetensors": 1000}
    hub.down = set()
    destination = tmp_path / "tiny"
    original = Handler.content

    def dies(self: Handler, file: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        if "model.safetensors" not in self.hub.cut and file == "model.safetensors":
            self.hub.down = {"model.safetensors"}
        original(self, file, content, headers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "content", dies)
        with pytest.raises(ZooError, match="answered 500"):
            fetch_model(["hf:org/tiny"], destination, QUIET, registry)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.partial"]

    hub.down, hub.seen[:] = set(), []
    assert fetch_model(["hf:org/tiny"], destination, QUIET, registry) == "hf:org/tiny"
    assert hub.fetched_files() == ["model.safetensors"], "finished files were fetched again"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    files = tree(destination)
    record = YAML(typ="safe").load(files.pop("zoo.yaml").decode())
    assert files == NEEDED
    assert record == {
        "schema": 1,
        "model": None,
        "source": f"hf:org/tiny@{commit}",
        "sha256": {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()},
    }


def test_what_another_commit_left_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", {**NEEDED, "added_tokens.json": b"{}", "config.json": b'{"old": 1}'})
    hub.down = {"model.safetensors"}
    with pytest.raises(SourceError):
        fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert (tmp_path / "tiny/added_tokens.json").exists()
    hub.add("org/tiny", NEEDED)
    hub.down = set()
    fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert tree(tmp_path / "tiny") == NEEDED


def test_weights_that_are_not_the_listed_ones_are_refused(hub: FakeHub, registry: Registry, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    hub.forged = {"model.safetensors": WEIGHTS[::-1]}
    with pytest.raises(ZooError) as caught:
        fetch_model(["hf:org/tiny", "hf:org/other"], tmp_path / "tiny", QUIET, registry)
    for content in (WEIGHTS, WEIGHTS[::-1]):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    hub.forged = {}
    fetch_model(["hf:org/tiny"], tmp_path / "tiny", QUIET, registry)


def test_a_config_that_is_not_the_listed_one_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    hub.forged = {"config.json": NEEDED["config.json"].replace(b"gpt2", b"gpt3")}
    with pytest.raises(SourceError, match=r"did not give config\.json"):
        fetch("org/tiny", tmp_path / "tiny", QUIET)
    hub.forged = {}
    fetch("org/tiny", tmp_path / "tiny", QUIET)
    assert tree(tmp_path / "tiny") == NEEDED


def test_the_next_source_is_tried_and_said(hub: FakeHub, registry: Registry, tmp_path: Path) -> None:
    hub.add("org/gated", NEEDED, gated=True)
    hub.add("org/tiny", NEEDED)
    said: list[str] = []
    sources = ["hf:org/missing", "hf:org/gated", "hf:org/tiny"]
    assert fetch_model(sources, tmp_path / "tiny", QUIET, registry, said.append) == "hf:org/tiny"
    assert [line.partition(":org")[0] for line in said] == ["hf", "hf"]
    assert "Trying hf:org/gated." in said[0] and "is gated" in said[1] and "Trying hf:org/tiny." in said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    with pytest.raises(ZooError) as caught:
        fetch_model(sources[:2], tmp_path / "none", QUIET, registry)
    assert "none of the 2 sources" in str(caught.value) and caught.value.exit_code == 1
    assert all(f"\n  {source}: " in str(caught.value) for source in sources[:2])
    assert "Check the name" in str(caught.value) and "Accept its licence" in str(caught.value)


def test_progress_bars_only_if_wanted(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/tiny", NEEDED)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # show bars to what is no terminal, too
    fetch("org/tiny", tmp_path / "quiet", QUIET)
    assert capfd.readouterr().err == ""
    fetch("org/tiny", tmp_path / "shown", FetchOptions(progress=True))
    assert "model.safetensors" in capfd.readouterr().err


def test_ctrl_c_stops_at_once_and_leaves_no_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", NEEDED)
    hub.stall = "model.safetensors"
    program = """
import sys
from pathlib import Path
from zoo.plugins import PluginSelection, load_zoo
from zoo.sources.base import FetchOptions, fetch_model
registry = load_zoo(PluginSelection(only=frozenset())).registry
fetch_model(["hf:org/tiny"], Path(sys.argv[1]), FetchOptions(progress=False), registry)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program, str(tmp_path / "models/tiny")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert hub.stalled.wait(60), "the download did not begin"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)  # the download would wait for minutes
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.partial"]
