"""The API facts as package data: plain JSON read from upstream's published API, no code. See the loaders in `knarr.api`."""

import os.path

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def fact_path(name: str) -> str:
    """Absolute path of a fact file."""
    return os.path.join(_FOLDER, name)


def read_fact(name: str) -> bytes:
    """The bytes of a fact file such as "discovery.json"."""
    with open(fact_path(name), "rb") as file:
        return file.read()
