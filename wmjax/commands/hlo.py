"""Costs of a compiled step: collectives and memory traffic of its HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "s4": 4,
    "u4": 4,
}  # other names contain their bits: f32, s64, f8e4m3
# Instructions without memory traffic of their own: they name results, or run other computations.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "broadcast"),
    *("async-update", "opt-barrier"),
}
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    "ragged-all-to-all",
)

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
# On TPUs a collective that overlaps with products is named in each of their fusions. Only the first
# one has flag_start -1.
_GOES_ON = re.compile(r'"flag_start":"\d')
_CALLED = re.compile(r"(?:calls|body|condition|branch_computations)=\{?([^,}]+(?:, %[^,}]+)*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    kind: str
    rest: str  # operands and attributes

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split("),")[0])


@dataclasses.dataclass
class Collective:
    """Totals of one kind of collective in a step. sent: bytes that a chip sends, in a ring."""

    count: int = 0
    sent: float = 0.0


class Program:
    """A compiled program, parsed from the text of its HLO; a loop counts as often as it runs."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        instructions: list[Instruction] = []
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                instructions.append(Instruction(*found.groups()[1:]))
            elif found := _COMPUTATION.match(line):
                instructions = self.computations.setdefault(found[2], [])
                if found[1]:
                    self.entry = found[2]

    def collectives(self) -> dict[str, Collective]:
        """Return the collectives of a step, by kind; groups of one chip do not count."""
        result: dict[str, Collective] = {}
        for times, where, instruction in self._run(self.entry, 1, into_fusions=True):
            kind = instruction.kind.removesuffix("-start")
            if kind not in COLLECTIVES or _GOES_ON.search(instruction.rest):
                continue
            sent = _sent(kind, instruction)
            if where.startswith(
                "all-reduce-scatter"
            ):  # a fusion that keeps only its part of the sum
                kind, sent = "reduce-scatter", sent / 2
            if sent == 0:
                continue
            total = result.setdefault(kind, Collective())
            total.count += times
            total.sent += times * sent
        return result

    def traffic(self) -> int:
        """Return a lower bound of the memory traffic of a chip in bytes.

        Every result is counted as written once and read once.
        """
        return sum(
            2 * times * self._written(instruction)
            for times, _, instruction in self._run(self.entry, 1, into_fusions=False)
            if not (instruction.kind in FREE or instruction.kind.endswith("-start"))
        )

    def _run(
        self, computation: str, times: int, into_fusions: bool
    ) -> Iterator[tuple[int, str, Instruction]]:
        """Yield (times a step runs it, name of its computation, instruction)."""
        for instruction in self.computations[computation]:
            yield times, computation, instruction
            kind = instruction.kind
            if kind in ("while", "conditional", "call") or (
                into_fusions and kind in ("fusion", "async-start")
            ):
                count = self._turns(instruction) if kind == "while" else 1
                for names in _CALLED.findall(instruction.rest):
                    for name in re.findall(r"[\w.-]+", names):
                        yield from self._run(name, times * count, into_fusions)

    def _turns(self, loop: Instruction) -> int:
        """Return the trip count of a loop.

        TPU programs do not state it. There it is the constant in the condition `i < 24` of a scan.
        """
        if known := re.search(r"known_trip_count\D+(\d+)", loop.rest):
            return int(known[1])
        name = re.search(r"condition=%?([\w.-]+)", loop.rest)
        inside = self.computations[name[1]] if name else []
        numbers = (re.match(r"\d+", each.rest) for each in inside if each.kind == "constant")
        return max((int(number[0]) for number in numbers if number), default=1)

    def _written(self, instruction: Instruction) -> int:
        """Return the bytes of a result in main memory; of an in-place update, its own bytes."""
        if instruction.kind == "fusion":
            name = re.search(r"calls=%?([\w.-]+)", instruction.rest)
            inner = self.computations[name[1]] if name else []
            if inner and inner[-1].kind == "dynamic-update-slice":
                types = {other.name: other.type for other in inner}
                return sum(map(_bytes, _arrays(types.get(inner[-1].operands()[1], ""))))
        elif instruction.kind == "dynamic-update-slice":
            return 0  # counted at the instruction that computes the update
        return sum(map(_bytes, _arrays(instruction.type)))


def _arrays(type: str) -> list[tuple[str, str, str]]:
    """Return (dtype, sizes, layout) of each array in a type."""
    return _ARRAY.findall(type)


def _bytes(array: tuple[str, str, str]) -> int:
    dtype, sizes, layout = array
    if re.search(r"S\([1-9]", layout):  # in on-chip memory
        return 0
    return _size(dtype, sizes)


def _size(dtype: str, sizes: str) -> int:
    width = re.search(r"\d+", dtype)
    bits = BITS.get(dtype, int(width[0]) if width else 0)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _sent(kind: str, instruction: Instruction) -> float:
    """Return the bytes that one member of the group sends in a ring."""
    members = _members(instruction.rest)
    arrays = [_size(dtype, sizes) for dtype, sizes, _ in _arrays(instruction.type)]
    if kind == "collective-permute":
        return float(max(arrays))
    total = sum(arrays)
    if (
        instruction.kind == "all-gather-start"
    ):  # its type has the operands too, 1/members of the result
        total = total * members // (members + 1)
    share = (members - 1) / members
    return total * {"all-reduce": 2 * share, "reduce-scatter": members - 1}.get(kind, share)


def _members(rest: str) -> int:
    """Return the number of members of a replica group, in any of XLA's three notations.

    replica_groups={{0,1},{2,3}}, =[2,2]<=[4], or =mesh['x'=2,'y'=2] {'y'}. The last may give an
    order of devices before the braces; 'y':(1)2 is a part of an axis.
    """
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        named = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return found[1].count(",") + 1 if found else 1
