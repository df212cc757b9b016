"""Files from the web: whole and compared, or not at all; and resumed where they broke off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web_server import Web, serve_files
from zoo.errors import InputError, ZooError
from zoo.registry import Registry
from zoo.sources.base import FetchOptions, fetch_model
from zoo.sources.provenance import read_provenance

QUIET = FetchOptions(progress=False)
CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


@pytest.fixture
def web() -> Iterator[Web]:
    web, server = serve_files()
    web.files["/a/data.json"] = CONTENT
    yield web
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fragment", ["", f"#sha256={SHA256}", f"#git-blob={BLOB}"])
def test_a_file(fragment: str, web: Web, registry: Registry, tmp_path: Path) -> None:
    """Guards the content, its digest and the record; a second fetch asks for nothing."""
    address = f"{web.url}/a/data.json{fragment}"
    for _ in range(2):
        assert fetch_model([address], tmp_path / "d", QUIET, registry) == address
    assert (tmp_path / "d" / "data.json").read_bytes() == CONTENT
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["data.json", "zoo.yaml"]
    assert read_provenance(tmp_path / "d").source == (address if fragment else f"{address}#sha256={SHA256}")
    assert len(web.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_it_goes_on_where_it_broke_off(ranges: bool, web: Web, registry: Registry, tmp_path: Path) -> None:
    """Guards a large download over a bad line, and a server that knows no ranges: then it starts anew."""
    web.cut["/a/data.json"], web.ranges = 100_000, ranges
    with pytest.raises(ZooError, match="stopped answering"):
        fetch_model([f"{web.url}/a/data.json"], tmp_path / "d", QUIET, registry)
    assert not (tmp_path / "d").exists()
    fetch_model([f"{web.url}/a/data.json"], tmp_path / "d", QUIET, registry)
    assert (tmp_path / "d" / "data.json").read_bytes() == CONTENT
    assert web.asked == [("/a/data.json", None), ("/a/data.json", "bytes=100000-")]


def test_a_file_that_became_shorter_meanwhile(web: Web, registry: Registry, tmp_path: Path) -> None:
    """Guards against a loop of 416: what was there is thrown away, and the next try succeeds."""
    web.cut["/a/data.json"] = 1000
    address = f"{web.url}/a/data.json"
    with pytest.raises(ZooError):
        fetch_model([address], tmp_path / "d", QUIET, registry)
    web.files["/a/data.json"] = b"short"
    with pytest.raises(ZooError, match="416"):
        fetch_model([address], tmp_path / "d", QUIET, registry)
    fetch_model([address], tmp_path / "d", QUIET, registry)
    assert (tmp_path / "d" / "data.json").read_bytes() == b"short"


@pytest.mark.parametrize("name", ["sha256", "git-blob"])
def test_another_content_than_promised(name: str, web: Web, registry: Registry, tmp_path: Path) -> None:
    """Guards against data that was replaced; the right one is fetched by the next try, not the kept wrong one."""
    web.files["/a/data.json"] = b"something else"
    address = f"{web.url}/a/data.json#{name}={SHA256 if name == 'sha256' else BLOB}"
    with pytest.raises(ZooError, match="is not what it should be"):
        fetch_model([address], tmp_path / "d", QUIET, registry)
    assert not (tmp_path / "d").exists()
    web.files["/a/data.json"] = CONTENT
    fetch_model([address], tmp_path / "d", QUIET, registry)


def test_what_can_not_be_had(web: Web, registry: Registry, tmp_path: Path) -> None:
    """Guards each refusal: nothing there, nobody there, offline."""
    with pytest.raises(ZooError, match=r"/none\.json answered 404"):
        fetch_model([f"{web.url}/none.json"], tmp_path / "d", QUIET, registry)
    with pytest.raises(ZooError, match=r"127\.0\.0\.1:9 can not be reached"):
        fetch_model(["http://127.0.0.1:9/x.json"], tmp_path / "d", QUIET, registry)
    with pytest.raises(ZooError, match="--offline forbids"):
        fetch_model([f"{web.url}/a/data.json"], tmp_path / "d", FetchOptions(offline=True), registry)
    assert web.asked == [("/none.json", None)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/x.json", "may be altered on its way"),
        ("https://example.org/", "is no file on the web"),
        ("https:x.json", "is no file on the web"),
        ("https://example.org/x.json#md5=3", "is no file on the web"),
        ("https://example.org/.hidden", "is no file on the web"),
        ("https://example.org/x.json@main", "has no revision"),
    ],
)
def test_addresses(address: str, message: str, registry: Registry, tmp_path: Path) -> None:
    """Guards against a request before the address is understood, and against plain http without a digest."""
    with pytest.raises(InputError, match=message):
        fetch_model([address], tmp_path / "d", QUIET, registry)
