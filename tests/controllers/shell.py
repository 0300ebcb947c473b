"""The little of a shell that the commands of recorded containers need, in the time of the event loop.

Simple commands joined by `;`, `&&` and `||`, `while … do … done`, `trap … TERM`, variables, quotes.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Mapping

KILLED = 128 + 15


class _Exit(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class Shell:
    """Runs one command line among the files of one container; `terminate()` is SIGTERM."""

    def __init__(self, files: set[str], env: Mapping[str, str], hostname: str) -> None:
        self._files = files
        self._env = env
        self._hostname = hostname
        self._trap: str | None = None
        self._terminated = asyncio.Event()
        self._in_trap = False

    def terminate(self) -> None:
        self._terminated.set()

    async def run(self, words: list[str]) -> int:
        """Run to the end; gives the exit code."""
        try:
            if words[:2] == ["sh", "-c"]:
                return await self._script(words[2])
            return await self._command(words)
        except _Exit as end:
            return end.code

    async def _script(self, text: str) -> int:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        return await self._list(list(lexer))

    async def _list(self, tokens: list[str]) -> int:
        code, position = 0, 0
        while position < len(tokens):
            if tokens[position] == "while":
                done = len(tokens) - 1 - tokens[::-1].index("done")
                do = tokens.index("do", position)
                while await self._list(tokens[position + 1 : do]) == 0:
                    await self._list(tokens[do + 1 : done])
                position = done + 1
                continue
            end = next((i for i in range(position, len(tokens)) if tokens[i] == ";"), len(tokens))
            code = await self._and_or(tokens[position:end])
            position = end + 1
        return code

    async def _and_or(self, tokens: list[str]) -> int:
        code, runs = 0, True
        while tokens:
            end = next((i for i, token in enumerate(tokens) if token in ("&&", "||")), len(tokens))
            if runs and end:
                code = await self._command([self._expanded(word) for word in tokens[:end]])
            if end < len(tokens):
                runs = (code == 0) == (tokens[end] == "&&")
            tokens = tokens[end + 1 :]
        return code

    def _expanded(self, word: str) -> str:
        word = word.replace("$(hostname)", self._hostname)
        return re.sub(r"\$(\w+)", lambda found: self._env.get(found[1], ""), word)

    async def _command(self, words: list[str]) -> int:
        name, *rest = words
        if name == "sleep":
            await self._sleep(float(rest[0]))
        elif name == "exit":
            raise _Exit(int(rest[0]))
        elif name == "trap":
            self._trap = rest[0]
        elif name == "touch":
            self._files.add(rest[0])
        elif name == "rm":
            self._files.discard(rest[0])
        elif name == "cat":
            return 0 if rest[0] in self._files else 1
        elif name == "test":
            return 0 if self._test(rest) else 1
        elif name not in (":", "true", "echo", "hostname"):
            return 1 if name == "false" else 127
        return 0

    def _test(self, words: list[str]) -> bool:
        if words[0] == "!":
            return not self._test(words[1:])
        if words[0] == "-e":
            return words[1] in self._files
        return (words[0] == words[2]) == (words[1] == "=")

    async def _sleep(self, seconds: float) -> None:
        """Sleep; SIGTERM ends a shell without a trap at once, one with a trap after the command that runs."""
        if self._trap is None and not self._in_trap:
            try:
                async with asyncio.timeout(seconds):
                    await self._terminated.wait()
            except TimeoutError:
                return
            raise _Exit(KILLED)
        await asyncio.sleep(seconds)
        if self._terminated.is_set() and not self._in_trap and self._trap is not None:
            self._in_trap = True
            await self._script(self._trap)
