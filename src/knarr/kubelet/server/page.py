"""A page of metrics in Prometheus' text format. Callers: metrics, cadvisor, volumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Page:
    """A page of metrics in the text format."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> None:
        """Add one family; labels are escaped."""
        self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")
        for labels, value in samples:
            inner = ",".join(f'{k}="{_escape(v)}"' for k, v in labels.items())
            self._lines.append(f"{name}{{{inner}}} {value:.15g}" if inner else f"{name} {value:.15g}")

    def add_raw(self, name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        """Add one family whose samples carry their labels in the text already."""
        self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")
        self._lines += [f"{sample} {value:.15g}" for sample, value in samples]

    def encode(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
