"""rng: GET /N answers N random bytes; GET / names itself."""

import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIMIT_BYTES = 1 << 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.path.lstrip("/")
        if not wanted:
            self.answer(200, f"RNG running on {socket.gethostname()}\n".encode(), "text/plain")
        elif wanted.isdigit() and int(wanted) <= LIMIT_BYTES:
            self.answer(200, os.urandom(int(wanted)), "application/octet-stream")
        else:
            self.answer(404, b"want /N\n", "text/plain")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: one line a request would be all that the logs show."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", 80), Handler).serve_forever()
