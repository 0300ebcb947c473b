"""Structured logging: one logfmt line per record on stderr.

Callers everywhere write `log.info("container started", pod="ns/name")`: a constant
message plus fields. The message is what one greps for; what varies goes into fields.
Nothing here knows Kubernetes.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def _quote(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=\n\t\\' for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


class Logger:
    """A named logger that takes fields as keyword arguments.

    Methods never raise and return nothing. `error(..., exc_info=True)` appends the
    traceback of the exception being handled; `exc_info` also takes an exception.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def _log(self, level: int, message: str, exc_info: bool | BaseException | None, fields: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if fields:
            message += "".join([f" {key}={_quote(value)}" for key, value in fields.items() if value is not None])
        self._logger.log(level, "%s", message, exc_info=exc_info)

    def debug(self, message: str, /, *, exc_info: bool | BaseException | None = None, **fields: Any) -> None:
        self._log(logging.DEBUG, message, exc_info, fields)

    def info(self, message: str, /, *, exc_info: bool | BaseException | None = None, **fields: Any) -> None:
        self._log(logging.INFO, message, exc_info, fields)

    def warning(self, message: str, /, *, exc_info: bool | BaseException | None = None, **fields: Any) -> None:
        self._log(logging.WARNING, message, exc_info, fields)

    def error(self, message: str, /, *, exc_info: bool | BaseException | None = None, **fields: Any) -> None:
        self._log(logging.ERROR, message, exc_info, fields)

    def exception(self, message: str, /, **fields: Any) -> None:
        """Log at error level with the traceback of the exception being handled."""
        self._log(logging.ERROR, message, True, fields)

    def is_debug(self) -> bool:
        return self._logger.isEnabledFor(logging.DEBUG)


def get_logger(name: str) -> Logger:
    """Give the logger of a module; `name` is its `__name__`."""
    return Logger(logging.getLogger(name))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = record.levelname.lower()
        name = record.name.removeprefix("knarr.")
        line = f"{seconds}.{int(record.msecs):03d}Z {level} {name}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup(level: str = "info") -> None:
    """Send all records of the process at `level` and above to stderr, once.

    Args:
      level: "debug", "info", "warning" or "error".

    Raises:
      KeyError: there is no such level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
