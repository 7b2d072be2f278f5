"""A real HTTP server on 127.0.0.1 that serves files, and misbehaves as it is told."""

import hashlib
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """Serves `files` (path -> bytes), with ranges and ETags, as real ones do.

    Attributes:
        faults: path -> what to do to its first requests, one each: "cut" (end at half of what is
            due), "stall" (send half, then nothing), "drop" (no answer), "hub" (redirect as the
            Hugging Face hub does, with the SHA-256), "hub-lie" (with another one), "no-range"
            (ignore the range), "wrong-range" (answer with another range), "no-if-range" (send the
            range of whatever the file is now), "bad-length" (Content-Length: abc), "no-length",
            "drip" (a byte at a time, without end), "loop" (redirect to itself), "redirect:URL", or
            an HTTP status.
        requests: (path, Range header) of all requests.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests = files, []
        self.faults: dict[str, list[Any]] = {}
        self.stalled = threading.Event()
        self.speed: float | None = None  # bytes a second
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    def close(self) -> None:
        self.stalled.set()
        self._http.shutdown()
        self._http.server_close()

    def counts(self) -> Counter[str]:
        return Counter(path for path, _ in self.requests)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, wanted = handler.path, handler.headers.get("Range")
        self.requests.append((path, wanted))
        queue = self.faults.get(path, [])
        fault = queue.pop(0) if queue else None
        if fault == "drop":
            return
        if isinstance(fault, int):
            handler.send_error(fault)
            return
        if fault in ("hub", "hub-lie"):
            content = self.files["/real" + path]
            digest = hashlib.sha256(content).hexdigest() if fault == "hub" else "0" * 64
            handler.send_response(302)
            handler.send_header("X-Linked-ETag", f'"{digest}"')
            handler.send_header("Location", self.url("/real" + path))
            handler.end_headers()
            return
        if fault == "loop" or str(fault).startswith("redirect:"):
            handler.send_response(302)
            target = path if fault == "loop" else fault.removeprefix("redirect:")
            handler.send_header("Location", target)
            handler.end_headers()
            return
        if path not in self.files:
            handler.send_error(404)
            return
        self._serve(handler, self.files[path], wanted, fault)

    def _serve(
        self, handler: BaseHTTPRequestHandler, content: bytes, wanted: str | None, fault: Any
    ) -> None:
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        start = int(match[1]) if match else 0
        same = handler.headers.get("If-Range") in (None, etag) or fault == "no-if-range"
        if match and same and fault != "no-range":
            if start >= len(content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(content)}")
                handler.end_headers()
                return
            start = start + 1 if fault == "wrong-range" else start
            handler.send_response(206)
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.send_header("Content-Range", span)
        else:
            start = 0
            handler.send_response(200)
        body = content[start:]
        handler.send_header("ETag", etag)
        if fault not in ("no-length", "drip"):
            length = "abc" if fault == "bad-length" else str(len(body))
            handler.send_header("Content-Length", length)
        handler.end_headers()
        while fault == "drip" and not self.stalled.wait(0.01):
            handler.wfile.write(b"x")
        if fault in ("cut", "stall"):
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            if fault == "stall":
                self.stalled.wait(30)
            return
        if self.speed is None:
            handler.wfile.write(body)
            return
        step = max(int(self.speed / 50), 1)
        for at in range(0, len(body), step):
            handler.wfile.write(body[at : at + step])
            time.sleep(0.02)
