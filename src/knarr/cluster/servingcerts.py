"""Approves the serving certificates that nodes ask for.

Role: runs in the control process. Upstream leaves kubernetes.io/kubelet-serving to the administrator, since only he can know
which names a node may bear; here a node gets what its own Node object says: its names and addresses, asked for by itself.
Anything else is left pending for a human.
Source: pkg/kubelet/certificate (what is asked for), certificates.k8s.io signer kubernetes.io/kubelet-serving.
"""

from __future__ import annotations

import base64

from cryptography import x509
from cryptography.x509.oid import NameOID

from knarr.aiokits.log import get_logger
from knarr.api import meta
from knarr.api.errors import StatusError
from knarr.api.resources import CERTIFICATE_SIGNING_REQUESTS, NODES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.kubelet.certificates import SERVING_SIGNER

log = get_logger(__name__)

_USER = "system:node:"
_AGAIN_SECONDS = 5.0
"""A node asks right after it has registered; its addresses may follow."""
_TRIES = 12


class ServingCertificateApprover:
    """See the module."""

    def __init__(self, client: Client, informers: Informers) -> None:
        self._client = client
        self._informers = informers
        self._tries: dict[str, int] = {}
        self._requests = informers.get(CERTIFICATE_SIGNING_REQUESTS, field_selector=f"spec.signerName={SERVING_SIGNER}")
        self.controller = Controller("serving-certificate-approver", self._reconcile, workers=1)
        add = self.controller.queue.add
        self._requests.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]), self._gone)

    def _gone(self, request: Object) -> None:
        self._tries.pop(request["metadata"]["name"], None)

    async def run(self) -> None:
        await self._informers.start()
        await self.controller.run()

    async def _reconcile(self, name: str) -> Result | None:
        request = self._requests.get(None, name)
        if request is None or (request.get("status") or {}).get("conditions"):
            return None
        spec = request["spec"]
        user = spec.get("username", "")
        if not user.startswith(_USER) or "system:nodes" not in (spec.get("groups") or ()):
            return None
        try:
            node = await self._client.get(NODES, user.removeprefix(_USER))
        except StatusError as error:
            if error.reason != "NotFound":
                raise
            node = None
        if node is None or (problem := objection(request, node)) is not None:
            self._tries[name] = self._tries.get(name, 0) + 1
            if self._tries[name] < _TRIES:
                return Result(_AGAIN_SECONDS)
            log.warning("serving certificate not approved", request=name, user=user, why="no such node" if node is None else problem)
            return None
        condition = {"type": "Approved", "status": "True", "reason": "AutoApproved", "message": "The names and addresses are those of the node that asks."}
        await self._client.update(CERTIFICATE_SIGNING_REQUESTS, {**request, "status": {"conditions": [condition]}}, subresource="approval")
        return None


def objection(request: Object, node: Object) -> str | None:
    """Why a request does not fit the node that makes it; None when it does. Pure."""
    try:
        parsed = x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"]))
    except ValueError:
        return "the request cannot be read"
    common = [item.value for item in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = [item.value for item in parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if not parsed.is_signature_valid or common != [_USER + meta.name(node)] or groups != ["system:nodes"]:
        return "the subject is not the node that asks"
    if set(request["spec"].get("usages") or ()) - {"key encipherment"} != {"digital signature", "server auth"}:
        return "it is not for a server"
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "it names nothing"
    own = {item["address"] for item in (node.get("status") or {}).get("addresses") or ()}
    for name in names:
        if not isinstance(name, x509.DNSName | x509.IPAddress) or str(name.value) not in own:
            return f"{name.value} is no name or address of node {meta.name(node)}"
    return None
