"""A store on this machine that speaks HTTP, keeps a list of what it was asked for, and fails when it is told to."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Store:
    """Files by path, and what goes wrong with them.

    Args:
        files: Path, without the first slash, to content.
        faults: Path to what happens to its next downloads, one each: ``503``, ``403``, ``cut`` (the connection ends in the middle),
            ``short`` (whole by its own length, half by what is wanted), ``flip`` (one bit), ``hang`` (until ``released``).
        ranges: Whether parts can be asked for.
    """

    files: dict[str, bytes]
    faults: dict[str, list[str]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    released: threading.Event = field(default_factory=threading.Event)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def downloads(self, path: str) -> list[str | None]:
        """The ranges of each download of a file."""
        return [ranged for method, name, ranged in self.asked if method == "GET" and name == path]


@contextmanager
def serving(store: Store) -> Iterator[Store]:
    """The store answers under ``store.url``."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        store.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        store, path = self.store, self.path.partition("?")[0].lstrip("/")
        store.asked.append((self.command, path, self.headers.get("Range")))
        store.headers.append(dict(self.headers))
        faults = store.faults.get(path, [])
        fault = faults.pop(0) if with_body and faults else ""
        if fault in ("503", "403"):
            self._send(int(fault), b"", {})
        elif fault == "hang":
            store.released.wait(60)
            self.close_connection = True
        elif path in store.files:
            self._send_file(store.files[path], fault, with_body=with_body)
        elif not path or any(name.startswith(f"{path.rstrip('/')}/") for name in store.files):
            links = "".join(f'<a href="{name.rpartition("/")[2]}">x</a>' for name in store.files)
            self._send(200, links.encode(), {"Content-Type": "text/html"})
        else:
            self._send(404, b"", {})

    def _send_file(self, content: bytes, fault: str, *, with_body: bool) -> None:
        if fault == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "short":
            content = content[: len(content) // 2]
        whole, status, start = content, 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{hash(whole)}"', "Accept-Ranges": "bytes" if self.store.ranges else "none"}
        if asked and self.store.ranges:
            status, start = 206, int(asked[1])
            content = content[start : int(asked[2]) + 1 if asked[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{len(whole)}"
        headers["Content-Length"] = str(len(content))
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        self._send(status, content if with_body else b"", headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
