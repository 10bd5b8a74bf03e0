"""What a multiprocessor of each target holds, and how many warps of a kernel run on it at a time.

Source: CUDA programming guide, "Technical specifications per compute capability" (shared memory of a block and of a
multiprocessor, resident warps and blocks; 64 K registers; registers are handed out in units of 256 to a warp; 1 KB of
shared memory of each block is the system's). CDNA3 ISA guide for gfx942: 512 vector registers a lane (accumulation
registers included), 8 waves a SIMD, 4 SIMDs and 64 KB of LDS a compute unit.
"""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Limits:
    """Of a target: bytes of shared memory of a program and of a multiprocessor; warps and programs it holds."""

    shared: int
    shared_total: int
    warps: int
    programs: int


LIMITS = {
    "80": Limits(163 * KB, 164 * KB, 64, 32),
    "86": Limits(99 * KB, 100 * KB, 48, 16),
    "89": Limits(99 * KB, 100 * KB, 48, 24),
    "90": Limits(227 * KB, 228 * KB, 64, 32),
    "100": Limits(227 * KB, 228 * KB, 64, 32),
    "120": Limits(99 * KB, 100 * KB, 48, 24),
    "gfx942": Limits(64 * KB, 64 * KB, 32, 16),
}


@dataclass(frozen=True)
class Occupancy:
    """Warps that a multiprocessor runs at a time, as each resource alone allows, and together."""

    by_registers: int
    by_shared: int
    by_warps: int
    program: int
    """Warps of a program."""

    @property
    def warps(self) -> int:
        """Together."""
        return min(self.by_registers, self.by_shared, self.by_warps)

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor runs at a time."""
        return self.warps // self.program


def occupancy(target: str, *, registers: int, shared: int, warps: int) -> Occupancy:
    """Of a kernel with `registers` a thread, `shared` bytes and `warps` warps a program."""
    limits = LIMITS[target]
    if target.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-max(registers, 8) // 8) * 8))
        by_shared = limits.shared_total // max(shared, 1)
    else:
        waves = 65536 // (-(-registers * 32 // 256) * 256)
        by_shared = limits.shared_total // (shared + KB)
    most = min(limits.programs, limits.warps // warps)
    return Occupancy(waves // warps * warps, min(by_shared, most) * warps, most * warps, warps)
