"""The least time that a call can take: its products at a matrix product's rate, its bytes at a copy's.

Counts are exact for the model's definition with windows: what is multiplied, not what some implementation multiplies.
"""

from __future__ import annotations

from anyup.bench.workloads import Workload
from anyup.window import RatioWindow, Window

DIM = 128
FILTERS = 128
TAPS = 25  # of the feature unification's filters
WINDOW = RatioWindow(0.1)

CLASSES = 21
"""Outputs of the linear head, and channels of the class logits that are carried."""

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)


def products(operation: str, workload: Workload, window: Window = WINDOW) -> float:
    """Multiply-adds of an operation, or of the "model", forward, for the whole batch.

    Args:
        operation: "model", or one of `anyup.bench.cases.OPERATIONS`.
        workload: the sizes.
        window: of the attention.

    Raises ValueError for an operation without a count.
    """
    pixels, cells = workload.pixels, workload.batch * workload.keys
    square = DIM * DIM
    attention = pixels * workload.mean_window(window) * DIM  # logits of all heads

    def carried(channels: int) -> float:
        return pixels * workload.mean_window(window) * channels

    counts = {
        "window_attention": attention + carried(workload.channels),
        "window_attention_of_classes": attention + carried(CLASSES),
        # A first projection, then two blocks of two products; the keys' last one runs behind the pooling.
        "image_encoder": pixels * (3 * DIM + 4 * square),
        "query_encoder": pixels * 5 * square,
        "key_encoder": pixels * 4 * square + cells * square,
        "feature_unification": cells * workload.channels * FILTERS * TAPS,
        # 3 x 3, then the queries' projection.
        "query_projection": pixels * 10 * square,
    }
    if operation in counts:
        return counts[operation]
    if operation != "model":
        raise ValueError(f"operation: expected model or one of {', '.join(counts)}, got {operation!r}")
    # Two blocks behind the unification, the 3 x 3 aggregation of both halves with two blocks, the keys' projection.
    keys = cells * (4 * square + 9 * 2 * square + 4 * square + square)
    return keys + sum(count for name, count in counts.items() if name != "window_attention_of_classes")


def moved_bytes(operation: str, workload: Workload, itemsize: int = 4) -> int:
    """Bytes that an operation must read or write in memory, its inputs and outputs once each."""
    pixels, cells, channels = workload.pixels, workload.batch * workload.keys, workload.channels
    values = {
        "window_attention": pixels * (DIM + channels) + cells * (DIM + channels),
        "window_attention_of_classes": pixels * (DIM + CLASSES) + cells * (DIM + CLASSES),
        "image_encoder": pixels * (3 + DIM),
        "query_encoder": pixels * 2 * DIM,
        "key_encoder": pixels * DIM + cells * DIM,
        "feature_unification": cells * (channels + FILTERS),
        "query_projection": pixels * 2 * DIM,
        "model": pixels * (3 + channels) + cells * channels,
    }
    if operation not in values:
        raise ValueError(f"operation: expected one of {', '.join(values)}, got {operation!r}")
    return itemsize * values[operation]


def floor_seconds(
    operation: str, workload: Workload, rate: float, bandwidth: float, *, direction: str = FORWARD, itemsize: int = 4
) -> float:
    """The larger of the arithmetic's and the memory's time.

    Args:
        operation, workload: what is computed.
        rate: operations a second of a matrix product in the dtype at hand; a multiply-add is two.
        bandwidth: bytes a second, read and written, of a copy.
        direction: with the backward pass each product has two more, and each tensor a gradient.
        itemsize: bytes of a value.
    """
    times = 3 if direction == BOTH else 1
    arithmetic = 2 * times * products(operation, workload) / rate
    return max(arithmetic, times * moved_bytes(operation, workload, itemsize) / bandwidth)
