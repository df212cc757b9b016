"""A server that speaks the parts of the Hub's API with which the library ``datasets`` reads a data set."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class DatasetHub:
    """Data sets by name, each with its files; and what was asked for."""

    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: DatasetHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        match = re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?$", path)
        files = self.hub.datasets.get(match[1]) if match else None
        if match is None or files is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such data set"})
        rest = match[2] or ""
        if not path.startswith("/api/"):
            return self.file(files, rest)
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self.json({"id": match[1], "sha": COMMIT, "siblings": siblings, "private": False, "gated": False})
        if rest.startswith("/paths-info/"):
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self.json([entry for name in wanted if (entry := describe(files, name))])
        if tree := re.match(r"/tree/[^/]+(?:/(.*))?$", rest):
            return self.json([describe(files, name) for name in children(files, tree[1] or ".")])
        return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def file(self, files: dict[str, bytes], rest: str) -> None:
        match = re.match(r"/resolve/[^/]+/(.+)$", rest)
        content = files.get(match[1]) if match else None
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(content)}"'}
        return self.send(200, content, headers)

    def json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def children(files: dict[str, bytes], directory: str) -> list[str]:
    """What lies in a directory."""
    places = [place for name in files for place in (PurePosixPath(name), *PurePosixPath(name).parents)]
    inside = [str(place) for place in places if place.parent == PurePosixPath(directory) and str(place) != "."]
    return list(dict.fromkeys(inside))


def describe(files: dict[str, bytes], name: str) -> dict[str, Any] | None:
    """A file or directory as the API lists it."""
    if name in files:
        return {"type": "file", "path": name, "size": len(files[name]), "oid": blob_id(files[name])}
    if any(PurePosixPath(name) in PurePosixPath(other).parents for other in files):
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return None


def serve_datasets() -> tuple[DatasetHub, ThreadingHTTPServer]:
    """A running hub."""
    hub = DatasetHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return hub, server
