"""ValidatingAdmissionPolicy: expressions that refuse, warn or leave a note, bound to parameters.

A policy without a binding does nothing. A binding with parameters runs the policy once for each parameter object.

Source: apiserver pkg/admission/plugin/policy/{validating,generic,matching}.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from knarr.api import cel, meta
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.expressions import activation
from knarr.apiserver.admission.matching import EquivalentsOf, Match, NamespaceMatcher, is_exempt, match_rules, may_match
from knarr.apiserver.admission.measures import Measures
from knarr.apiserver.admission.plugin import Plugin, refuse
from knarr.apiserver.admission.policy_programs import LazyVariables, Policy, Validation
from knarr.apiserver.attributes import AdmissionRequest, Authorizer, Store
from knarr.apiserver.celtimes import EVALUATION

_CODES = {"Unauthorized": 401, "Forbidden": 403, "RequestEntityTooLarge": 413, "Invalid": 422}
_MOST_MESSAGE_BYTES = 5 * 1024
_MOST_ANNOTATION_BYTES = 10 * 1024

FindStore = Callable[[str, str], "tuple[Store, bool] | None"]
"""(apiVersion, kind) to (store, namespaced): where parameters live."""


class Failure(NamedTuple):
    """One validation that does not hold, or could not be told."""

    message: str
    reason: str
    expression: str
    place: int
    error_type: str = "no_error"
    """As in the metrics: no_error means that it was evaluated and does not hold."""


class _Bound(NamedTuple):
    policy: Policy
    bindings: list[Object]


class ValidatingAdmissionPolicies(Plugin):
    name = "ValidatingAdmissionPolicy"

    def __init__(
        self, policies: Store, bindings: Store, namespaces: Store, authorizer: Authorizer, equivalents: EquivalentsOf, find_store: FindStore,
    ) -> None:  # fmt: skip
        self._policies = policies
        self._bindings = bindings
        self._namespaces = namespaces
        self._matcher = NamespaceMatcher(namespaces)
        self._authorizer = authorizer
        self._equivalents = equivalents
        self._find_store = find_store
        self.measures = Measures()
        """Replaced by the chain's."""
        self._compiled: dict[tuple[str, str], Policy] = {}
        self._bound: tuple[int, list[_Bound]] = (-1, [])
        self._concerned: dict[tuple[str, Resource, str], bool] = {}

    def _active(self) -> list[_Bound]:
        """Policies that have bindings, compiled; compiled ones are kept by uid and version."""
        generation = self._policies.generation + self._bindings.generation
        if self._bound[0] != generation:
            bindings: dict[str, list[Object]] = {}
            for binding in self._bindings.list_nowait():
                bindings.setdefault((binding.get("spec") or {}).get("policyName") or "", []).append(binding)
            kept: dict[tuple[str, str], Policy] = {}
            found: list[_Bound] = []
            for obj in self._policies.list_nowait():
                own = bindings.get(meta.name(obj))
                if own:
                    key = (meta.uid(obj), str(meta.generation(obj)))
                    kept[key] = self._compiled.get(key) or Policy(obj)
                    found.append(_Bound(kept[key], own))
            self._compiled = kept
            self._bound = (generation, found)
            self._concerned.clear()
        return self._bound[1]

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return not is_exempt(resource)

    def sources(self) -> tuple[Store, ...]:
        return (self._policies, self._bindings)

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        active = self._active()
        if not active:
            return False
        key = (operation, resource, subresource)
        known = self._concerned.get(key)
        if known is None:
            known = any(may_match((bound.policy.spec.get("matchConstraints") or {}).get("resourceRules") or (), *key) for bound in active)
            self._concerned[key] = known
        return known

    def validate(self, request: AdmissionRequest) -> None:
        denied: StatusError | None = None
        for bound in self._active():
            match = self._matches(bound.policy.spec.get("matchConstraints") or {}, request)
            if match is None:
                continue
            for binding in bound.bindings:
                resources = (binding.get("spec") or {}).get("matchResources")
                if resources and self._matches(resources, request, binding=True) is None:
                    continue
                refusal = self._run(bound.policy, binding, request, match)
                denied = denied or refusal
        if denied is not None:
            raise denied

    def _matches(self, constraints: Object, request: AdmissionRequest, *, binding: bool = False) -> Match | None:
        if not self._matcher.namespace_matches(constraints.get("namespaceSelector"), request):
            return None
        if not self._matcher.object_matches(constraints.get("objectSelector"), request):
            return None
        policy = constraints.get("matchPolicy") or "Equivalent"

        def named(rules: list[Object]) -> list[Object]:
            return [rule for rule in rules if not rule.get("resourceNames") or request.name in rule["resourceNames"]]

        excluded = named(constraints.get("excludeResourceRules") or [])
        if excluded and match_rules(excluded, policy, request, self._equivalents) is not None:
            return None
        rules = constraints.get("resourceRules") or []
        if binding and not rules:
            # A binding without rules narrows nothing down.
            return Match(request.resource, None)
        return match_rules(named(rules), policy, request, self._equivalents)

    # -- one binding -----------------------------------------------------------------------------------------------------
    def _run(self, policy: Policy, binding: Object, request: AdmissionRequest, match: Match) -> StatusError | None:
        spec = binding.get("spec") or {}
        try:
            parameters = self._parameters(policy, spec.get("paramRef"), request)
        except _ParameterError as error:
            if policy.failure_policy == "Ignore":
                return None
            failure = Failure(f"failed to configure binding: {error}", "", "", 0, "invalid_error")
            return self._act(policy, binding, request, [failure])
        refusal: StatusError | None = None
        for parameter in parameters:
            begin = time.perf_counter()
            failures = self._evaluate(policy, request, match, parameter)
            seconds = time.perf_counter() - begin
            EVALUATION.observe(seconds)
            self._count(policy, binding, failures, seconds)
            if failures:
                refusal = refusal or self._act(policy, binding, request, failures)
        return refusal

    def _count(self, policy: Policy, binding: Object, failures: list[Failure], seconds: float) -> None:
        actions = (binding.get("spec") or {}).get("validationActions") or []
        for failure in failures:
            for action in actions:
                self.measures.checked(policy.name, meta.name(binding), failure.error_type, action.lower(), seconds)

    def _act(self, policy: Policy, binding: Object, request: AdmissionRequest, failures: list[Failure]) -> StatusError | None:
        actions = (binding.get("spec") or {}).get("validationActions") or []
        name = meta.name(binding)
        if "Warn" in actions:
            request.warnings += [
                f"Validation failed for ValidatingAdmissionPolicy '{policy.name}' with binding '{name}': {failure.message}" for failure in failures
            ]
        if "Audit" in actions:
            noted = [
                {"message": one.message, "policy": policy.name, "binding": name, "expressionIndex": one.place, "validationActions": actions} for one in failures
            ]
            request.audit_annotations["validation.policy.admission.k8s.io/validation_failure"] = orjson.dumps(noted).decode()
        if "Deny" not in actions:
            return None
        failure = failures[0]
        message = f"ValidatingAdmissionPolicy '{policy.name}' with binding '{name}' denied request: {failure.message}"
        error = refuse(request, message)
        error.reason = failure.reason or "Invalid"
        error.code = _CODES.get(error.reason, 422)
        error.details["causes"] = [*(error.details.get("causes") or ()), {"message": message}]
        return error

    def _parameters(self, policy: Policy, reference: Object | None, request: AdmissionRequest) -> list[Object | None]:
        kind = policy.spec.get("paramKind")
        if not kind or not reference:
            return [None]
        found = self._find_store(kind.get("apiVersion") or "", kind.get("kind") or "")
        if found is None:
            raise _ParameterError(f"failed to find resource referenced by paramKind: '{kind.get('apiVersion')}, Kind={kind.get('kind')}'")
        store, namespaced = found
        namespace = ""
        if namespaced:
            namespace = reference.get("namespace") or request.namespace
            if not namespace:
                raise _ParameterError("cannot use namespaced paramRef in policy binding that matches cluster-scoped resources")
        objects: list[Object]
        if reference.get("name"):
            one = store.get_nowait(namespace, reference["name"])
            objects = [one] if one is not None else []
        else:
            from knarr.apiserver.admission.matching import selector_of

            selector = selector_of(reference.get("selector"))
            objects = [obj for obj in store.list_nowait(namespace or None) if selector is None or selector.matches(meta.labels(obj))]
        if objects:
            return list(objects)
        if reference.get("parameterNotFoundAction") == "Allow":
            return []
        raise _ParameterError("no params found for policy binding with `Deny` parameterNotFoundAction")

    # -- expressions -----------------------------------------------------------------------------------------------------
    def _evaluate(self, policy: Policy, request: AdmissionRequest, match: Match, parameter: Object | None) -> list[Failure]:
        budget = cel.Budget(cel.TOTAL_LIMIT)
        values: dict[str, Any] = activation(request, match, self._authorizer)
        values["namespaceObject"] = self._namespace_object(request)
        if policy.spec.get("paramKind"):
            values["params"] = parameter
        values["variables"] = LazyVariables(policy, values, budget)
        ignore = policy.failure_policy == "Ignore"
        verdict = self._conditions(policy, values, budget)
        if verdict is False:
            return []
        if isinstance(verdict, str):
            return [] if ignore else [Failure(verdict, "", "", 0, "invalid_error")]
        failures = [failure for index, one in enumerate(policy.validations) if (failure := _check(one, index, values, budget, ignore=ignore))]
        self._annotate(policy, request, values, budget, failures, ignore=ignore)
        return failures

    def _namespace_object(self, request: AdmissionRequest) -> Object | None:
        if not request.namespace or (request.resource.plural == "namespaces" and not request.resource.group):
            return None
        return self._namespaces.get_nowait("", request.namespace)

    @staticmethod
    def _conditions(policy: Policy, values: dict[str, Any], budget: cel.Budget) -> bool | str:
        """True: the policy is for this request; False: it is not; a text: that could not be told."""
        problems: list[str] = []
        for _, condition in policy.conditions:
            try:
                if condition.evaluate(values, budget) is not True:
                    return False
            except cel.CELError as error:
                problems.append(f"expression '{condition.source}' resulted in error: {error}")
        return True if not problems else problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"

    @staticmethod
    def _annotate(
        policy: Policy, request: AdmissionRequest, values: dict[str, Any], budget: cel.Budget, failures: list[Failure], *, ignore: bool
    ) -> None:
        for key, expression in policy.audit_annotations:
            try:
                value = expression.evaluate(values, budget)
            except cel.CELError as error:
                if not ignore:
                    failures.append(Failure(f"valueExpression '{expression.source}' resulted in error: {error}", "", expression.source, 0, "invalid_error"))
                continue
            text = value.strip()[:_MOST_ANNOTATION_BYTES] if isinstance(value, str) else ""
            if text:
                name = f"{policy.name}/{key}"
                known = request.audit_annotations.get(name)
                # Several bindings may give different values: all of them, once each.
                request.audit_annotations[name] = text if known is None or known == text else f"{known}, {text}"


class _ParameterError(Exception):
    """The parameters of a binding could not be found."""


def _check(validation: Validation, index: int, values: dict[str, Any], budget: cel.Budget, *, ignore: bool) -> Failure | None:
    source = validation.expression.source
    try:
        holds = validation.expression.evaluate(values, budget)
    except cel.CompileError as error:
        return None if ignore else Failure(f"expression '{source}' resulted in error: compilation error: {error}", "", source, index, "compile_error")
    except cel.CELError as error:
        return None if ignore else Failure(f"expression '{source}' resulted in error: {error}", "", source, index, "invalid_error")
    if holds is True:
        return None
    message = validation.message
    if validation.message_expression is not None:
        try:
            said = validation.message_expression.evaluate(values, budget)
        except cel.CELError:
            said = None
        if isinstance(said, str) and said.strip() and len(said.encode()) <= _MOST_MESSAGE_BYTES and "\n" not in said.strip():
            message = said.strip()
    return Failure(message or f"failed expression: {source.strip()}", validation.reason, source, index)


