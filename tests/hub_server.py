"""A server that speaks the parts of the Hub's API that downloads use, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository: its commits, newest last, each with its files."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    granted: tuple[str, ...] = ()

    def files_at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Seen:
    method: str
    path: str
    token: str | None
    byte_range: str | None


@dataclass
class FakeHub:
    """The parts of the Hub's API that a download uses; large files live on another host, as they do there."""

    repos: dict[str, Repo] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    """Close the socket once after so many bytes of a file."""
    down: set[str] = field(default_factory=set)
    """Answer 500 to a GET of these files."""
    forged: dict[str, bytes] = field(default_factory=dict)
    """Send these bytes in place of the file's."""
    stalled: threading.Event = field(default_factory=threading.Event)
    stall: str | None = None
    """Send half of this file, set ``stalled``, and then nothing more."""
    refused_tokens: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to list in place of the true ones."""
    url: str = ""
    cdn: str = ""

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> str:
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, **more))
        repo.commits[commit] = files
        repo.refs["main"] = commit
        return commit

    def fetched_files(self) -> list[str]:
        gets = [seen.path for seen in self.seen if seen.method == "GET" and "/api/" not in seen.path]
        return [path.rpartition("/")[2] for path in gets]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.seen.append(Seen(self.command, path, token, self.headers.get("Range")))
        if token in self.hub.refused_tokens:
            self.send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.model_info(match[1], match[2] or "main", token)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3], token)
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            found = self.hub.repos[match[1]].files_at(match[2])
            assert found
            self.content(match[3], found[1][match[3]])
        else:
            self.refuse(404, "EntryNotFound")

    def find(self, name: str, revision: str, token: str | None) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(*((404, "RepoNotFound") if token else (401, None)))
            return None
        found = repo.files_at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
        return found

    def model_info(self, name: str, revision: str, token: str | None) -> None:
        if (found := self.find(name, revision, token)) is None:
            return
        siblings = []
        for file, content in found[1].items():
            entry: dict[str, Any] = {"rfilename": file, "size": self.hub.sizes.get(file, len(content))}
            entry["blobId"] = blob_id(content)
            if is_large(file):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self.send(200, json.dumps({"id": name, "sha": found[0], "siblings": siblings}).encode())

    def resolve(self, name: str, revision: str, file: str, token: str | None) -> None:
        if (found := self.find(name, revision, token)) is None:
            return
        repo = self.hub.repos[name]
        if repo.gated and token not in repo.granted:
            return self.refuse(403 if token else 401, "GatedRepo")
        commit, files = found
        if not is_large(file):
            return self.content(file, files[file], {"X-Repo-Commit": commit, "ETag": f'"{blob_id(files[file])}"'})
        digest = hashlib.sha256(files[file]).hexdigest()
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[file]))}
        self.send(302, b"", {**headers, "Location": f"{self.hub.cdn}/cdn/{name}/{commit}/{file}"})

    def content(self, file: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.command == "GET" and file in self.hub.down:
            return self.refuse(500, None)
        content = self.hub.forged.get(file, content) if self.command == "GET" else content
        status, extra = 200, dict(headers or {})
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            status, extra["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        if self.command == "GET" and file in self.hub.cut:
            return self.send(status, content, extra, only=self.hub.cut.pop(file))
        if self.command == "GET" and file == self.hub.stall:
            self.send(status, content, extra, only=len(content) // 2)
            self.hub.stalled.set()
            time.sleep(60)
        self.send(status, content, extra)

    def refuse(self, status: int, code: str | None) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"} if code else {})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, only: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:only])
            self.wfile.flush()
        if only is not None:
            self.close_connection = True


def serve() -> tuple[FakeHub, list[ThreadingHTTPServer]]:
    """A running hub and its two servers: one for the API, one for large files."""
    state = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": state})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url, state.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    return state, servers
