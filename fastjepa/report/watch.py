"""`fastjepa report --serve`: the page of runs that go on, made anew when their files change."""

import ipaddress
import logging
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastjepa.errors import ConfigError, UserError
from fastjepa.report.page import render_page
from fastjepa.run.directory import run_directory

CHANGING = ("*.json", "*.jsonl", "checkpoints/*/manifest.json", "pictures/*.png")


class Server(ThreadingHTTPServer):
    """Answers / with the page of `paths`; on port 0 the system chooses one."""

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], host: str, port: int, pictures: bool = True):
        self.paths, self.pictures = paths, pictures
        self._tag, self._page, self._lock = "", "", threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error}); pass another --host or --port") from error

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}/"

    def trusts(self, header: str) -> bool:
        """Whether a Host header is meant for this server: a page from elsewhere must not read it by a name of its own."""
        name = header.rpartition(":")[0] or header
        return not is_loopback(self.server_address[0]) or name == "localhost" or is_loopback(name)

    def page(self) -> tuple[str, str]:
        """(tag, HTML): made anew when a file has changed, and each minute, for it says how long ago a run was heard of."""
        with self._lock:
            tag = f'"{hash((state_of(self.paths), time.time() // 60)):x}"'
            if tag != self._tag:
                self._page, self._tag = render_page(self.paths, self.pictures, live=True), tag
            return self._tag, self._page


def state_of(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """(name, time of its last change, size) of every file that the page is made from."""
    files = (file for path in paths for pattern in CHANGING for file in sorted(run_directory(path).glob(pattern)))
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if not self.server.trusts(self.headers.get("Host", "")):
            return self._answer(421, "this server answers on loopback names only")
        if self.path.partition("?")[0] != "/":
            return self._answer(404, "there is one page here: /")
        try:
            tag, page = self.server.page()
        except (UserError, OSError) as error:  # a run moved away, a file half written: the next request may find it whole
            return self._answer(503, str(error))
        if self.headers.get("If-None-Match") == tag:
            return self._answer(304, "", tag)
        self._answer(200, page, tag, "text/html")

    def _answer(self, status: int, text: str, tag: str | None = None, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, form: str, *about: object) -> None:
        """Requests come every two seconds: for those who ask for them."""
        logging.getLogger(__name__).debug(form, *about)
