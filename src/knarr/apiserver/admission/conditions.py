"""matchConditions of webhooks: expressions that say whether a request is for the webhook at all.

Source: apiserver pkg/admission/plugin/webhook/matchconditions.
"""

from __future__ import annotations

from collections.abc import Sequence

from knarr.api import cel
from knarr.api.types import Object
from knarr.apiserver.admission.expressions import CONDITION_VARIABLES, Programs, activation
from knarr.apiserver.admission.matching import Match
from knarr.apiserver.attributes import AdmissionRequest, Authorizer
from knarr.apiserver.celtimes import EVALUATION, timed


class ConditionError(Exception):
    """A condition could not be evaluated, and the failure policy says to refuse."""


class Conditions:
    """Evaluates conditions; programs are kept by text."""

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer
        self._programs = Programs(CONDITION_VARIABLES, cel.BOOL)

    async def match(self, conditions: Sequence[Object], request: AdmissionRequest, match: Match, *, ignore_errors: bool) -> bool:
        """Whether all conditions hold. One that is false decides, even when others fail.

        Raises:
          ConditionError
        """
        variables = activation(request, match, self._authorizer)
        return self.match_with(conditions, variables, self._programs, ignore_errors=ignore_errors)

    @staticmethod
    def match_with(conditions: Sequence[Object], variables: dict[str, object], programs: Programs, *, ignore_errors: bool) -> bool:
        """The same over variables that are there already."""
        with timed(EVALUATION):
            return Conditions._all_hold(conditions, variables, programs, ignore_errors=ignore_errors)

    @staticmethod
    def _all_hold(conditions: Sequence[Object], variables: dict[str, object], programs: Programs, *, ignore_errors: bool) -> bool:
        budget = cel.Budget(cel.TOTAL_LIMIT)
        failures: list[str] = []
        for condition in conditions:
            source = condition.get("expression") or ""
            try:
                result = programs.get(source).evaluate(variables, budget)
            except cel.CompileError as error:
                failures.append(f"compilation failed: {error}")
                continue
            except cel.EvalError as error:
                failures.append(f"expression '{source}' resulted in error: {error}")
                continue
            if result is not True:
                return False
        if not failures:
            return True
        if ignore_errors:
            return False
        raise ConditionError(failures[0] if len(failures) == 1 else f"[{', '.join(failures)}]")
