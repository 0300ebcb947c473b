"""The programs of the direct path and the layout of their maps.

Role: `path` and `services` own the maps and attach what is assembled here. Addresses are 16 bytes everywhere, those of
IPv4 mapped (::ffff:a.b.c.d), so one map serves both families.

    pods      address -> link, place in `state`, hardware address           pods of this node; without link, the node itself
    peers     longest prefix -> link (0: leave it to the IP stack), hardware addresses, MTU   pods of other nodes
    plain     address . port -> 1            destinations outside of the pod network that nobody translates
    state     one byte array: switches of pods and of the host at 0 and 1; from a pod's place on: translated, held
    members   cookie of a network namespace -> POD or HOST
    services  address . port -> number, count of endpoints, whether only for the host
    endpoints number . index -> address . port
    former    one byte array: for the latest sockets, what they were asked to connect to, where they went, their cookie

`from_pod` runs for every packet that a pod sends, before the node's IP stack sees it. TCP segments between two pods of
which neither needs tracking go straight into the other's namespace, or into the tunnel to its node. A connection
request that leaves the pod network may come to be translated by the node, and then answers must pass the node's
tracking: from it on the sender is `translated`, and all of its segments take the stack.
`from_tunnel` does the same for what other nodes send. `connect` leads a socket that is about to connect to a Service to
one of its endpoints at once, so that nothing is to be translated; `peer_name` tells the program what it asked for. The
host's own segments pass its stack in any case; sockets of the host that were led are marked, so that rules (`podnet`)
can keep their segments out of tracking.
Invariants: a program that does not know leaves the packet or socket as it is.
Source: the division is that of Cilium's socket load balancer and eBPF host routing; linux/include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import socket
import struct

from knarr.network.direct.assembler import (
    ADD,
    AND,
    BYTE,
    DOUBLE,
    EQUAL,
    FRAME,
    GREATER,
    HALF,
    NETNS_COOKIE,
    NOT_EQUAL,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    RANDOM,
    REDIRECT,
    REDIRECT_PEER,
    SETSOCKOPT,
    SHIFT_LEFT,
    SHIFT_RIGHT,
    SOCKET_COOKIE,
    WORD,
    Code,
)
from knarr.network.direct.bpf import Map

POD, HOST = 1, 2
LED_MARK = 0x1000
"""Mark of the host's sockets whose connection needs no tracking."""
_SOL_SOCKET, _SO_MARK = 1, 36
STATE_BYTES, PLACE_BYTES = 65536, 8
HOST_SWITCH = 1
TRANSLATED, HELD = 0, 1
"""Bytes of a pod's place."""
PODS_VALUE, PEERS_VALUE, ADDRESS_PORT, SERVICE, ENDPOINT_KEY = (
    struct.Struct("=II6s2x"), struct.Struct("=I6s6sI"), struct.Struct("=16s2s2x"), struct.Struct("=III"), struct.Struct("=II"),
)  # fmt: skip
FORMER_BYTES, _FORMER_PLACE = 1 << 20, 64

_PASS = -1
_LENGTH, _LINK, _PACKET, _END, _SEGMENT = 0, 40, 76, 80, 176
_USER4, _USER6, _PORT, _PROTOCOL, _SOCKET, _SOCKET_MARK = 4, 8, 24, 36, 64, 16
_TCP = 6
_MAPPED = -0x10000 if struct.pack("=H", 1) == b"\x01\x00" else 0xFFFF
"""::ffff: as the word that it is in memory."""
_MAPPED_PREFIX = bytes(10) + b"\xff\xff"
_ETHERNET = 14
_NODE_MAC_WORD, _NODE_MAC_HALF = 0xEEEEEEEE - (1 << 32), 0xEEEE
# Places on the stack of `from_pod`: the length of both headers, the source, the destination as the key of three maps (prefix length
# before, port behind), and the segment's flags.
_HEADERS, _SOURCE, _PREFIX, _DESTINATION, _DESTINATION_PORT, _FLAGS = -56, -48, -28, -24, -8, -4


def packed(address: str) -> bytes:
    """An address as these maps have it."""
    return socket.inet_pton(socket.AF_INET6, address) if ":" in address else _MAPPED_PREFIX + socket.inet_aton(address)


def address_port(address: str, port: int) -> bytes:
    """A key of `plain` and `services`."""
    return ADDRESS_PORT.pack(packed(address), struct.pack(">H", port))


def _parse(code: Code) -> None:
    """R6 the packet's context, R7 its first byte; the stack holds addresses, port and TCP flags. Else the packet passes."""
    code.copy(R6, R1).load(WORD, R7, R6, _PACKET).load(WORD, R2, R6, _END)
    code.copy(R3, R7).compute(ADD, R3, _ETHERNET + 20 + 20).jump_if_register(R3, GREATER, R2, "pass")
    code.load(HALF, R3, R7, 12).jump_if(R3, EQUAL, socket.htons(0x86DD), "six").jump_if(R3, NOT_EQUAL, socket.htons(0x0800), "pass")
    code.load(BYTE, R3, R7, _ETHERNET).jump_if(R3, NOT_EQUAL, 0x45, "pass")
    code.load(HALF, R3, R7, _ETHERNET + 6).compute(AND, R3, socket.htons(0x3FFF)).jump_if(R3, NOT_EQUAL, 0, "pass")
    code.load(BYTE, R3, R7, _ETHERNET + 9).jump_if(R3, NOT_EQUAL, _TCP, "pass")
    for place, offset in ((_SOURCE, 12), (_DESTINATION, 16)):
        code.store_number(WORD, FRAME, place, 0).store_number(WORD, FRAME, place + 4, 0).store_number(WORD, FRAME, place + 8, _MAPPED)
        code.load(WORD, R3, R7, _ETHERNET + offset).store(WORD, FRAME, place + 12, R3)
    _parse_tcp(code, 20)
    code.jump("parsed").label("six")
    code.copy(R3, R7).compute(ADD, R3, _ETHERNET + 40 + 20).jump_if_register(R3, GREATER, R2, "pass")
    code.load(BYTE, R3, R7, _ETHERNET + 6).jump_if(R3, NOT_EQUAL, _TCP, "pass")
    for place, offset in ((_SOURCE, 8), (_DESTINATION, 24)):
        for word in range(0, 16, 4):
            code.load(WORD, R3, R7, _ETHERNET + offset + word).store(WORD, FRAME, place + word, R3)
    _parse_tcp(code, 40)
    code.label("parsed")


def _parse_tcp(code: Code, header: int) -> None:
    code.load(HALF, R3, R7, _ETHERNET + header + 2).store(HALF, FRAME, _DESTINATION_PORT, R3).store_number(
        HALF, FRAME, _DESTINATION_PORT + 2, 0
    )
    code.load(BYTE, R3, R7, _ETHERNET + header + 13).store(BYTE, FRAME, _FLAGS, R3)
    code.load(BYTE, R3, R7, _ETHERNET + header + 12).compute(AND, R3, 0xF0).compute(SHIFT_RIGHT, R3, 2).compute(ADD, R3, header)
    code.store(DOUBLE, FRAME, _HEADERS, R3)


def _into_pod(code: Code) -> None:
    """To the pod whose entry R0 is, unless its place (state at R9) says no."""
    code.load(BYTE, R1, R9, 0).jump_if(R1, EQUAL, 0, "pass")
    code.load(WORD, R2, R0, 4).compute(AND, R2, STATE_BYTES - PLACE_BYTES).copy(R3, R9).add(R3, R2)
    code.load(HALF, R1, R3, 0).jump_if(R1, NOT_EQUAL, 0, "pass")
    code.load(WORD, R1, R0, 8).store(WORD, R7, 0, R1).load(HALF, R1, R0, 12).store(HALF, R7, 4, R1)
    code.store_number(WORD, R7, 6, _NODE_MAC_WORD).store_number(HALF, R7, 10, _NODE_MAC_HALF)
    code.load(WORD, R1, R0, 0).set(R2, 0).call(REDIRECT_PEER).exit()


def _end(code: Code) -> bytes:
    return code.label("pass").set(R0, _PASS).exit().assemble()


def from_pod(pods: Map, peers: Map, plain: Map, state: Map) -> bytes:
    """Classifier at the node's end of a pod's link."""
    code = Code()
    _parse(code)
    code.lookup(pods.fd, _SOURCE, "pass")
    # Nobody sends in another's name; who tries meets the rules of the stack.
    code.load(WORD, R1, R0, 0).load(WORD, R2, R6, _LINK).jump_if_register(R1, NOT_EQUAL, R2, "pass")
    code.load(WORD, R2, R0, 4).compute(AND, R2, STATE_BYTES - PLACE_BYTES).memory(R9, state.fd).copy(R8, R9).add(R8, R2)
    code.lookup(pods.fd, _DESTINATION, "elsewhere")
    code.load(WORD, R1, R0, 0).jump_if(R1, EQUAL, 0, "outside").load(HALF, R1, R8, 0).jump_if(R1, NOT_EQUAL, 0, "pass")
    _into_pod(code)
    code.label("elsewhere").store_number(WORD, FRAME, _PREFIX, 128).lookup(peers.fd, _PREFIX, "outside")
    code.load(BYTE, R1, R9, 0).jump_if(R1, EQUAL, 0, "pass").load(HALF, R1, R8, 0).jump_if(R1, NOT_EQUAL, 0, "pass")
    code.load(WORD, R4, R0, 0).jump_if(R4, EQUAL, 0, "pass")
    # Who sends more than the tunnel carries must hear of it, from the stack.
    code.load(WORD, R1, R6, _LENGTH).compute(ADD, R1, -_ETHERNET).load(WORD, R2, R6, _SEGMENT).jump_if(R2, EQUAL, 0, "whole")
    code.load(DOUBLE, R1, FRAME, _HEADERS).add(R1, R2).label("whole")
    code.load(WORD, R2, R0, 16).jump_if_register(R1, GREATER, R2, "pass")
    code.load(WORD, R1, R0, 4).store(WORD, R7, 0, R1).load(HALF, R1, R0, 8).store(HALF, R7, 4, R1)
    code.load(HALF, R1, R0, 10).store(HALF, R7, 6, R1).load(WORD, R1, R0, 12).store(WORD, R7, 8, R1)
    code.copy(R1, R4).set(R2, 0).call(REDIRECT).exit()
    code.label("outside").load(BYTE, R1, FRAME, _FLAGS).compute(AND, R1, 0x12).jump_if(R1, NOT_EQUAL, 0x02, "pass")
    code.lookup(plain.fd, _DESTINATION, "translated").jump("pass")
    code.label("translated").store_number(BYTE, R8, TRANSLATED, 1)
    return _end(code)


def from_tunnel(pods: Map, state: Map) -> bytes:
    """Classifier at the tunnel's device."""
    code = Code()
    _parse(code)
    code.lookup(pods.fd, _DESTINATION, "pass").load(WORD, R1, R0, 0).jump_if(R1, EQUAL, 0, "pass").memory(R9, state.fd)
    _into_pod(code)
    return _end(code)


# Places on the stack of `connect`: a cookie, what is asked for, an endpoint's key, who asks, the mark.
_COOKIE, _ASKED, _CHOSEN, _KIND, _MARK = -8, -32, -40, -48, -52


def _asked(code: Code, version: int, place: int) -> None:
    """The address and port in the context (R6), to the stack."""
    if version == 4:
        code.store_number(WORD, FRAME, place, 0).store_number(WORD, FRAME, place + 4, 0).store_number(WORD, FRAME, place + 8, _MAPPED)
        code.load(WORD, R3, R6, _USER4).store(WORD, FRAME, place + 12, R3)
    else:
        for word in range(0, 16, 4):
            code.load(WORD, R3, R6, _USER6 + word).store(WORD, FRAME, place + word, R3)
    code.load(WORD, R3, R6, _PORT).store(HALF, FRAME, place + 16, R3).store_number(HALF, FRAME, place + 18, 0)


def _answer(code: Code, version: int, source: int, offset: int) -> None:
    """The address and port at source + offset, to the context (R6)."""
    if version == 4:
        code.load(WORD, R3, source, offset + 12).store(WORD, R6, _USER4, R3)
    else:
        for word in range(0, 16, 4):
            code.load(WORD, R3, source, offset + word).store(WORD, R6, _USER6 + word, R3)
    code.load(HALF, R3, source, offset + 16).store(WORD, R6, _PORT, R3)


def _place(code: Code, former: Map) -> None:
    """R0 the socket's cookie, R1 its place in `former`.

    Cookies are numbers in sequence, so a place is used again after that many sockets. A map by cookie that forgets the least used costs ten
    times as much, 3 % of a whole connection.
    """
    code.copy(R1, R6).call(SOCKET_COOKIE).copy(R2, R0).compute(AND, R2, FORMER_BYTES // _FORMER_PLACE - 1)
    code.compute(SHIFT_LEFT, R2, _FORMER_PLACE.bit_length() - 1).memory(R1, former.fd).add(R1, R2)


def connect(version: int, members: Map, services: Map, endpoints: Map, former: Map, state: Map) -> bytes:
    """Hook of connect() in sockets of a family; those of IPv6 may name mapped addresses."""
    code = Code()
    code.copy(R6, R1).load(WORD, R1, R6, _PROTOCOL).jump_if(R1, NOT_EQUAL, _TCP, "pass")
    code.copy(R1, R6).call(NETNS_COOKIE).store(DOUBLE, FRAME, _COOKIE, R0).lookup(members.fd, _COOKIE, "pass").load(WORD, R7, R0, 0)
    _asked(code, version, _ASKED)
    code.lookup(services.fd, _ASKED, "pass").load(WORD, R8, R0, 0).load(WORD, R9, R0, 4)
    code.store(DOUBLE, FRAME, _KIND, R7)
    code.load(WORD, R1, R0, 8).jump_if(R1, EQUAL, 0, "ours").jump_if(R7, NOT_EQUAL, HOST, "pass").label("ours")
    code.call(RANDOM).remainder(R0, R9).store(WORD, FRAME, _CHOSEN, R8).store(WORD, FRAME, _CHOSEN + 4, R0)
    code.lookup(endpoints.fd, _CHOSEN, "pass").copy(R7, R0)
    _place(code, former)
    for word in range(0, 20, 4):
        code.load(WORD, R3, FRAME, _ASKED + word).store(WORD, R1, word, R3)
        code.load(WORD, R3, R7, word).store(WORD, R1, 20 + word, R3)
    code.store(DOUBLE, R1, 40, R0)
    _answer(code, version, R7, 0)
    code.load(DOUBLE, R1, FRAME, _KIND).jump_if(R1, NOT_EQUAL, HOST, "pass")
    code.memory(R1, state.fd).load(BYTE, R1, R1, HOST_SWITCH).jump_if(R1, EQUAL, 0, "pass")
    # A mark of somebody else's is left as it is.
    code.load(DOUBLE, R1, R6, _SOCKET).load(WORD, R1, R1, _SOCKET_MARK).jump_if(R1, NOT_EQUAL, 0, "pass")
    code.store_number(WORD, FRAME, _MARK, LED_MARK).copy(R1, R6).set(R2, _SOL_SOCKET).set(R3, _SO_MARK)
    code.copy(R4, FRAME).compute(ADD, R4, _MARK).set(R5, 4).call(SETSOCKOPT)
    return code.label("pass").set(R0, 1).exit().assemble()


def peer_name(version: int, former: Map) -> bytes:
    """Hook of getpeername(): the Service, where `connect` has led the socket to an endpoint."""
    code = Code()
    code.copy(R6, R1)
    _asked(code, version, _ASKED)
    _place(code, former)
    code.copy(R7, R1).load(DOUBLE, R1, R7, 40).jump_if_register(R1, NOT_EQUAL, R0, "pass")
    for word in range(0, 20, 4):
        code.load(WORD, R1, R7, 20 + word).load(WORD, R2, FRAME, _ASKED + word).jump_if_register(R1, NOT_EQUAL, R2, "pass")
    _answer(code, version, R7, 0)
    return code.label("pass").set(R0, 1).exit().assemble()
