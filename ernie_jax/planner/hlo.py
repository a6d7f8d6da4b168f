"""Read the collectives of a compiled program from its HLO text, as `compiled.as_text()` gives it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0}  # the other types end in their width: bf16, s4, f8e4m3fn
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describe the collectives of one kind, size and group that one run of a program executes.

    Attributes:
      kind: a name of KINDS.
      bytes: of one device's data in one execution: what it brings; for an all-gather what it ends up with. A ragged
        exchange counts the whole buffer that is sent from, the most that can leave.
      count: executions in one run; those in a loop times its length.
      group_size: devices that take part together; 2 for a collective-permute.
      open_loop: it stands in a loop whose length the text does not tell: `count` is of one turn.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    open_loop: bool = False

    @property
    def link_bytes(self) -> float:
        """Bytes that a device sends in all `count` executions, on a ring of the group."""
        return self.count * self.bytes * sent_fraction(self.kind, self.group_size)


def sent_fraction(kind: str, group_size: int) -> float:
    """Return the bytes that a device sends per byte of its data, as `Collective.bytes` counts them, on a ring.

    An all-reduce is a reduce-scatter and an all-gather. An all-to-all sends each other device its part, once, whatever
    the way there.
    """
    share = (group_size - 1) / group_size
    return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def collectives(text: str) -> list[Collective]:
    """List the collectives of a compiled program, equal ones added up, largest total first.

    A start and its done are one; of a conditional's branches the one that moves the most counts; XLA:TPU's fused
    `all-reduce-scatter` is a reduce-scatter. The length of a loop is what the compiler noted, or else read from a
    condition "counter < constant".

    Raises:
      ValueError: if the text is no HLO module with an entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("no ENTRY computation: give the text of a compiled program")
    return merge(_walk(computations, entry))


def merge(items: Iterable[Collective]) -> list[Collective]:
    """Add up collectives that differ in their count only; largest total first."""
    counts: dict[Collective, int] = {}
    for item in items:
        alone = dataclasses.replace(item, count=1)
        counts[alone] = counts.get(alone, 0) + item.count
    merged = [dataclasses.replace(item, count=count) for item, count in counts.items()]
    return sorted(merged, key=lambda item: -item.bytes * item.count)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # from the operands' opening parenthesis to the end of the line


_Computation = dict[str, _Instruction]


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    entry = None
    for line in text.splitlines():
        line = line.strip()
        if match := _HEADER.match(line):
            current = computations[match[2]] = {}
            if match[1]:
                entry = match[2]
        elif match := _INSTRUCTION.match(line):
            rest = line[match.end() - 1 :]
            opcode = _OPCODE.search(rest)
            if opcode:
                arguments, attributes = _split_arguments(rest[opcode.end() - 1 :])
                names = tuple(_NAME.findall(arguments)) or (arguments,)  # a constant's value, a parameter's number
                result = rest[: opcode.start()].strip()
                current[match[2]] = _Instruction(match[2], bool(match[1]), result, opcode[1], names, attributes)
    return computations, entry


def _split_arguments(text: str) -> tuple[str, str]:
    """Split "(arguments), attributes" after the parenthesis that closes the first."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:index], text[index + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _walk(computations: dict[str, _Computation], name: str) -> list[Collective]:
    found: list[Collective] = []
    for instruction in computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            found.append(_collective(kind, instruction, computations[name], name))
        elif instruction.opcode == "while":
            body = _named(instruction, "body")
            inside = _walk(computations, body) + _walk(computations, _named(instruction, "condition"))
            if inside:
                turns = _trip_count(computations, computations[name], instruction)
                if turns is None:
                    found += [dataclasses.replace(c, open_loop=True) for c in inside]
                elif turns:
                    found += [dataclasses.replace(c, count=c.count * turns) for c in inside]
        elif not instruction.opcode.endswith(("-done", "-update")):
            branches = [
                _walk(computations, called)
                for group in _CALLED.findall(instruction.attributes)
                for called in _NAME.findall(group)
            ]
            if instruction.opcode == "conditional":
                branches = [max(branches, key=lambda branch: sum(c.link_bytes for c in branch))]
            for branch in branches:
                found += branch
    return found


def _collective(kind: str, instruction: _Instruction, computation: _Computation, name: str) -> Collective:
    sizes = [_type_bytes(computation[operand].type) for operand in instruction.operands]
    if kind == "collective-permute":  # further operands are where to put it
        return Collective(kind, sizes[0], 1, 2)
    group = _group_size(instruction.attributes)
    if kind == "ragged-all-to-all":  # further operands are where to put it, offsets and sizes
        return Collective(kind, sizes[0], 1, group)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, sum(sizes) * (group if kind == "all-gather" else 1), 1, group)


def _group_size(attributes: str) -> int:
    """Return the devices of a replica group: {{0,1},{2,3}}, [2,4]<=[8], or mesh['a'=2,'b'=4] {'b','a':(1)2}."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"cannot read the replica groups in {attributes[:120]!r}")


def _type_bytes(kind: str) -> int:
    """Return the bytes of an array or tuple type; layouts are ignored."""
    return sum(
        -(-_bits(dtype) * math.prod(int(size) for size in sizes.replace("<=", "").split(",") if size) // 8)
        for dtype, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", kind)
    )


def _bits(dtype: str) -> int:
    return _BITS[dtype] if dtype in _BITS else int(re.match(r"[a-z]+(\d+)", dtype)[1])


def _named(instruction: _Instruction, attribute: str) -> str:
    return re.search(rf"\b{attribute}=%([\w.\-]+)", instruction.attributes)[1]


def _trip_count(computations: dict[str, _Computation], outer: _Computation, loop: _Instruction) -> int | None:
    """Return how often a loop turns, None if its text does not tell."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(match[1])
    condition, body = (computations[_named(loop, name)] for name in ("condition", "body"))
    test, result = _root(condition), _root(body)
    start = outer.get(loop.operands[0])
    if test.opcode != "compare" or "direction=LT" not in test.attributes or not start or start.opcode != "tuple":
        return None
    counter, limit = (_element(condition, name) for name in test.operands)
    end = _constant(condition, test.operands[1])
    if end is None and limit is not None:  # the limit may be a tuple element that the loop does not change
        unchanged = result.opcode == "tuple" and _element(body, result.operands[limit]) == limit
        end = _constant(outer, start.operands[limit]) if unchanged else None
    if counter is None or end is None or result.opcode != "tuple":
        return None
    begin, step = _constant(outer, start.operands[counter]), _increment(body, result.operands[counter], counter)
    return None if begin is None or not step else max(0, -(-(end - begin) // step))


def _root(computation: _Computation) -> _Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _follow(computation: _Computation, name: str) -> _Instruction | None:
    """Return the instruction that a chain of copies starts from."""
    instruction = computation.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _element(computation: _Computation, name: str) -> int | None:
    """Return which element of the loop's tuple an instruction is."""
    instruction = _follow(computation, name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _constant(computation: _Computation, name: str) -> int | None:
    instruction = _follow(computation, name)
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operands[0]):
        return None
    return int(instruction.operands[0])


def _increment(body: _Computation, name: str, counter: int) -> int | None:
    """Return the constant that a turn adds to the counter."""
    add = _follow(body, name)
    if add is None or add.opcode != "add":
        return None
    left, right = add.operands
    if _element(body, right) == counter:
        left, right = right, left
    return _constant(body, right) if _element(body, left) == counter else None
