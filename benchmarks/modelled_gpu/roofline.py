"""A roofline from counted work: how long a launch takes at least, and as it is written, on a device.

Everything here is *modelled*. The floor is the longest of: compulsory bytes at the bandwidth of device memory, the
operations of the exact windows at the dense rate of the matrix units, their exponentials at the special-function rate,
each one operation.

The modelled time is of what the kernel really does (padded keys, further passes), in three phases:

- loads and stores: compulsory bytes at the bandwidth of device memory, or the bytes asked for at that of the L2 cache.
  What is asked for again hits the L2 cache: a tile's keys and values are a few hundred KB that its neighbours share;
- products, at the dense rate, or at that which products of one warp reach;
- the rest, by the machine code: instructions at the issue rate, and those of each unit of a multiprocessor at its own.

Where a multiprocessor has room for two programs or more, one's phases run beside another's, and the longest term is
the time. Where it has room for one, or the launch has no more, its phases run one after the other, and the time is
their sum; loads that are copied to shared memory ahead of their use run beside the others. Then comes the launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

LAUNCH_US = 3.0
"""Microseconds to start a kernel."""

HOST_US = 350.0
"""Microseconds of the host for a repeated eager call, whatever its size, by `python -m benchmarks.host` in bfloat16.

The machine adds up 5000 numbers in 130 microseconds, and takes 3800 where the call is made in full.
"""


@dataclass(frozen=True)
class Device:
    """Published figures of a device.

    Attributes:
        arch: compute capability without the dot.
        memory: bytes a second of device memory.
        tensor: dense operations a second of the matrix units with float32 accumulators: 16-bit operands.
        tensor_tf32: the same for tf32.
        sms: multiprocessors.
        clock: boost clock, Hz.
        lanes: float32 multiply-adds a cycle and multiprocessor outside of the matrix units.
        lanes_float64: the same of float64.
        l2: bytes a second read from the L2 cache, as somebody has measured them.
        by_warp: what share of the dense rate products of one warp reach.
        source: of all these.
    """

    name: str
    arch: int
    memory: float
    tensor: float
    tensor_tf32: float
    sms: int
    clock: float
    lanes: int
    lanes_float64: int
    l2: float
    source: str
    by_warp: float = 1.0

    @property
    def issue(self) -> float:
        """Warp instructions a second: four schedulers on each multiprocessor, one instruction a cycle each."""
        return 4 * self.sms * self.clock

    @property
    def plain(self) -> float:
        """Float32 operations a second outside of the matrix units."""
        return 2 * self.lanes * self.sms * self.clock

    def rate(self, unit: str) -> float:
        """Uses a second of a unit, as `machine_code.Code.uses` counts them: of a warp, 32 lanes each.

        Lanes a cycle and multiprocessor are the CUDA C++ programming guide's (throughput of native arithmetic
        instructions, compute capability 8.0 to 9.0): 16 of special functions, 32 of shuffles, 64 of comparisons,
        additions and logic of integers; 128 bytes a cycle from the L1 cache and shared memory.
        """
        if unit == "issue":
            return self.issue
        lanes = {"special": 16, "L1": 32, "integer": 64, "float32": self.lanes, "float64": self.lanes_float64}
        return lanes[unit] / 32 * self.sms * self.clock


_BENCHES = "gpu-l2-cache of te42kyfo/gpu-benches, stored results"

# Rates are dense. Each is also its operations a cycle and multiprocessor times multiprocessors times clock, which a
# test holds them to.
_H100 = Device(
    "H100 SXM", 90, 3.35e12, 989.4e12, 494.7e12, 132, 1.83e9, 128, 64, 6.9e12,
    "NVIDIA H100 datasheet (3.35 TB/s); NVIDIA H100 Tensor Core GPU Architecture (132 SMs; 989.4 and 494.7 TFLOPS "
    "without sparsity: 512 16-bit FMA a cycle and tensor core, 4 an SM, at 1830 MHz; 128 FP32 and 64 FP64 cores an SM; "
    f"up to 1980 MHz without tensor cores); L2: {_BENCHES}, H100 PCIe, 12 to 33 MB, a card of 114 SMs and less power: "
    "this one's is no less; products of one warp: arXiv 2402.13499 (mma on Hopper: 62.9 % of the peak on average)",
    by_warp=0.629,
)  # fmt: skip

DEVICES = (
    Device(
        "A100 SXM 80GB", 80, 2039e9, 312e12, 156e12, 108, 1.41e9, 64, 32, 5.4e12,
        "NVIDIA A100 80GB datasheet (2,039 GB/s; 312 and 156 TFLOPS); NVIDIA A100 Tensor Core GPU Architecture (108 "
        "SMs, 1410 MHz; 256 16-bit FMA a cycle and tensor core, 4 an SM; 64 FP32 and 32 FP64 cores an SM; L2 "
        f"5120 bytes a clock, 7.2 TB/s, which is more than was measured); L2: {_BENCHES}, A100 80 GB, 2 to 26 MB",
    ),
    _H100,
    replace(
        _H100, name="H200", memory=4.8e12, l2=9.7e12,
        source="NVIDIA H200 datasheet (4.8 TB/s; arithmetic as the H100 SXM, 132 SMs); "
        f"L2: {_BENCHES}, H200, 12 to 40 MB; the rest as of the H100",
    ),
    Device(
        "RTX 4090", 89, 1008e9, 165.2e12, 82.6e12, 128, 2.52e9, 128, 2, 4.7e12,
        "NVIDIA Ada GPU Architecture, appendix on the RTX 4090 (128 SMs of 128 FP32 cores and 2 FP64 cores, boost 2520 "
        "MHz, 1008 GB/s, 165.2 TFLOPS of 16 bits with FP32 accumulate, 82.6 of tf32); "
        f"L2: {_BENCHES}, L40 (5.2 TB/s, 142 SMs of the same chip at 2490 MHz), by SMs and clock",
    ),
    Device(
        "RTX 3060 Laptop", 86, 336e9, 512 * 30 * 1.425e9, 256 * 30 * 1.425e9, 30, 1.425e9, 128, 2, 0.63e12,
        "NVIDIA's comparison of GeForce laptop GPUs (3840 cores: 30 SMs, boost 1283 to 1703 MHz by power; 192 bits of "
        "GDDR6, 14 Gbit/s as tables of the card have it; 1425 MHz is its clock at 80 W); NVIDIA Ampere GA102 GPU "
        "Architecture (128 FP32 and 2 FP64 cores an SM, 512 16-bit operations with FP32 accumulate and 256 of tf32 "
        "a cycle and SM); L2: nobody's measurement was found: as the L40's by SMs and clock",
    ),
)  # fmt: skip


def device_of(arch: str | int) -> Device | None:
    """The device that stands for a compute capability."""
    return next((device for device in DEVICES if str(device.arch) == str(arch)), None)


@dataclass(frozen=True)
class Times:
    """Microseconds by term: the longest binds, or the sum of the longest of each of `phases`, if that is longer."""

    terms: dict[str, float]
    launch: float = 0.0
    phases: tuple[tuple[str, ...], ...] = ()

    @property
    def total(self) -> float:
        """Microseconds."""
        after = sum(max(self.terms[name] for name in phase) for phase in self.phases)
        return max(after, *self.terms.values()) + self.launch

    @property
    def binding(self) -> str:
        """The longest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def floor(
    device: Device, units: int, *, bytes_compulsory: float, operations: float, exponentials: float, half: bool
) -> Times:
    """The floor of an operation, its work given for one unit: a pixel, or a position of the grid."""
    return Times(
        {
            "memory": 1e6 * units * bytes_compulsory / device.memory,
            "tensor": 1e6 * units * operations / (device.tensor if half else device.tensor_tf32),
            "special": 1e6 * units * exponentials / 32 / device.rate("special"),
        }
    )


@dataclass(frozen=True)
class Execution:
    """How a launch runs on a multiprocessor.

    Attributes:
        uses: for each unit of work, of each unit of a multiprocessor, as `machine_code.Code.uses` counts them; None
            where the code is not known.
        ahead: whether most of its loads are copied to shared memory ahead of their use.
        by_warp: whether products are of one warp.
        together: programs that a multiprocessor has room for.
        programs: of the launch.
    """

    uses: Mapping[str, float] | None
    ahead: bool
    by_warp: bool
    together: int
    programs: int


def modelled(
    device: Device,
    units: int,
    execution: Execution,
    *,
    bytes_compulsory: float,
    bytes_asked: float,
    operations: float,
    exponentials: float,
    half: bool,
) -> Times:
    """The time of a kernel by what it really does, its work given for one unit.

    `operations` are those of the matrix units; of factors of float32 those of tf32, of which three make a product, or
    what takes as long. The multiprocessor with the most programs is waited for. Without code each exponential counts as
    two special functions.
    """
    rate = (device.tensor if half else device.tensor_tf32) * (device.by_warp if execution.by_warp else 1.0)
    uses = {"special": 2 * exponentials / 32} if execution.uses is None else execution.uses
    most = -(-execution.programs // device.sms)
    waited = most * device.sms / execution.programs
    terms = {
        "memory": 1e6 * units * bytes_compulsory / device.memory,
        "L2": 1e6 * units * bytes_asked / device.l2,
        "tensor": 1e6 * units * waited * operations / rate,
        **{unit: 1e6 * units * waited * count / device.rate(unit) for unit, count in uses.items()},
    }
    phases = (("memory", "L2"), ("tensor",), tuple(uses))[1 if execution.ahead else 0 :]
    return Times(terms, LAUNCH_US, phases if min(most, execution.together) < 2 else ())
