"""What the compiler made of a kernel: registers, spills, instructions, and how often each runs.

The control flow is read from the disassembly. Instructions in a loop run as often as the loop turns, those that a
branch skips as often as they are said to be run, everything else once. Left out is what a healthy launch never runs:
the way around a diverged warp (`BRA.DIV`) and the slow path of a division by a subnormal number (only reached by a
call).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

_TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")

# Units of a multiprocessor beside its schedulers and matrix units, and the instructions that they execute. The lanes
# of each in a cycle are the device's (`benchmarks.modelled_gpu.roofline`).
_UNITS = {
    "special": re.compile(r"MUFU"),
    "float64": re.compile(r"D(ADD|FMA|MUL|SETP|MNMX)|F2F\S*F64|I2F\S*F64"),
    "float32": re.compile(r"FADD|FFMA|FMUL|IMAD|H(ADD|FMA|MUL)2"),
    "integer": re.compile(r"V?I(ADD|MNMX)|LOP3|SEL|FSEL|[IF]SETP|FMNMX|SHF\.|PRMT|LEA|PLOP3|F2FP|I2FP|P2R|R2P|MOV"),
    "L1": re.compile(r"SHFL|LD[SG](?!DEP)|ST[SG]|LD\.|ST\.|LDL|STL|ATOM|RED"),
}
_NVIDIA_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*\.?(L_x_\d+|LBB\d+_\d+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name with suffixes, its operands, whether a predicate guards it."""

    name: str
    operands: str = ""
    guarded: bool = False


@dataclass
class Block:
    """Instructions that run together, and the numbers of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    follow: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A loop: the blocks in it, the first being its head, and the loops directly inside."""

    head: int
    blocks: frozenset[int]
    inside: tuple[Loop, ...] = ()


class Branch(NamedTuple):
    """Beside the trip counts of loops: instructions that are run or skipped; how often, and what is inside."""

    share: float
    inside: Sequence[Any] = ()


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: of a thread.
        spill_bytes: of a thread's stack and local memory.
        spill_instructions: loads and stores of local memory.
        shared_bytes: of a program.
        tensor_memory: columns of sm_100's tensor memory; beyond 512 Triton refuses to launch and makes no code.
        warps: of a program.
        blocks: the control flow; the first is the entry.
    """

    registers: int
    spill_bytes: int
    spill_instructions: int
    shared_bytes: int
    tensor_memory: int
    warps: int
    blocks: tuple[Block, ...]

    @cached_property
    def reached(self) -> frozenset[int]:
        """Blocks that a healthy launch may run."""
        seen, waiting = {0}, [0]
        while waiting:
            for after in self.blocks[waiting.pop()].follow:
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return frozenset(seen)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops in order; one that only waits, for a barrier or tensor memory, counts as none."""
        return _nested([loop for loop in _loops(self.blocks, self.reached) if not self._waits(loop)])

    def _waits(self, loop: Loop) -> bool:
        names = [i.name for b in loop.blocks for i in self.blocks[b].instructions]
        return len(names) < 12 and any(name.startswith(("SYNCS", "NANOSLEEP")) for name in names)

    @cached_property
    def scopes(self) -> tuple[Loop, ...]:
        """The loops, and beside and in them what a branch skips: many instructions without a loop."""
        loops = [loop for loop in _loops(self.blocks, self.reached) if not self._waits(loop)]
        return _nested([*loops, *_skipped(self.blocks, self.reached, loops)])

    def weights(self, turns: Sequence[Any]) -> list[float]:
        """How often each block runs.

        `turns`: in order the loops' trip counts, (turns, [of the scopes inside]) each, and each `Branch`. Where the
        code has other branches than that, all of them count as taken. Raises ValueError where it has other loops.
        """
        weights = [1.0 if n in self.reached else 0.0 for n in range(len(self.blocks))]

        def enter(scopes: Sequence[Loop], turns: Sequence[Any], outer: float) -> None:
            for scope, (count, inside) in zip(scopes, turns, strict=True):
                for block in scope.blocks:
                    weights[block] = outer * count
                enter(scope.inside, inside, outer * count)

        if _shape_of(turns) == _shape(self.scopes):
            enter(self.scopes, turns, 1.0)
        elif _shape_of(loops := _without_branches(turns)) == _shape(self.loops):
            enter(self.loops, loops, 1.0)
        else:
            raise ValueError(f"the code has loops {_shape(self.loops)}, expected {turns}")
        return weights

    def count(self, pattern: str) -> int:
        """Instructions in the code whose name a pattern matches, run or not."""
        return sum(bool(re.match(pattern, i.name)) for block in self.blocks for i in block.instructions)

    def executed(self, turns: Sequence[Any]) -> Counter[str]:
        """How often a warp executes each kind of instruction (its name up to the first dot)."""
        counts: Counter[str] = Counter()
        for weight, block in zip(self.weights(turns), self.blocks, strict=True):
            for instruction in block.instructions:
                counts[instruction.name.split(".")[0]] += weight  # type: ignore[assignment]
        return counts

    def uses(self, turns: Sequence[Any]) -> dict[str, float]:
        """How often a warp uses each unit, "issue" being all its instructions.

        One use is of 32 lanes of 4 bytes: a shuffle is one of the path to the L1 cache and shared memory, a load of 16
        bytes a thread is four. What bank conflicts add is not seen.
        """
        counts = dict.fromkeys(("issue", *_UNITS), 0.0)
        for weight, block in zip(self.weights(turns), self.blocks, strict=True):
            for instruction in block.instructions:
                counts["issue"] += weight
                for unit, names in _UNITS.items():
                    if names.match(instruction.name):
                        counts[unit] += weight * (_words(instruction.name) if unit == "L1" else 1)
        return counts

    def loads_ahead(self, turns: Sequence[Any]) -> bool:
        """Whether most of what is loaded is copied to shared memory while the program works on something else."""
        ahead = others = 0.0
        for weight, block in zip(self.weights(turns), self.blocks, strict=True):
            for instruction in block.instructions:
                if re.match(r"UTMALDG|UBLKCP", instruction.name):
                    return True
                if re.match(r"LDGSTS|LDG\.", instruction.name):
                    words = weight * _words(instruction.name)
                    ahead, others = (ahead + words, others) if "STS" in instruction.name else (ahead, others + words)
        return ahead > others

    @property
    def products_by_warp(self) -> bool:
        """Whether products are a warp's own (HMMA), not four warps' together from shared memory (HGMMA)."""
        return self.count("HMMA") > self.count("HGMMA")

    @property
    def tensor_instructions(self) -> int:
        """Instructions of the matrix units."""
        return self.count(_TENSOR.pattern)

    def widest(self, kind: str) -> int:
        """Bits of a thread's widest access of global memory; `kind`: "load", "store" or "copy" (to shared memory)."""
        return max((_bits(i.name, kind) for block in self.blocks for i in block.instructions), default=0)


def read(compiled: Any, warps: int) -> Code:
    """The code of Triton's `CompiledKernel`."""
    asm = compiled.asm
    if "cubin" in asm:
        usage, text = _disassemble(asm["cubin"])
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert match is not None, usage
        blocks = nvidia_blocks(text)
        registers, spilled = int(match[1]), int(match[2]) + int(match[3])
        local = r"LDL|STL"
    else:
        text = asm["amdgcn"]
        blocks = amd_blocks(text)
        registers = _amd_number(text, "vgpr_count")
        spilled = _amd_number(text, "private_segment_fixed_size") + 4 * _amd_number(text, "vgpr_spill_count")
        local = "scratch_"
    spills = sum(bool(re.match(local, i.name)) for block in blocks for i in block.instructions)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Code(registers, spilled, spills, compiled.metadata.shared, columns, warps, tuple(blocks))


def nvidia_blocks(text: str) -> list[Block]:
    """The control flow of `nvdisasm -c`'s output."""
    labels: dict[str, int] = {}
    blocks = [Block()]
    jumps: list[tuple[int, str]] = []
    open_end = True
    for line in text.splitlines():
        if label := _LABEL.match(line):
            open_end = _begin(blocks, open_end)
            labels[label[1]] = len(blocks) - 1
            continue
        if not (match := _NVIDIA_LINE.search(line)):
            continue
        _, guard, name, operands = match.groups()
        if not open_end:
            open_end = _begin(blocks, open_end)
        blocks[-1].instructions.append(Instruction(name, operands, guard is not None))
        # A call of a place within the kernel never returns: the compiler means a jump.
        if name.startswith("BRA") or (name.startswith("CALL") and ".L_x_" in operands):
            conditional = guard is not None or re.match(r"\s*!?U?P\d", operands) is not None or ".DIV" in name
            if ".DIV" not in name:
                jumps.append((len(blocks) - 1, re.findall(r"L_x_\d+", operands)[-1]))
            blocks.append(Block())
            if conditional:
                blocks[-2].follow.append(len(blocks) - 1)
            open_end = True
        elif name.startswith(("EXIT", "RET")) and guard is None:
            open_end = False
    return _joined(blocks, jumps, labels)


def amd_blocks(text: str) -> list[Block]:
    """The control flow of AMD's assembly text."""
    labels: dict[str, int] = {}
    blocks = [Block()]
    jumps: list[tuple[int, str]] = []
    open_end = True
    for line in text.splitlines():
        if label := _LABEL.match(line):
            open_end = _begin(blocks, open_end)
            labels[label[1]] = len(blocks) - 1
            continue
        match = re.match(r"\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+|flat_\w+)\s*(.*)", line)
        if match is None:
            continue
        if not open_end:
            open_end = _begin(blocks, open_end)
        name, operands = match.groups()
        blocks[-1].instructions.append(Instruction(name, operands))
        if name.startswith(("s_cbranch", "s_branch")):
            jumps.append((len(blocks) - 1, re.findall(r"LBB\d+_\d+", operands)[-1]))
            blocks.append(Block())
            if name.startswith("s_cbranch"):
                blocks[-2].follow.append(len(blocks) - 1)
        elif name.startswith("s_endpgm"):
            open_end = False
    return _joined(blocks, jumps, labels)


def _begin(blocks: list[Block], falls_through: bool) -> bool:
    """Start a block, which the last one may run into."""
    if falls_through:
        if not blocks[-1].instructions and not any(len(blocks) - 1 in b.follow for b in blocks):
            return True
        blocks[-1].follow.append(len(blocks))
    blocks.append(Block())
    return True


def _joined(blocks: list[Block], jumps: list[tuple[int, str]], labels: dict[str, int]) -> list[Block]:
    for block, label in jumps:
        blocks[block].follow.append(labels[label])
    for block in blocks:
        block.follow = [n for n in block.follow if n < len(blocks)]
    return blocks


def _loops(blocks: Sequence[Block], reached: frozenset[int]) -> list[Loop]:
    """The natural loops: an edge back to a block that all ways to the edge pass, and what leads to the edge from there.

    The order of the blocks in memory says nothing: a loop's head may stand behind its end.
    """
    before: dict[int, set[int]] = {n: set() for n in reached}
    for n in reached:
        for after in blocks[n].follow:
            before[after].add(n)
    dominators = _dominators(before)
    bodies: dict[int, set[int]] = {}
    for n in sorted(reached):
        for head in blocks[n].follow:
            if head not in dominators[n]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [n]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(before[block])
    return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]


def _dominators(before: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block, those that every way from the entry to it passes, itself included."""
    dominators = {n: set(before) for n in before}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for n in sorted(before):
            if n == 0:
                continue
            found = {n} | set.intersection(*(dominators[m] for m in before[n]))
            if found != dominators[n]:
                dominators[n] = found
                changed = True
    return dominators


def _nested(loops: Sequence[Loop]) -> tuple[Loop, ...]:
    outer = [a for a in loops if not any(a.blocks < b.blocks for b in loops)]
    return tuple(
        Loop(a.head, a.blocks, _nested([b for b in loops if b.blocks < a.blocks]))
        for a in sorted(outer, key=lambda loop: loop.head)
    )


# Fewer instructions than this are skipped for the compiler's own reasons.
_LEAST_SKIPPED = 12


def _skipped(blocks: Sequence[Block], reached: frozenset[int], loops: Sequence[Loop]) -> list[Loop]:
    """What a branch skips: the blocks that lead from one of its ways to the other, and are not entered from elsewhere.

    Loops are left alone: what skips a loop of no turns is none.
    """
    before: dict[int, set[int]] = {n: set() for n in reached}
    for n in reached:
        for after in blocks[n].follow:
            before[after].add(n)
    homes = {n: min((loop for loop in loops if n in loop.blocks), key=lambda o: len(o.blocks), default=None)
             for n in reached}  # fmt: skip
    found = []
    for n in sorted(reached):
        if len(ways := set(blocks[n].follow)) != 2:
            continue
        for entry in ways:
            (end,) = ways - {entry}
            region, waiting = set(), [entry]
            while waiting:
                block = waiting.pop()
                if block != end and block not in region:
                    region.add(block)
                    waiting.extend(blocks[block].follow)
            closed = all(before[block] <= (region if block != entry else {n}) for block in region)
            leaves = any(not blocks[block].follow for block in region)
            same = all(homes[block] is homes[n] for block in region)
            size = sum(len(blocks[block].instructions) for block in region)
            if closed and same and not leaves and size >= _LEAST_SKIPPED:
                found.append(Loop(entry, frozenset(region)))
    return found


def _shape(loops: Sequence[Loop]) -> list[Any]:
    return [_shape(loop.inside) for loop in loops]


def _shape_of(turns: Sequence[Any]) -> list[Any]:
    return [_shape_of(inside) for _, inside in turns]


def _without_branches(turns: Sequence[Any]) -> list[Any]:
    """The loops alone; there are none in a branch."""
    return [(count, _without_branches(inside)) for count, inside in (t for t in turns if not isinstance(t, Branch))]


def _bits(name: str, kind: str) -> int:
    nvidia = {"load": r"LDG\.", "store": r"STG\.", "copy": r"LDGSTS\."}[kind]
    if re.match(nvidia, name):
        match = re.search(r"\.(128|64|U16|S16|U8|S8)\b", name)
        return int(match[1].lstrip("US")) if match else 32
    amd = {"load": r"(?:global|buffer)_load", "store": r"(?:global|buffer)_store", "copy": r"$^"}[kind]
    if re.match(amd, name):
        match = re.search(r"dwordx(\d)", name)
        return 32 * int(match[1]) if match else 32 if "dword" in name else 16
    return 0


def _words(name: str) -> int:
    """Words of 4 bytes of a thread that an instruction moves, at least one; of LDSM and STSM their matrices."""
    if name.startswith(("LDSM", "STSM")):
        return int(name[-1]) if name[-2:] in (".2", ".4") else 1
    match = re.search(r"\.(64|128)\b", name)
    return int(match[1]) // 32 if match else 1


def _amd_number(text: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", text)
    assert match is not None, name
    return int(match[1])


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """`cuobjdump -res-usage` and `nvdisasm -c` of a cubin, by the tools that Triton ships."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = ([tools / "cuobjdump", "-res-usage", file], [tools / "nvdisasm", "-c", file])
        usage, text = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, text
