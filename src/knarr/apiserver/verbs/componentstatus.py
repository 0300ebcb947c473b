"""Component statuses: a deprecated list that is made when it is asked for; old scripts still look at it.

Source: pkg/registry/core/componentstatus/rest.go.
"""

from __future__ import annotations

from knarr.api import errors, table
from knarr.api.types import Object
from knarr.apiserver.call import Call


def _items(call: Call) -> list[Object]:
    trouble = call.server.store_trouble()
    healthy = {"type": "Healthy", "status": "False" if trouble else "True", "message": trouble or "ok"}
    return [{"metadata": {"name": "etcd-0"}, "conditions": [healthy]}]


async def read(call: Call) -> None:
    """Answer a get or list."""
    resource = call.endpoint.resource
    items = _items(call)
    if call.info.name:
        found = next((item for item in items if item["metadata"]["name"] == call.info.name), None)
        if found is None:
            raise errors.StatusError(404, "NotFound", f'componentstatus "{call.info.name}" not found', {
                "name": call.info.name, "kind": "componentstatus",
            })
        items = [found]
    if "as=Table" in call.request.headers.get("accept", ""):
        body = table.table(resource, [{"kind": resource.kind, "apiVersion": "v1", **item} for item in items], {})
    elif call.info.name:
        body = {"kind": resource.kind, "apiVersion": "v1", **items[0]}
    else:
        body = {"kind": resource.list_kind, "apiVersion": "v1", "metadata": {}, "items": items}
    if call.info.name and "watch" in call.query:
        raise errors.method_not_supported(resource, "watch")
    call.answer_bytes(200, call.endpoint.json.body_of(body), "application/json")
