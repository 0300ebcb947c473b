"""What admission costs and decides, by upstream's metric names. Owner: the chain; the webhooks and policies count theirs here too.

Source: apiserver pkg/admission/metrics, plugin/policy/validating/metrics.
"""

from __future__ import annotations

from knarr.apiserver.instruments import Counters, Histogram, Histograms

ADMIT, VALIDATE = "admit", "validate"
BOUNDS = (0.005, 0.025, 0.1, 0.5, 1, 2.5)
MOST_CODE = 600
_FOR_EACH = "broken out for each operation and API resource and"
_POLICY_LABELS = ("policy", "policy_binding", "error_type", "enforcement_action")


class Measures:
    """Every metric of admission."""

    def __init__(self) -> None:
        prefix = "apiserver_admission_"
        self.step = Histograms(
            prefix + "step_admission_duration_seconds",
            f"[STABLE] Admission sub-step latency histogram in seconds, {_FOR_EACH} step type (validate or admit).",
            ("operation", "rejected", "type"), BOUNDS,
        )  # fmt: skip
        self.controller = Histograms(
            prefix + "controller_admission_duration_seconds",
            f"[STABLE] Admission controller latency histogram in seconds, identified by name and {_FOR_EACH} type (validate or admit).",
            ("name", "operation", "rejected", "type"), BOUNDS,
        )  # fmt: skip
        self.webhook = Histograms(
            prefix + "webhook_admission_duration_seconds",
            f"[STABLE] Admission webhook latency histogram in seconds, identified by name and {_FOR_EACH} type (validate or admit).",
            ("name", "operation", "rejected", "type"), (*BOUNDS, 10, 25),
        )  # fmt: skip
        self.webhook_requests = Counters(
            prefix + "webhook_request_total", "[ALPHA] Admission webhook requests, with the answer's HTTP status code (at most 600).",
            ("name", "type", "operation", "code", "rejected"),
        )  # fmt: skip
        self.webhook_rejections = Counters(
            prefix + "webhook_rejection_count", "[ALPHA] Requests refused because of a webhook, with the kind of error and the code, if any.",
            ("name", "type", "operation", "error_type", "rejection_code"),
        )  # fmt: skip
        self.webhook_fail_open = Counters(
            prefix + "webhook_fail_open_count", "[ALPHA] Calls of webhooks that failed and were passed over.", ("name", "type")
        )
        self.policy_checks = Counters(
            "apiserver_validating_admission_policy_check_total",
            "[BETA] Validation admission policy check total, labeled by policy and further identified by binding and enforcement action taken.",
            _POLICY_LABELS,
        )
        self.policy_seconds = Histograms(
            "apiserver_validating_admission_policy_check_duration_seconds",
            "[BETA] Validation admission latency for individual validation expressions in seconds, labeled by policy and further including "
            "binding and enforcement action taken.", _POLICY_LABELS, (5e-07, 0.001, 0.01, 0.1, 1),
        )  # fmt: skip

    def called(self, name: str, type: str, operation: str, seconds: float, code: int, *, rejected: bool) -> None:
        """A webhook has answered, or not."""
        told = "true" if rejected else "false"
        self.webhook.at(name, operation, told, type).observe(seconds)
        self.webhook_requests.add(name, type, operation, str(min(code, MOST_CODE)), told)

    def checked(self, policy: str, binding: str, error_type: str, action: str, seconds: float) -> None:
        """A policy has found something, and this was done about it."""
        self.policy_checks.add(policy, binding, error_type, action)
        self.policy_seconds.at(policy, binding, error_type, action).observe(seconds)

    def of_plugin(self, name: str, operation: str, type: str, *, rejected: bool) -> Histogram:
        return self.controller.at(name, operation, "true" if rejected else "false", type)

    def lines(self) -> list[str]:
        """Return lines of the exposition format."""
        families = (
            self.controller, self.step, self.webhook, self.webhook_requests, self.webhook_rejections, self.webhook_fail_open, self.policy_checks,
            self.policy_seconds,
        )  # fmt: skip
        return [line for one in families for line in one.lines()]
