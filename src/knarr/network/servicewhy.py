"""Why a Service does not answer, whoever asks: its address, ports, selector, endpoints, the policies of its pods, its name.

Role: the library behind `knarr why svc/NAME`. Endpoints are chosen by the proxy's functions, policies judged by the policy's; the name is
asked of the cluster's DNS server itself when the caller gives a way to ask.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.network.objects import object_key
from knarr.network.policy.model import compile_policy, decide, read_pod
from knarr.network.why import Place, Snapshot, Step, find_object, service_endpoints, take_snapshot

Lookup = Callable[[str], Awaitable[list[str]]]
"""Gives the addresses of a DNS name as the cluster's server answers. OSError when it does not answer."""

_MOST_POLICIES = 5


async def why_service(client: Client, namespace: str, name: str, port: str = "", *, domain: str = "cluster.local", lookup: Lookup | None = None) -> list[Step]:
    """Judge one port of a Service, or all of them, as the API has it now. Raises StatusError."""
    snapshot = await take_snapshot(client)
    steps = service_steps(snapshot, namespace, name, port)
    service = find_object(snapshot.services, namespace, name)
    if service is not None and lookup is not None:
        steps += await name_steps(service, f"{name}.{namespace}.svc.{domain}", lookup)
    return steps


def service_steps(snapshot: Snapshot, namespace: str, name: str, port: str = "") -> list[Step]:
    """The steps but for its name; pure."""
    service = find_object(snapshot.services, namespace, name)
    if service is None or (service.get("spec") or {}).get("type") == "ExternalName":
        return service_endpoints(snapshot, Place("svc", namespace, name, port))[0]
    spec = service["spec"]
    ports = [port] if port else [str(item.get("name") or item["port"]) for item in spec.get("ports") or ()]
    if not ports:
        return [Step(False, f"service {namespace}/{name} has no ports")]
    steps: list[Step] = []
    used: dict[str, Object] = {}
    for wanted in ports:
        protocols = [item.get("protocol") or "TCP" for item in spec.get("ports") or () if wanted in (item.get("name"), str(item.get("port")))]
        found, pods = service_endpoints(snapshot, Place("svc", namespace, name, wanted), protocols[0] if protocols else "TCP")
        steps += [step for step in found if step not in steps]
        used.update({object_key(pod): pod for pod in pods})
    if "LoadBalancer" == spec.get("type") and not ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress"):
        steps.append(Step(False, f"service {namespace}/{name} has no load balancer address yet"))
    return steps + _policies(snapshot, list(used.values()))


def _policies(snapshot: Snapshot, pods: list[Object]) -> list[Step]:
    """Policies that choose who may reach the pods behind the Service: a remark, since it depends on who asks."""
    policies = [compile_policy(obj) for obj in snapshot.policies]
    labels = {obj["metadata"]["name"]: obj["metadata"].get("labels") or {} for obj in snapshot.namespaces}
    steps = []
    for pod in pods[:_MOST_POLICIES]:
        receiver = read_pod(pod)
        if receiver is None:
            continue
        verdict = decide("ingress", receiver, "0.0.0.0", "TCP", 1, policies, labels)
        if verdict.policies:
            text = f"policy {', '.join(verdict.policies)} chooses who may enter pod {receiver.key}; for one pair: knarr why pod/NAME svc/NAME:PORT"
            steps.append(Step(None, text))
    return steps


async def name_steps(service: Object, name: str, lookup: Lookup) -> list[Step]:
    key, spec = object_key(service), service["spec"]
    try:
        found = await lookup(name)
    except OSError as error:
        return [Step(False, f"the cluster's DNS server does not answer for {name}: {error or type(error).__name__}")]
    if not found:
        return [Step(False, f"the cluster's DNS server knows no address of {name}")]
    wanted = [address for address in spec.get("clusterIPs") or () if address != "None"]
    if wanted and not set(found) <= set(wanted):
        return [Step(False, f"the cluster's DNS server gives {', '.join(found)} for {name}, service {key} has {', '.join(wanted)}")]
    return [Step(True, f"{name} is {', '.join(found[:5])} for the cluster's DNS server")]
