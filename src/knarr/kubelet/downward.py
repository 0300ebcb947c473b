"""The downward API: fields and resources of a pod as text. Pure; used by env and by downwardAPI volumes.

Source: pkg/fieldpath, pkg/api/v1/resource.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil

_SUBSCRIPT = re.compile(r"^metadata\.(labels|annotations)\['([^']*)'\]$")


class DownwardError(Exception):
    """The reference names nothing that exists; the text is for the user."""


def go_string(text: str) -> str:
    """A double-quoted Go string, as labels and annotations are written into files (%q)."""
    out = ['"']
    for ch in text:
        code = ord(ch)
        if ch in '"\\':
            out.append("\\" + ch)
        elif ch in "\n\t\r\a\b\f\v":
            out.append({"\n": "\\n", "\t": "\\t", "\r": "\\r", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}[ch])
        elif code < 0x20 or code == 0x7F:
            out.append(f"\\x{code:02x}")
        elif ch.isprintable():
            out.append(ch)
        elif code < 0x10000:
            out.append(f"\\u{code:04x}")
        else:
            out.append(f"\\U{code:08x}")
    return "".join(out) + '"'


def _format_map(values: Mapping[str, str] | None) -> str:
    return "\n".join(f"{key}={go_string(value)}" for key, value in sorted((values or {}).items()))


def field(pod: Object, path: str, *, ips: Sequence[str] = (), host_ips: Sequence[str] = ()) -> str:
    """The value of one field path; a missing label or annotation is the empty string.

    Raises:
      DownwardError: the path is not supported.
    """
    meta, spec = pod["metadata"], pod["spec"]
    match = _SUBSCRIPT.match(path)
    if match:
        return str((meta.get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.name", "metadata.namespace", "metadata.uid"):
        return str(meta.get(path.partition(".")[2], ""))
    if path == "metadata.labels":
        return _format_map(meta.get("labels"))
    if path == "metadata.annotations":
        return _format_map(meta.get("annotations"))
    if path == "spec.nodeName":
        return str(spec.get("nodeName", ""))
    if path == "spec.serviceAccountName":
        return str(spec.get("serviceAccountName", ""))
    if path == "spec.restartPolicy":
        return podutil.restart_policy(pod)
    if path == "status.phase":
        return podutil.phase(pod)
    if path == "status.hostIP":
        return host_ips[0] if host_ips else ""
    if path == "status.hostIPs":
        return ",".join(host_ips)
    if path == "status.podIP":
        return ips[0] if ips else ""
    if path == "status.podIPs":
        return ",".join(ips)
    raise DownwardError(f"unsupported fieldPath: {path}")


def resource(pod: Object, container: Object, reference: Object, allocatable: Mapping[str, str]) -> str:
    """The value of a resourceFieldRef, divided and rounded up.

    An unset limit is what the node can give; an unset request is 0.

    Raises:
      DownwardError: no such resource or container.
    """
    name = reference.get("containerName")
    if name:
        found = podutil.container(pod, name)
        if found is None:
            raise DownwardError(f"container {name} not found")
        container = found
    kind, _, resource_name = str(reference["resource"]).partition(".")
    if kind not in ("limits", "requests") or not (
        resource_name in ("cpu", "memory", "ephemeral-storage") or resource_name.startswith("hugepages-")
    ):
        raise DownwardError(f"unsupported container resource : {reference['resource']}")
    amount = ((container.get("resources") or {}).get(kind) or {}).get(resource_name)
    if amount is None and kind == "limits":
        pod_level = ((pod["spec"].get("resources") or {}).get("limits") or {}).get(resource_name)
        amount = pod_level if pod_level is not None else allocatable.get(resource_name)
    value = quantity.parse(amount) if amount is not None else Fraction(0)
    divisor = quantity.parse(reference.get("divisor") or 0) or Fraction(1)
    quotient = Fraction(value) / Fraction(divisor)
    return str(-((-quotient.numerator) // quotient.denominator))
