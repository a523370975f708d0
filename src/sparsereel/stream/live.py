"""A stream in the browser: motion JPEG from a server on this machine only.

`push` puts frames into a bounded buffer; a clock plays them at the stream's rate to whoever watches. Generation that is
faster than that waits for the clock. A viewer that reads too slowly misses frames, one that stops reading is dropped:
neither holds up the stream or fills memory.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sparsereel.media import Frames

HOST = "127.0.0.1"
_BOUNDARY = "sparsereel"
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sparsereel stream</title>
<style>
body { background: #111; color: #ccc; font: 15px/1.5 system-ui, sans-serif; display: grid; place-items: center;
       min-height: 100vh; margin: 0; gap: 1rem; align-content: center }
img { image-rendering: pixelated; width: min(80vw, 80vh); background: #000; border-radius: 6px }
p { margin: 0; max-width: 80vw; overflow-wrap: anywhere }
</style>
<img src="/stream.mjpg" alt="the stream"><p id="prompt"></p><p id="state">waiting for the first frames</p>
<script>
setInterval(async () => {
  try {
    const s = await (await fetch("/status")).json();
    document.getElementById("prompt").textContent = s.prompt ?? "";
    document.getElementById("state").textContent = s.text ?? "";
  } catch { document.getElementById("state").textContent = "the stream has ended"; }
}, 1000);
</script></html>
"""


class LiveServer:
    """Serves frames at http://127.0.0.1:PORT/ until `close`.

    Args:
        port: 0 = any free one.
        seconds: how much is buffered.
        wait_for_viewers: `push` waits while nobody watches; otherwise the oldest frames are dropped.
        patience: seconds after which a viewer that does not read is dropped.

    Raises:
        ValueError: the port is taken.
    """

    def __init__(
        self, fps: float, port: int = 0, *, seconds: float = 4.0, wait_for_viewers: bool = True, patience: float = 10.0
    ) -> None:
        self.fps = fps
        self.patience = patience
        self.wait_for_viewers = wait_for_viewers
        self.capacity = max(1, round(seconds * fps))
        self.status: dict[str, Any] = {}
        self.viewers = 0
        self.changed = threading.Condition()
        self.current: tuple[int, bytes] = (0, b"")
        self._buffer: deque[bytes] = deque()
        self._closed = False
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        except OSError as error:
            raise ValueError(f"cannot serve on {HOST}:{port}: {error.strerror or error}") from error
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"
        self._threads = [
            threading.Thread(target=self._server.serve_forever, daemon=True),
            threading.Thread(target=self._play, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def push(self, frames: Frames) -> None:
        """Show frames (F, H, W, 3) next; waits while the buffer is full."""
        for frame in frames:
            data = _jpeg(frame)
            with self.changed:
                while len(self._buffer) >= self.capacity and not self._closed:
                    if not self.viewers and not self.wait_for_viewers:
                        self._buffer.popleft()
                        break
                    # With a time limit, so that Ctrl-C is heard.
                    self.changed.wait(0.2)
                self._buffer.append(data)
                self.changed.notify_all()

    def close(self, drain: bool = True) -> None:
        """Stop serving; with `drain`, once those who watch have seen what is buffered."""
        with self.changed:
            while drain and self._buffer and self.viewers:
                self.changed.wait(0.2)
            self._closed = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(5)

    def _play(self) -> None:
        due = time.monotonic()
        while True:
            with self.changed:
                while not (self._buffer and self.viewers) and not self._closed:
                    self.changed.wait(0.2)
                if self._closed:
                    return
                self.current = (self.current[0] + 1, self._buffer.popleft())
                self.changed.notify_all()
            due = max(due + 1 / self.fps, time.monotonic() - 0.5)
            time.sleep(max(0.0, due - time.monotonic()))

    def following(self, seen: int) -> tuple[int, bytes] | None:
        """The frame on show once it is another than number `seen`; None at the end."""
        with self.changed:
            while self.current[0] <= seen and not self._closed:
                self.changed.wait(0.2)
            return None if self._closed and self.current[0] <= seen else self.current

    def watch(self, joining: bool) -> None:
        """A viewer comes or goes."""
        with self.changed:
            self.viewers += 1 if joining else -1
            self.changed.notify_all()


def _jpeg(frame: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame).save(out, format="JPEG", quality=90)
    return out.getvalue()


def _handler(live: LiveServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = live.patience

        def do_GET(self) -> None:
            if self.path == "/":
                self._answer("text/html; charset=utf-8", _PAGE.encode())
            elif self.path == "/status":
                self._answer("application/json", json.dumps(live.status).encode())
            elif self.path == "/stream.mjpg":
                self._stream()
            else:
                self.send_error(404)

        def _answer(self, kind: str, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            live.watch(True)
            seen = 0
            try:
                while (found := live.following(seen)) is not None:
                    seen, data = found
                    head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")
            except (OSError, TimeoutError):
                pass  # gone, or not reading
            finally:
                live.watch(False)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal shows the stream's progress."""

    return Handler
