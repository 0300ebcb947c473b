"""Text to syntax tree: lexer and recursive descent, with the standard macros and optional syntax.

Source: the CEL language definition (grammar, lexis, macros); cel-go's optional types and two-variable comprehensions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from knarr.api.cel.ast import Call, Comprehension, Ident, ListNode, Literal, MapNode, Node, Select, StructNode
from knarr.api.cel.errors import CompileError, Issue
from knarr.api.cel.values import UInt

MAX_SOURCE_CHARACTERS = 100_000
MAX_DEPTH = 250
_RESERVED = frozenset({
    "as", "break", "const", "continue", "else", "for", "function", "if", "import", "let", "loop", "package", "namespace", "return", "var", "void",
    "while",
})  # fmt: skip
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
  | (?P<string>(?:[rR][bB]?|[bB][rR]?)?(?:\"\"\"(?:\\.|[^\\])*?\"\"\"|'''(?:\\.|[^\\])*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
  | (?P<float>[0-9]+\.[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+|\.[0-9]+(?:[eE][+-]?[0-9]+)?)
  | (?P<uint>(?:0[xX][0-9a-fA-F]+|[0-9]+)[uU])
  | (?P<int>0[xX][0-9a-fA-F]+|[0-9]+)
  | (?P<ident>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<quoted>`[A-Za-z0-9_.\-/ ]+`)
  | (?P<op>&&|\|\||==|!=|<=|>=|\.\?|\[\?|[-+*/%!<>?:.,()\[\]{}])
""",
    re.VERBOSE | re.DOTALL,
)
_RAW_STRING = re.compile(r"""([rR][bB]?|[bB][rR]?)?(\"\"\"|'''|"|')""")


class Token(NamedTuple):
    kind: str
    text: str
    offset: int


def _lex(source: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None:
            shown = source[position]
            raise CompileError(source, [Issue(position, f"Syntax error: token recognition error at: '{shown}'")])
        kind = match.lastgroup or ""
        text = match[0]
        if kind == "string":
            prefix = _RAW_STRING.match(text)
            if prefix is not None and prefix[1] and prefix[1].lower() in ("r", "br", "rb"):
                # Raw strings end at the first quote: backslashes mean nothing in them.
                quote = prefix[2]
                end = source.find(quote, position + prefix.end())
                if end < 0:
                    raise CompileError(source, [Issue(position, "Syntax error: unterminated string")])
                text = source[position : end + len(quote)]
        if kind != "space":
            tokens.append(Token(kind, text, position))
        position += len(text)
    tokens.append(Token("end", "<EOF>", len(source)))
    return tokens


_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"', "`": "`", "?": "?"}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|X([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|(.))", re.DOTALL)


def _unescape(source: str, token: Token) -> str | bytes:
    match = _RAW_STRING.match(token.text)
    assert match is not None
    prefix = (match[1] or "").lower()
    body = token.text[match.end() : -len(match[2])]
    binary = "b" in prefix
    if "r" in prefix:
        return body.encode() if binary else body
    out: list[bytes | str] = []
    position = 0
    for found in _ESCAPE.finditer(body):
        out.append(body[position : found.start()])
        position = found.end()
        hexadecimal = found[1] or found[2]
        if hexadecimal or found[5]:
            code = int(hexadecimal, 16) if hexadecimal else int(found[5], 8)
            out.append(bytes([code]) if binary else chr(code))
        elif found[3] or found[4]:
            code = int(found[3] or found[4], 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise CompileError(source, [Issue(token.offset, "Syntax error: invalid unicode code point")])
            out.append(chr(code))
        elif found[6] in _ESCAPES:
            out.append(_ESCAPES[found[6]])
        else:
            raise CompileError(source, [Issue(token.offset, f"Syntax error: token recognition error at: '{token.text}'")])
    out.append(body[position:])
    if binary:
        return b"".join(part if isinstance(part, bytes) else part.encode() for part in out)
    return "".join(part if isinstance(part, str) else part.decode() for part in out)


_RELATIONS = {"==": "_==_", "!=": "_!=_", "<": "_<_", "<=": "_<=_", ">": "_>_", ">=": "_>=_", "in": "@in"}
_ADDITIONS = {"+": "_+_", "-": "_-_"}
_PRODUCTS = {"*": "_*_", "/": "_/_", "%": "_%_"}
_ONE_VARIABLE = frozenset({"all", "exists", "exists_one", "existsOne", "filter", "map"})
_TWO_VARIABLES = frozenset({"all", "exists", "existsOne", "exists_one", "transformList", "transformMap", "transformMapEntry"})


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens = _lex(source)
        self.position = 0
        self.depth = 0

    # -- tokens ------------------------------------------------------------------------------------------------------
    @property
    def token(self) -> Token:
        return self.tokens[self.position]

    def fail(self, message: str, offset: int | None = None) -> CompileError:
        return CompileError(self.source, [Issue(self.token.offset if offset is None else offset, f"Syntax error: {message}")])

    def accept(self, *texts: str) -> Token | None:
        token = self.token
        if token.text in texts and token.kind in ("op", "ident"):
            self.position += 1
            return token
        return None

    def expect(self, text: str) -> Token:
        found = self.accept(text)
        if found is None:
            raise self.fail(f"mismatched input '{self.token.text}' expecting '{text}'")
        return found

    # -- expressions ---------------------------------------------------------------------------------------------------
    def expression(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail("expression recursion limit exceeded: 250")
        node = self.disjunction()
        question = self.accept("?")
        if question is not None:
            then = self.disjunction()
            self.expect(":")
            node = Call(question.offset, "_?_:_", None, [node, then, self.expression()])
        self.depth -= 1
        return node

    def disjunction(self) -> Node:
        node = self.conjunction()
        while operator := self.accept("||"):
            node = Call(operator.offset, "_||_", None, [node, self.conjunction()])
        return node

    def conjunction(self) -> Node:
        node = self.relation()
        while operator := self.accept("&&"):
            node = Call(operator.offset, "_&&_", None, [node, self.relation()])
        return node

    def relation(self) -> Node:
        node = self.addition()
        while operator := self.accept(*_RELATIONS):
            node = Call(operator.offset, _RELATIONS[operator.text], None, [node, self.addition()])
        return node

    def addition(self) -> Node:
        node = self.product()
        while operator := self.accept("+", "-"):
            node = Call(operator.offset, _ADDITIONS[operator.text], None, [node, self.product()])
        return node

    def product(self) -> Node:
        node = self.unary()
        while operator := self.accept("*", "/", "%"):
            node = Call(operator.offset, _PRODUCTS[operator.text], None, [node, self.unary()])
        return node

    def unary(self) -> Node:
        operator = self.accept("!", "-")
        if operator is None:
            return self.member()
        count = 1
        while self.accept(operator.text):
            count += 1
        if operator.text == "-" and self.token.kind in ("int", "float"):
            # The literal takes the sign itself, so that the smallest integer can be written.
            token = self.token
            self.position += 1
            number = self._number(token, negative=count % 2 == 1)
            return self.member(Literal(operator.offset, number))
        node = self.member()
        if count % 2 == 0:
            return node
        return Call(operator.offset, "!_" if operator.text == "!" else "-_", None, [node])

    def _number(self, token: Token, *, negative: bool) -> int | float:
        if token.kind == "float":
            return -float(token.text) if negative else float(token.text)
        value = int(token.text, 16) if token.text[:2].lower() == "0x" else int(token.text)
        value = -value if negative else value
        if not -(1 << 63) <= value < 1 << 63:
            raise self.fail("invalid int literal", token.offset)
        return value

    def member(self, node: Node | None = None) -> Node:
        if node is None:
            node = self.primary()
        while True:
            operator = self.accept(".", ".?", "[", "[?")
            if operator is None:
                return node
            if operator.text == ".":
                node = self._dot(node, operator.offset)
            elif operator.text == ".?":
                name = self._field_name()
                node = Select(operator.offset, node, name, optional=True)
            else:
                key = self.expression()
                self.expect("]")
                node = Call(operator.offset, "_[_]" if operator.text == "[" else "_[?_]", None, [node, key])

    def _field_name(self) -> str:
        token = self.token
        if token.kind == "quoted":
            self.position += 1
            return token.text[1:-1]
        if token.kind != "ident" or token.text in ("in", "true", "false", "null"):
            raise self.fail(f"no viable alternative at input '.{token.text}'")
        self.position += 1
        return token.text

    def _dot(self, node: Node, offset: int) -> Node:
        quoted = self.token.kind == "quoted"
        name_offset = self.token.offset
        name = self._field_name()
        opening = self.accept("(") if not quoted else None
        if opening is None:
            return Select(offset, node, name)
        args = self._arguments(")")
        macro = self._method_macro(node, name, args, name_offset)
        return macro if macro is not None else Call(opening.offset, name, node, args)

    def _arguments(self, closing: str) -> list[Node]:
        args: list[Node] = []
        while not self.accept(closing):
            args.append(self.expression())
            if not self.accept(","):
                self.expect(closing)
                break
        return args

    # -- primaries -----------------------------------------------------------------------------------------------------
    def primary(self) -> Node:
        token = self.token
        if token.kind == "int" or token.kind == "float":
            self.position += 1
            return Literal(token.offset, self._number(token, negative=False))
        if token.kind == "uint":
            self.position += 1
            text = token.text[:-1]
            value = int(text, 16) if text[:2].lower() == "0x" else int(text)
            if value >= 1 << 64:
                raise self.fail("invalid uint literal", token.offset)
            return Literal(token.offset, UInt(value))
        if token.kind == "string":
            self.position += 1
            return Literal(token.offset, _unescape(self.source, token))
        if self.accept("("):
            node = self.expression()
            self.expect(")")
            return node
        if self.accept("["):
            return self._list(token.offset, first_optional=False)
        if self.accept("[?"):
            return self._list(token.offset, first_optional=True)
        if self.accept("{"):
            return self._map(token.offset)
        if token.text == "." and token.kind == "op":
            self.position += 1
            token = self.token
        if token.kind == "ident":
            return self._name(token)
        raise self.fail(f"mismatched input '{token.text}' expecting {{'[', '{{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}}")

    def _name(self, token: Token) -> Node:
        self.position += 1
        if token.text in ("true", "false"):
            return Literal(token.offset, token.text == "true")
        if token.text == "null":
            return Literal(token.offset, None)
        if token.text in _RESERVED:
            raise CompileError(self.source, [Issue(token.offset, f"Syntax error: reserved identifier: {token.text}")])
        opening = self.accept("(")
        if opening is not None:
            args = self._arguments(")")
            return self._function(token, args, opening.offset)
        struct = self._struct(token)
        return struct if struct is not None else Ident(token.offset, token.text)

    def _struct(self, token: Token) -> Node | None:
        """Name{...} or Dotted.Name{...}; anything else is left untouched."""
        start = self.position
        name = token.text
        while self.token.text == "." and self.tokens[self.position + 1].kind == "ident":
            self.position += 2
            name += "." + self.tokens[self.position - 1].text
        if not (self.token.text == "{" and self.token.kind == "op"):
            self.position = start
            return None
        self.position += 1
        fields: list[tuple[str, Node, bool]] = []
        while not self.accept("}"):
            optional = self.accept("?") is not None
            field = self._field_name()
            self.expect(":")
            fields.append((field, self.expression(), optional))
            if not self.accept(","):
                self.expect("}")
                break
        return StructNode(token.offset, name, fields)

    def _list(self, offset: int, *, first_optional: bool) -> Node:
        items: list[Node] = []
        optional: set[int] = set()
        if first_optional:
            optional.add(0)
        while first_optional or not self.accept("]"):
            if not first_optional and self.accept("?"):
                optional.add(len(items))
            first_optional = False
            items.append(self.expression())
            if not self.accept(","):
                self.expect("]")
                break
        return ListNode(offset, items, frozenset(optional))

    def _map(self, offset: int) -> Node:
        entries: list[tuple[Node, Node, bool]] = []
        while not self.accept("}"):
            optional = self.accept("?") is not None
            key = self.expression()
            self.expect(":")
            entries.append((key, self.expression(), optional))
            if not self.accept(","):
                self.expect("}")
                break
        return MapNode(offset, entries)

    # -- macros --------------------------------------------------------------------------------------------------------
    def _function(self, token: Token, args: list[Node], opening: int) -> Node:
        if token.text == "has" and len(args) == 1:
            operand = args[0]
            if isinstance(operand, Select) and not operand.optional:
                return Select(opening, operand.operand, operand.name, test=True)
            raise CompileError(self.source, [Issue(opening, "invalid argument to has() macro")])
        return Call(opening, token.text, None, args)

    def _variable(self, node: Node) -> str:
        if not isinstance(node, Ident):
            raise CompileError(self.source, [Issue(node.offset, "argument must be a simple name")])
        return node.name

    def _method_macro(self, target: Node, name: str, args: list[Node], offset: int) -> Node | None:
        if name in ("optMap", "optFlatMap") and len(args) == 2:
            return Comprehension(offset, name, target, [self._variable(args[0])], None, args[1])
        if name in _ONE_VARIABLE and len(args) == 2:
            variable = [self._variable(args[0])]
            if name == "map":
                return Comprehension(offset, "map", target, variable, None, args[1])
            kind = "existsOne" if name == "exists_one" else name
            return Comprehension(offset, kind, target, variable, args[1], None)
        if name == "map" and len(args) == 3:
            return Comprehension(offset, "map", target, [self._variable(args[0])], args[1], args[2])
        if name in _TWO_VARIABLES and len(args) in (3, 4) and isinstance(args[0], Ident) and isinstance(args[1], Ident):
            variables = [self._variable(args[0]), self._variable(args[1])]
            if name.startswith("transform"):
                condition = args[2] if len(args) == 4 else None
                return Comprehension(offset, name, target, variables, condition, args[-1])
            if len(args) == 3:
                kind = "existsOne" if name == "exists_one" else name
                return Comprehension(offset, kind, target, variables, args[2], None)
        return None


def parse(source: str) -> Node:
    """Parse an expression. Raises CompileError."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise CompileError(source[:100], [Issue(0, f"expression code point size exceeds limit: size: {len(source)}, limit {MAX_SOURCE_CHARACTERS}")])
    parser = _Parser(source)
    node = parser.expression()
    if parser.token.kind != "end":
        raise parser.fail(f"mismatched input '{parser.token.text}' expecting <EOF>")
    return node
