"""What can go wrong with an expression.

CELError
  CompileError     the text is not a valid expression, or its types cannot fit: fix the expression
  EvalError        evaluating it failed on these inputs (missing key, overflow, ...)
    CostExceeded   it ran over its budget
"""

from __future__ import annotations

from typing import NamedTuple


class CELError(Exception):
    """Base of everything this package raises."""


class Issue(NamedTuple):
    """One problem found while compiling; offset is a position in the source text."""

    offset: int
    message: str


class CompileError(CELError):
    """Shows its issues as cel-go does: place, message, the line, and a caret below it."""

    def __init__(self, source: str, issues: list[Issue]) -> None:
        self.source = source
        self.issues = issues
        super().__init__("\n".join(_shown(source, issue) for issue in sorted(issues)))


def _shown(source: str, issue: Issue) -> str:
    if not source:
        return f"ERROR: <input>:1:0: {issue.message}"
    before = source[: issue.offset]
    line = before.count("\n") + 1
    column = issue.offset - (before.rfind("\n") + 1)
    lines = source.split("\n")
    text = lines[line - 1] if line <= len(lines) else ""
    return f"ERROR: <input>:{line}:{column + 1}: {issue.message}\n | {text}\n | {'.' * column}^"


class ResultTypeError(CompileError):
    """The expression is sound, but its result has a type that its place does not take; `found` and `wanted` as messages show types."""

    def __init__(self, source: str, found: str, wanted: list[str]) -> None:
        self.found = found
        self.wanted = wanted
        super().__init__(source, [Issue(0, f"must evaluate to {' or '.join(wanted)}")])

    @property
    def reason(self) -> str:
        """In the words of admission policies."""
        wanted = self.wanted[0] if len(self.wanted) == 1 else f"one of [{' '.join(self.wanted)}]"
        return f"must evaluate to {wanted} but got {self.found}"


class EvalError(CELError):
    """A run-time error; inside && and || it may be outvoted by the other side."""


class CostExceeded(EvalError):
    """The evaluation used up its budget."""

    def __init__(self) -> None:
        super().__init__("operation cancelled: actual cost limit exceeded")
