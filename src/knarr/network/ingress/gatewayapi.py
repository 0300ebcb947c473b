"""Names of the Gateway API: its resources, our controller, the features that we claim, conditions. Pure.

Role: read by `gateway` and its neighbours. Source: gateway-api v1 (apis/v1, pkg/features).
"""

from __future__ import annotations

from typing import Any

from knarr.api.scheme import Resource

GROUP = "gateway.networking.k8s.io"
CONTROLLER = "knarr.dev/gateway"
GATEWAY_CLASSES = Resource(GROUP, "v1", "gatewayclasses", "gatewayclass", "GatewayClass", False, custom=True)
GATEWAYS = Resource(GROUP, "v1", "gateways", "gateway", "Gateway", True, custom=True)
HTTP_ROUTES = Resource(GROUP, "v1", "httproutes", "httproute", "HTTPRoute", True, custom=True)
GRPC_ROUTES = Resource(GROUP, "v1", "grpcroutes", "grpcroute", "GRPCRoute", True, custom=True)
TLS_ROUTES = Resource(GROUP, "v1", "tlsroutes", "tlsroute", "TLSRoute", True, custom=True)
REFERENCE_GRANTS = Resource(GROUP, "v1beta1", "referencegrants", "referencegrant", "ReferenceGrant", True, custom=True)
BACKEND_TLS_POLICIES = Resource(GROUP, "v1", "backendtlspolicies", "backendtlspolicy", "BackendTLSPolicy", True, custom=True)
ROUTES = (HTTP_ROUTES, GRPC_ROUTES, TLS_ROUTES)

FEATURES = (
    "BackendTLSPolicy",
    "GRPCRoute",
    "GRPCRouteNamedRouteRule",
    "Gateway",
    "GatewayAddressEmpty",
    "GatewayHTTPListenerIsolation",
    "GatewayHTTPSListenerDetectMisdirectedRequests",
    "GatewayInfrastructurePropagation",
    "GatewayPort8080",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendTimeout",
    "HTTPRouteCORS",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestMirror",
    "HTTPRouteRequestMultipleMirrors",
    "HTTPRouteRequestPercentageMirror",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteSchemeRedirect",
    "ReferenceGrant",
    "TLSRoute",
    "TLSRouteModeMixed",
    "TLSRouteModeTerminate",
)
"""What GatewayClasses of ours say is supported, sorted; each is proven by the conformance suite's tests of that name."""


def condition(kind: str, true: bool, reason: str, message: str, generation: int) -> dict[str, Any]:
    """A condition without its time, which the writer fills in when it changes."""
    return {"type": kind, "status": "True" if true else "False", "reason": reason, "message": message, "observedGeneration": generation}
