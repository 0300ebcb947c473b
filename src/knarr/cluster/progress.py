"""What `up` and `down` say while they work: one line that updates itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Steps of one command; each is announced, then marked done with the time since the command began."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        self.terminal = self.stream.isatty()
        self._open = ""

    def step(self, text: str) -> None:
        """Say what is being done now; on a terminal the line is replaced by the next call."""
        if self.terminal:
            self.stream.write(f"\r\x1b[K{text} …")
            self.stream.flush()
        self._open = text

    def done(self, text: str) -> None:
        """Say what is finished, with the seconds since the command began."""
        start = "\r\x1b[K\x1b[32m✓\x1b[0m " if self.terminal else ""
        self.stream.write(f"{start}{text} ({time.monotonic() - self.started:.2f} s)\n")
        self.stream.flush()
        self._open = ""

    def clear(self) -> None:
        if self.terminal and self._open:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
