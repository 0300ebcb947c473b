"""The gRPC health check, as one HTTP/2 request written by hand: no gRPC library in the node process for one call.

Caller: probes.worker. Only what `grpc.health.v1.Health/Check` over plain text needs: preface, SETTINGS, one request with
literal headers, then frames until the answer's first message. Source: pkg/probe/grpc, grpc health checking protocol, RFC 9113.
"""

from __future__ import annotations

import asyncio
import struct

from knarr.kubelet.probes.actions import USER_AGENT, Outcome, connect_error

_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_NAMES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(name: str, value: str) -> bytes:
    """One header, never indexed, without Huffman coding; both parts are shorter than 127 bytes."""
    return b"\x10" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


def _request(authority: str, service: str) -> bytes:
    headers = b"".join(
        _literal(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", authority[:120]),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", USER_AGENT),
        )
    )
    name = service.encode()
    message = (b"\x0a" + _varint(len(name)) + name) if name else b""
    body = b"\x00" + struct.pack(">I", len(message)) + message
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, body)
    )


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _status(message: bytes) -> int:
    """Field 1 of HealthCheckResponse; absent is UNKNOWN."""
    if len(message) >= 2 and message[0] == 0x08:
        return message[1] & 0x7F
    return 0


async def check(host: str, port: int, service: str, timeout_seconds: float) -> Outcome:
    """Ask the server whether the service is serving."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_request(address, service))
                return await _answer(reader, writer)
            finally:
                writer.transport.abort()
    except TimeoutError:
        return Outcome(False, f'timeout: failed to connect service "{address}" within {timeout_seconds:g}s: context deadline exceeded')
    except (OSError, EOFError) as e:
        return Outcome(False, f'timeout: failed to connect service "{address}" within {timeout_seconds:g}s: {connect_error(e, host, port)}')


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Outcome:
    received = b""
    while True:
        head = await reader.readexactly(9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = await reader.readexactly(length)
        if kind == _SETTINGS and not flags & _ACK:
            writer.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            writer.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _DATA:
            received += payload
            if len(received) >= 5 and len(received) - 5 >= struct.unpack(">I", received[1:5])[0]:
                status = _status(received[5:])
                if status == 1:
                    return Outcome(True, "service healthy")
                return Outcome(False, f'service unhealthy (responded with "{_NAMES.get(status, str(status))}")')
        elif kind in (_RST, _GOAWAY):
            return Outcome(False, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)")
        if kind in (_HEADERS, _DATA) and flags & _END_STREAM:
            # Trailers without a message: the method is unknown or the service is.
            return Outcome(False, "error: health rpc failed, or this server does not implement the grpc health protocol (grpc.health.v1.Health)")
