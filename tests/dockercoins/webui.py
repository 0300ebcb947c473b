"""webui: a page with the current rate, and GET /json with the counter, both from Redis."""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = """<!doctype html><meta charset="utf-8"><title>DockerCoins</title>
<style>body { font: 24px system-ui; text-align: center; margin-top: 15vh } b { font-size: 3em }</style>
<p>Mining speed</p><p><b id="rate">…</b> hashes a second</p><p id="total"></p>
<script>
let last = null
setInterval(async () => {
  const now = await (await fetch("json")).json()
  if (last) document.getElementById("rate").textContent = ((now.hashes - last.hashes) / (now.now - last.now)).toFixed(1)
  document.getElementById("total").textContent = now.hashes + " hashes, " + now.coins + " coins"
  last = now
}, 1000)
</script>
"""


def ask(*words: str) -> int:
    """The number in Redis' answer to one command; 0 for none."""
    with socket.create_connection(("redis", 6379), timeout=3) as connection, connection.makefile("rwb") as stream:
        stream.write(f"*{len(words)}\r\n".encode() + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words))
        stream.flush()
        first = stream.readline()
        if first.startswith(b"$"):
            return int(stream.readline()) if int(first[1:]) >= 0 else 0
        return int(first[1:])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        try:
            if path == "/json":
                numbers = {"hashes": ask("GET", "hashes"), "coins": ask("HLEN", "wallet"), "now": time.time()}
                self.answer(200, json.dumps(numbers).encode(), "application/json")
            elif path in ("/", "/index.html"):
                self.answer(200, PAGE.encode(), "text/html")
            else:
                self.answer(404, b"not found\n", "text/plain")
        except (OSError, ValueError) as error:
            self.answer(503, f"redis: {error}\n".encode(), "text/plain")

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
