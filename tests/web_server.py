"""A server of files that answers ranges, and breaks off on demand."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """Files by path, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of each request."""
    cut: dict[str, int] = field(default_factory=dict)
    """Close the connection once after so many bytes of a file."""
    ranges: bool = True
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.web.asked.append((self.path, wanted))
        content = self.web.files.get(self.path)
        if content is None:
            return self.send(404, b"", {})
        status, headers = 200, {}
        if self.web.ranges and (match := re.fullmatch(r"bytes=(\d+)-", wanted or "")):
            start = int(match[1])
            if start >= len(content):
                return self.send(416, b"", {})
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content = content[start:]
        return self.send(status, content, headers, self.web.cut.pop(self.path, None))

    def send(self, status: int, body: bytes, headers: dict[str, str], only: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:only])
        self.wfile.flush()
        if only is not None:
            self.close_connection = True


def serve_files() -> tuple[Web, ThreadingHTTPServer]:
    """A running server."""
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"web": web}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    return web, server
