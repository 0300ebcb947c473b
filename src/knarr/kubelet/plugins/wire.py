"""The protobuf messages of the plugin protocols, by a table, and one call over a plugin's socket.

Callers: watcher, csi, devices, dra. Messages are plain dicts with the names of the .proto files; unset fields are absent. grpcio is
imported at the first call: a node without plugins never pays for it.
Source: CSI spec v1 csi.proto, kubelet pluginregistration/v1, deviceplugin/v1beta1, dra/v1 and dra/v1beta1 api.proto.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

Message = dict[str, Any]
_LONGEST_ADDRESS = 107
Field = tuple[str, str]
"""(name, type); the type is a scalar, "map" (of strings), "map:MESSAGE", a message's name, or a type with "[]"."""

_CAPABILITY: dict[int, Field] = {1: ("block", "Empty"), 2: ("mount", "MountVolume"), 3: ("access_mode", "AccessMode")}
MESSAGES: dict[str, dict[int, Field]] = {
    "Empty": {},
    "PluginInfo": {1: ("type", "string"), 2: ("name", "string"), 3: ("endpoint", "string"), 4: ("supported_versions", "string[]")},
    "RegistrationStatus": {1: ("plugin_registered", "bool"), 2: ("error", "string")},
    "MountVolume": {1: ("fs_type", "string"), 2: ("mount_flags", "string[]"), 3: ("volume_mount_group", "string")},
    "AccessMode": {1: ("mode", "int")},
    "VolumeCapability": _CAPABILITY,
    "Topology": {1: ("segments", "map")},
    "NodeGetInfoResponse": {1: ("node_id", "string"), 2: ("max_volumes_per_node", "int"), 3: ("accessible_topology", "Topology")},
    "RPC": {1: ("type", "int")},
    "NodeServiceCapability": {1: ("rpc", "RPC")},
    "NodeGetCapabilitiesResponse": {1: ("capabilities", "NodeServiceCapability[]")},
    "NodeStageVolumeRequest": {
        1: ("volume_id", "string"),
        2: ("publish_context", "map"),
        3: ("staging_target_path", "string"),
        4: ("volume_capability", "VolumeCapability"),
        5: ("secrets", "map"),
        6: ("volume_context", "map"),
    },
    "NodeUnstageVolumeRequest": {1: ("volume_id", "string"), 2: ("staging_target_path", "string")},
    "NodePublishVolumeRequest": {
        1: ("volume_id", "string"),
        2: ("publish_context", "map"),
        3: ("staging_target_path", "string"),
        4: ("target_path", "string"),
        5: ("volume_capability", "VolumeCapability"),
        6: ("readonly", "bool"),
        7: ("secrets", "map"),
        8: ("volume_context", "map"),
    },
    "NodeUnpublishVolumeRequest": {1: ("volume_id", "string"), 2: ("target_path", "string")},
    "CapacityRange": {1: ("required_bytes", "int"), 2: ("limit_bytes", "int")},
    "NodeExpandVolumeRequest": {
        1: ("volume_id", "string"),
        2: ("volume_path", "string"),
        3: ("capacity_range", "CapacityRange"),
        4: ("staging_target_path", "string"),
        5: ("volume_capability", "VolumeCapability"),
        6: ("secrets", "map"),
    },
    "NodeExpandVolumeResponse": {1: ("capacity_bytes", "int")},
    "NUMANode": {1: ("ID", "int")},
    "TopologyInfo": {1: ("nodes", "NUMANode[]")},
    "Device": {1: ("ID", "string"), 2: ("health", "string"), 3: ("topology", "TopologyInfo")},
    "ListAndWatchResponse": {1: ("devices", "Device[]")},
    "DevicePluginOptions": {1: ("pre_start_required", "bool"), 2: ("get_preferred_allocation_available", "bool")},
    "RegisterRequest": {
        1: ("version", "string"),
        2: ("endpoint", "string"),
        3: ("resource_name", "string"),
        4: ("options", "DevicePluginOptions"),
    },
    "ContainerAllocateRequest": {1: ("devices_ids", "string[]")},
    "AllocateRequest": {1: ("container_requests", "ContainerAllocateRequest[]")},
    "DeviceMount": {1: ("container_path", "string"), 2: ("host_path", "string"), 3: ("read_only", "bool")},
    "DeviceSpec": {1: ("container_path", "string"), 2: ("host_path", "string"), 3: ("permissions", "string")},
    "CDIDevice": {1: ("name", "string")},
    "ContainerAllocateResponse": {
        1: ("envs", "map"),
        2: ("mounts", "DeviceMount[]"),
        3: ("devices", "DeviceSpec[]"),
        4: ("annotations", "map"),
        5: ("cdi_devices", "CDIDevice[]"),
    },
    "AllocateResponse": {1: ("container_responses", "ContainerAllocateResponse[]")},
    "ContainerPreferredAllocationRequest": {
        1: ("available_device_ids", "string[]"),
        2: ("must_include_device_ids", "string[]"),
        3: ("allocation_size", "int"),
    },
    "PreferredAllocationRequest": {1: ("container_requests", "ContainerPreferredAllocationRequest[]")},
    "ContainerPreferredAllocationResponse": {1: ("device_ids", "string[]")},
    "PreferredAllocationResponse": {1: ("container_responses", "ContainerPreferredAllocationResponse[]")},
    "PreStartContainerRequest": {1: ("devices_ids", "string[]")},
    "Claim": {1: ("namespace", "string"), 2: ("uid", "string"), 3: ("name", "string")},
    "PreparedDevice": {
        1: ("request_names", "string[]"),
        2: ("pool_name", "string"),
        3: ("device_name", "string"),
        4: ("cdi_device_ids", "string[]"),
    },
    "NodePrepareResourcesRequest": {1: ("claims", "Claim[]")},
    "NodePrepareResourceResponse": {1: ("devices", "PreparedDevice[]"), 2: ("error", "string")},
    "NodePrepareResourcesResponse": {1: ("claims", "map:NodePrepareResourceResponse")},
    "NodeUnprepareResourcesRequest": {1: ("claims", "Claim[]")},
    "NodeUnprepareResourceResponse": {1: ("error", "string")},
    "NodeUnprepareResourcesResponse": {1: ("claims", "map:NodeUnprepareResourceResponse")},
}


class PluginError(Exception):
    """A plugin's answer was an error, or there was none. `code` is gRPC's, e.g. "NOT_FOUND", "" when it was not reached."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tagged(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def encode(kind: str, message: Message) -> bytes:
    """A dict as bytes; unset and empty fields are left out, except messages."""
    out = []
    for number, (name, field) in MESSAGES[kind].items():
        value = message.get(name)
        if value is None:
            continue
        if field == "map":
            out += [_tagged(number, _tagged(1, k.encode()) + _tagged(2, v.encode())) for k, v in value.items()]
            continue
        if field.startswith("map:"):
            inner = field.removeprefix("map:")
            out += [_tagged(number, _tagged(1, k.encode()) + _tagged(2, encode(inner, v))) for k, v in value.items()]
            continue
        for one in value if field.endswith("[]") else [value]:
            inner = field.removesuffix("[]")
            if inner == "string":
                if one or field.endswith("[]"):
                    out.append(_tagged(number, one.encode()))
            elif inner in ("int", "bool"):
                if one:
                    out.append(_varint(number << 3) + _varint(int(one)))
            else:
                out.append(_tagged(number, encode(inner, one)))
    return b"".join(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def decode(kind: str, data: bytes) -> Message:
    """Bytes as a dict; unknown fields are skipped. Raises ValueError on truncated data."""
    out: Message = {}
    position = 0
    try:
        while position < len(data):
            tag, position = _read_varint(data, position)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                raw, position = _read_varint(data, position)
                chunk = b""
            elif wire == 2:
                length, position = _read_varint(data, position)
                chunk, raw = data[position : position + length], 0
                if len(chunk) != length:
                    raise ValueError("truncated message")
                position += length
            else:
                position += 8 if wire == 1 else 4
                continue
            _take(out, MESSAGES[kind].get(number), raw, chunk)
    except IndexError as e:
        raise ValueError("truncated message") from e
    return out


def _take(out: Message, entry: Field | None, raw: int, chunk: bytes) -> None:
    if entry is None:
        return
    name, field = entry
    if field == "map":
        key, text = _pair(chunk)
        out.setdefault(name, {})[key] = text.decode(errors="replace")
        return
    if field.startswith("map:"):
        key, data = _pair(chunk)
        out.setdefault(name, {})[key] = decode(field.removeprefix("map:"), data)
        return
    inner = field.removesuffix("[]")
    value: Any
    if inner == "string":
        value = chunk.decode(errors="replace")
    elif inner == "int":
        value = raw - (1 << 64) if raw >> 63 else raw
    elif inner == "bool":
        value = bool(raw)
    else:
        value = decode(inner, chunk)
    if field.endswith("[]"):
        out.setdefault(name, []).append(value)
    else:
        out[name] = value


def _pair(chunk: bytes) -> tuple[str, bytes]:
    parts = {1: b"", 2: b""}
    position = 0
    while position < len(chunk):
        tag, position = _read_varint(chunk, position)
        length, position = _read_varint(chunk, position)
        parts[tag >> 3] = chunk[position : position + length]
        position += length
    return parts[1].decode(errors="replace"), parts[2]


class Plugin:
    """A connection to one plugin's socket; close it."""

    def __init__(self, socket_path: str) -> None:
        import grpc.aio

        self._grpc = grpc
        self._folder = -1
        if len(os.fsencode(socket_path)) > _LONGEST_ADDRESS:
            # The kernel takes no longer name for a socket, but finds it by its folder's descriptor.
            folder, name = os.path.split(socket_path)
            try:
                self._folder = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            except OSError as e:
                raise PluginError(f"{socket_path}: {e.strerror}") from e
            socket_path = f"/proc/self/fd/{self._folder}/{name}"
        self._channel = grpc.aio.insecure_channel(f"unix://{socket_path}", options=[("grpc.enable_http_proxy", 0)])

    async def close(self) -> None:
        await self._channel.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    async def call(self, method: str, request: str, message: Message, answer: str, timeout_seconds: float = 120.0) -> Message:
        """One call; `method` is "/package.Service/Method". Raises PluginError."""
        stub = self._channel.unary_unary(method)
        try:
            data = await stub(encode(request, message), timeout=timeout_seconds, wait_for_ready=False)
        except self._grpc.aio.AioRpcError as e:
            text = f"rpc error: code = {_code_name(e.code().name)} desc = {e.details()}"
            raise PluginError(text, e.code().name) from e
        return decode(answer, data)

    async def stream(self, method: str, request: str, message: Message, answer: str) -> AsyncIterator[Message]:
        """A call with many answers. Raises PluginError when it breaks."""
        call = self._channel.unary_stream(method)(encode(request, message))
        try:
            async for data in call:
                yield decode(answer, data)
        except self._grpc.aio.AioRpcError as e:
            raise PluginError(str(e.details()), e.code().name) from e
        finally:
            with contextlib.suppress(Exception):
                call.cancel()


def _code_name(name: str) -> str:
    """gRPC's code as Go prints it."""
    return "".join(part.capitalize() for part in name.split("_"))
