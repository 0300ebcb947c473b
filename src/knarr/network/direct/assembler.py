"""eBPF instructions as bytes: a program is written as calls of `Code`, jumps name labels.

Role: `programs` writes with it what `bpf.Program` loads. Only what our programs need is here.
Source: linux/Documentation/bpf/standardization/instruction-set.rst (RFC 9669).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FRAME = range(11)
"""Registers: result, five arguments (lost in calls), four that calls keep, and the end of the stack."""
BYTE, HALF, WORD, DOUBLE = 0x10, 0x08, 0x00, 0x18
"""Sizes of 1, 2, 4 and 8 bytes."""
LOOKUP, RANDOM, REDIRECT, SOCKET_COOKIE, SETSOCKOPT, NETNS_COOKIE, REDIRECT_PEER = 1, 7, 23, 46, 49, 122, 155
"""Helper functions of the kernel."""
EQUAL, NOT_EQUAL, GREATER = 0x10, 0x50, 0x20
"""Conditions, unsigned."""
ADD, AND, SHIFT_LEFT, SHIFT_RIGHT, MOD = 0x00, 0x50, 0x60, 0x70, 0x90
_LOAD, _STORE_NUMBER, _STORE, _JUMP, _ALU, _NARROW = 0x61, 0x62, 0x63, 0x05, 0x07, 0x04
_REGISTER = 0x08
_IMMEDIATE64, _MAP_FD, _MAP_VALUE = 0x18, 1, 2
_INSTRUCTION = struct.Struct("=BBhi")


@dataclass(slots=True)
class _Line:
    operation: int
    registers: int
    offset: int | str
    number: int


class Code:
    """A program under construction."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []
        self._labels: dict[str, int] = {}

    def _add(self, operation: int, target: int = 0, source: int = 0, offset: int | str = 0, number: int = 0) -> Code:
        self._lines.append(_Line(operation, target | source << 4, offset, number))
        return self

    def label(self, name: str) -> Code:
        """Where jumps to `name` arrive."""
        self._labels[name] = len(self._lines)
        return self

    def load(self, size: int, target: int, source: int, offset: int) -> Code:
        """target = the bytes at source + offset."""
        return self._add(_LOAD | size, target, source, offset)

    def store(self, size: int, target: int, offset: int, source: int) -> Code:
        """The bytes at target + offset = source."""
        return self._add(_STORE | size, target, source, offset)

    def store_number(self, size: int, target: int, offset: int, number: int) -> Code:
        """The bytes at target + offset = a constant."""
        return self._add(_STORE_NUMBER | size, target, 0, offset, number)

    def copy(self, target: int, source: int) -> Code:
        """target = source, all 64 bits."""
        return self._add(0xB0 | _ALU | _REGISTER, target, source)

    def set(self, target: int, number: int) -> Code:
        """target = a constant of 32 bits, sign extended."""
        return self._add(0xB0 | _ALU, target, number=number)

    def compute(self, operation: int, target: int, number: int) -> Code:
        """target = target, operation, a constant (64 bits)."""
        return self._add(operation | _ALU, target, number=number)

    def remainder(self, target: int, source: int) -> Code:
        """target = target modulo source (32 bits); a source of zero leaves target."""
        return self._add(MOD | _NARROW | _REGISTER, target, source)

    def map(self, target: int, fd: int) -> Code:
        """target = a map."""
        self._add(_IMMEDIATE64, target, _MAP_FD, number=fd)
        return self._add(0)

    def memory(self, target: int, fd: int) -> Code:
        """target = the address of an array's first value."""
        self._add(_IMMEDIATE64, target, _MAP_VALUE, number=fd)
        return self._add(0)

    def add(self, target: int, source: int) -> Code:
        """target = target + source."""
        return self._add(ADD | _ALU | _REGISTER, target, source)

    def call(self, helper: int) -> Code:
        """R0 = helper(R1 … R5)."""
        return self._add(0x80 | _JUMP, number=helper)

    def jump(self, label: str) -> Code:
        """Go on at a label, which must come later."""
        return self._add(_JUMP, offset=label)

    def jump_if(self, register: int, condition: int, number: int, label: str) -> Code:
        """Go on at a label if the register (64 bits) compares so with a constant (sign extended)."""
        return self._add(condition | _JUMP, register, offset=label, number=number)

    def jump_if_register(self, register: int, condition: int, other: int, label: str) -> Code:
        """Go on at a label if two registers compare so."""
        return self._add(condition | _JUMP | _REGISTER, register, other, label)

    def lookup(self, fd: int, key_offset: int, missing: str) -> Code:
        """R0 = the entry of the map for the key at FRAME + key_offset; to `missing` if there is none."""
        self.map(R1, fd).copy(R2, FRAME).compute(ADD, R2, key_offset).call(LOOKUP)
        return self.jump_if(R0, EQUAL, 0, missing)

    def exit(self) -> Code:
        """End with R0."""
        return self._add(0x95)

    def assemble(self) -> bytes:
        """The program."""
        out = []
        for place, line in enumerate(self._lines):
            offset = self._labels[line.offset] - place - 1 if isinstance(line.offset, str) else line.offset
            out.append(_INSTRUCTION.pack(line.operation, line.registers, offset, line.number))
        return b"".join(out)
