"""PTX text: a module's variables and kernels, and a kernel's statements with the scopes they stand in."""

import re
from typing import NamedTuple

# Bytes of a type in memory, and in a register (a predicate is a mask of lanes: 4 bytes for a whole warp).
SIZE = {"b8": 1, "u8": 1, "s8": 1}
SIZE |= dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2)
SIZE |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4)
SIZE |= dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8)
WIDTH = {name: max(size, 2) for name, size in SIZE.items()} | {"pred": 4}


class PtxError(ValueError):
    """The text is not what it should be."""


class UnknownPtxError(PtxError):
    """The text is PTX that the emulator does not know."""


class Variable(NamedTuple):
    """A variable in shared memory; of no size: where dynamic shared memory begins."""

    name: str
    align: int
    size: int


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


Scope = tuple[int, ...]
"""Numbers of the braces around a statement, outermost first."""


class Statement(NamedTuple):
    """An instruction, a directive or, with a colon at its end, a label."""

    text: str
    scope: Scope
    location: tuple[int, ...] | None
    """Of the source: file, line, column and, where it is inlined, file and line of that."""
    line: int
    """Of the PTX."""


_SHARED = re.compile(r"\s*(?:\.weak\s+|\.visible\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_EXTERN_SHARED = re.compile(r"\s*\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)\[\]")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[.\w\s]*?)?\s+([\w$]+)(?:\[(\d+)\])?$")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?")


def shared_variable(text: str) -> Variable | None:
    """The variable that a statement declares."""
    match = _SHARED.match(text)
    return match and Variable(match[3], int(match[1]), SIZE[match[2]] * int(match[4] or 1))


def split_operands(text: str) -> list[str]:
    """Operands of an instruction; those in brackets and braces are one."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


def number(text: str) -> int | None:
    """The integer that an immediate is, or None."""
    match = re.fullmatch(r"\s*(-?)(0[xX][0-9a-fA-F]+|\d+)U?\s*", text)
    return match and int(match[1] + match[2], 16 if match[2][:2] in ("0x", "0X") else 10)


class Module:
    """The text of a PTX module."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.files = {}
        """Names of source files by the number that .loc gives them."""
        for count, first, second in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text, re.M):
            self.files[int(count)] = second or first
        self.entries = {match[1]: match.start() for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text)}
        """Where each kernel's text begins, by name."""
        lines = list(_outermost(text.split("\n")))
        self.shared = [variable for line in lines if (variable := shared_variable(line))]
        self.dynamic_shared = [Variable(m[2], int(m[1]), 0) for line in lines if (m := _EXTERN_SHARED.match(line))]

    @property
    def target(self) -> str:
        """The GPU it is for: sm_80, sm_90a, ..."""
        return re.search(r"^\s*\.target\s+(\w+)", self.text, re.M)[1]


class Entry:
    """A kernel of a module: its parameters, the block it is for and its statements."""

    def __init__(self, module: Module, name: str) -> None:
        text, start = module.text, module.entries[name]
        close = text.index(")", start)
        body = text.index("{", close)
        self.parameters, self.parameter_bytes = _parameters(text[text.index("(", start) + 1 : close])
        header = text[close:body]
        required = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", header)
        self.required_block = required and tuple(int(size or 1) for size in required.groups())
        clusters = re.search(r"\.(reqnctapercluster|explicitcluster|maxclusterrank)\b", header)
        if clusters:
            raise UnknownPtxError(f"clusters of blocks: {clusters[0]} of {name}")
        registers = re.search(r"\.maxnreg\s+(\d+)", header)
        self.register_limit = int(registers[1]) if registers else 0
        self.statements = list(_statements(text[body:], text.count("\n", 0, body) + 1))


def _parameters(text: str) -> tuple[list[Parameter], int]:
    parameters, offset = [], 0
    for declaration in (part.strip().replace("\t", " ") for part in text.split(",") if part.strip()):
        match = _PARAMETER.match(declaration)
        if not match:
            raise UnknownPtxError(f"parameter {declaration!r}")
        size = SIZE[match[2]]
        align = int(match[1] or size)
        offset = -(-offset // align) * align
        parameters.append(Parameter(match[3], offset, size * int(match[4] or 1)))
        offset += parameters[-1].size
    return parameters, offset


def _outermost(lines: list[str]):
    """The lines outside of all braces."""
    depth = 0
    for line in _without_comments(lines):
        if depth == 0:
            yield line
        depth += line.count("{") - line.count("}")


def _without_comments(lines: list[str]):
    inside = False
    for line in lines:
        if inside:
            if "*/" not in line:
                yield ""
                continue
            line = line.split("*/", 1)[1]
        line = re.sub(r"/\*.*?\*/", " ", line)
        line, inside = line.split("/*", 1)[0], "/*" in line
        yield line if line.lstrip().startswith(".pragma") else line.split("//", 1)[0]


def _statements(text: str, line_number: int):
    scopes, opened, location, current = [], 0, None, ""
    for line_number, line in enumerate(_without_comments(text.split("\n")), line_number):  # noqa: B020
        match = _LOCATION.match(line.strip())
        if match:
            location = tuple(int(part) for part in match.groups() if part is not None)
            continue
        for character in line:
            if character == "{" and not current.strip():
                opened += 1
                scopes.append(opened)
                current = ""
            elif character == "}" and not current.strip():
                scopes.pop()
                current = ""
                if not scopes:
                    return
            elif character == ";" or (character == ":" and re.fullmatch(r"\s*[$%\w]+", current)):
                statement = current.strip() + (":" if character == ":" else "")
                if statement:
                    yield Statement(statement, tuple(scopes), location, line_number)
                current = ""
            else:
                current += character
        current += " "
