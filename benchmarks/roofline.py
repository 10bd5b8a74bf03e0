"""A roofline from counted work: how long a launch takes at least, and as it is written, on a device.

Everything here is *modelled*. The floor is the longest of: compulsory bytes at the bandwidth of device memory, the
operations of the exact windows at the dense rate of the matrix units, their exponentials at the special-function
rate. The modelled time is the longest of the same terms for what the kernel really does (padded keys, further passes),
of its instructions at the issue rate, and of the bytes it asks for at the bandwidth of the L2 cache where that is
published, plus the launch. Bytes asked for again hit the L2 cache: a tile's keys and values are a few hundred KB
that its neighbours share. Against device memory stand the compulsory bytes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH_US = 3.0
"""Microseconds to start a kernel."""


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
        l2: bytes a second read from the L2 cache; None where nothing is published.
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
    l2: float | None
    source: str

    @property
    def issue(self) -> float:
        """Warp instructions a second: four schedulers on each multiprocessor, one instruction a cycle each."""
        return 4 * self.sms * self.clock

    @property
    def plain(self) -> float:
        """Float32 operations a second outside of the matrix units."""
        return 2 * self.lanes * self.sms * self.clock

    @property
    def special(self) -> float:
        """Exponentials a second: 16 a cycle and multiprocessor (CUDA C++ programming guide, throughput of native
        arithmetic instructions, base 2 exponential, the same for compute capability 8.0 to 9.0)."""
        return 16 * self.sms * self.clock


# Rates are dense. Each is also its operations a cycle and multiprocessor times multiprocessors times clock, which a
# test holds them to.
DEVICES = (
    Device(
        "A100 SXM 80GB", 80, 2039e9, 312e12, 156e12, 108, 1.41e9, 64, 5120 * 1.41e9,
        "NVIDIA A100 80GB datasheet (2,039 GB/s; 312 and 156 TFLOPS); NVIDIA A100 Tensor Core GPU Architecture (108 "
        "SMs, 1410 MHz; 256 16-bit FMA a cycle and tensor core, 4 an SM; 64 FP32 cores an SM; L2 read "
        "bandwidth 5120 bytes a clock, taken "
        "at 1410 MHz: it does not say of which clock)",
    ),
    Device(
        "H100 SXM", 90, 3.35e12, 989.4e12, 494.7e12, 132, 1.83e9, 128, None,
        "NVIDIA H100 datasheet (3.35 TB/s); NVIDIA H100 Tensor Core GPU Architecture (132 SMs; 989.4 and 494.7 TFLOPS "
        "without sparsity: 512 16-bit FMA a cycle and tensor core, 4 an SM, at 1830 MHz; 128 FP32 cores "
        "an SM; up to 1980 MHz without tensor "
        "cores; no figure for L2)",
    ),
    Device(
        "RTX 4090", 89, 1008e9, 165.2e12, 82.6e12, 128, 2.52e9, 128, None,
        "NVIDIA Ada GPU Architecture, appendix on the RTX 4090 (128 SMs of 128 FP32 cores, boost 2520 "
        "MHz, 1008 GB/s, 165.2 TFLOPS of 16 "
        "bits with FP32 accumulate, 82.6 of tf32; no figure for L2)",
    ),
    Device(
        "RTX 3060 Laptop", 86, 336e9, 512 * 30 * 1.425e9, 256 * 30 * 1.425e9, 30, 1.425e9, 128, None,
        "NVIDIA's comparison of GeForce laptop GPUs (3840 cores: 30 SMs, boost 1283 to 1703 MHz by power; 192 bits of "
        "GDDR6, 14 Gbit/s as tables of the card have it; 1425 MHz is its clock at 80 W); NVIDIA Ampere GA102 GPU "
        "Architecture (128 FP32 cores an SM, 512 16-bit operations with FP32 accumulate and 256 of tf32 "
        "a cycle and SM; no figure for L2)",
    ),
)  # fmt: skip


def device_of(arch: str | int) -> Device | None:
    """The device that stands for a compute capability."""
    return next((device for device in DEVICES if str(device.arch) == str(arch)), None)


@dataclass(frozen=True)
class Times:
    """Microseconds by term; the longest binds."""

    terms: dict[str, float]
    launch: float = 0.0

    @property
    def total(self) -> float:
        """Microseconds."""
        return max(self.terms.values()) + self.launch

    @property
    def binding(self) -> str:
        """The longest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def floor(
    device: Device, pixels: int, *, bytes_compulsory: float, operations: float, exponentials: float, half: bool
) -> Times:
    """The floor of an operation, its work given for one pixel."""
    return Times(
        {
            "memory": 1e6 * pixels * bytes_compulsory / device.memory,
            "tensor": 1e6 * pixels * operations / (device.tensor if half else device.tensor_tf32),
            "exponential": 1e6 * pixels * exponentials / device.special,
        }
    )


def modelled(
    device: Device,
    pixels: int,
    *,
    bytes_compulsory: float,
    bytes_asked: float,
    operations: float,
    exponentials: float,
    instructions: float,
    half: bool,
    programs: int | None = None,
) -> Times:
    """The time of a kernel by what it really does, its work given for one pixel.

    `operations` are those of the matrix units, each of the three products of `tf32x3` counted; `instructions` are a
    warp's. Where it has fewer `programs` than there are multiprocessors, the others do nothing.
    """
    terms = floor(
        device,
        pixels,
        bytes_compulsory=bytes_compulsory,
        operations=operations,
        exponentials=exponentials,
        half=half,
    ).terms
    terms["issue"] = 1e6 * pixels * instructions / device.issue
    idle = max(1.0, device.sms / programs) if programs else 1.0
    terms.update({name: idle * terms[name] for name in ("tensor", "exponential", "issue")})
    if device.l2 is not None:
        terms["L2"] = 1e6 * pixels * bytes_asked / device.l2
    return Times(terms, LAUNCH_US)
