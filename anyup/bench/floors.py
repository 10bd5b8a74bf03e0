"""The least time that a call can take: its products at a matrix product's rate, its bytes at a copy's.

Counts are exact for the model's definition with windows: what is multiplied, not what some implementation multiplies.
So Winograd's convolution, which multiplies less than its definition, may take the query projection below its floor.
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
        operation: "model", "model_of_classes" (which carries the logits of a head that came first), or one of
            `anyup.bench.cases.OPERATIONS`.
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
    # Two blocks behind the unification, the 3 x 3 aggregation of both halves with two blocks, the keys' projection.
    keys = cells * (4 * square + 9 * 2 * square + 4 * square + square)
    attentions = {"model": "window_attention", "model_of_classes": "window_attention_of_classes"}
    others = sum(count for name, count in counts.items() if name not in attentions.values())
    for whole, of_attention in attentions.items():
        counts[whole] = keys + others + counts[of_attention]
    if operation not in counts:
        raise ValueError(f"operation: expected one of {', '.join(counts)}, got {operation!r}")
    return counts[operation]


def moved_bytes(operation: str, workload: Workload, itemsize: int = 4, direction: str = FORWARD) -> int:
    """Bytes that an operation must read or write in memory.

    Forward its inputs and its output once each. The backward pass reads the inputs and the output's gradient and writes
    the inputs' gradients.
    """
    pixels, cells, channels = workload.pixels, workload.batch * workload.keys, workload.channels
    values = {  # of the inputs, of the output
        "window_attention": (pixels * DIM + cells * (DIM + channels), pixels * channels),
        "window_attention_of_classes": (pixels * DIM + cells * (DIM + CLASSES), pixels * CLASSES),
        "image_encoder": (pixels * 3, pixels * DIM),
        "query_encoder": (pixels * DIM, pixels * DIM),
        "key_encoder": (pixels * DIM, cells * DIM),
        "feature_unification": (cells * channels, cells * FILTERS),
        "query_projection": (pixels * DIM, pixels * DIM),
        "model": (pixels * 3 + cells * channels, pixels * channels),
        "model_of_classes": (pixels * 3 + cells * channels, pixels * CLASSES),
    }
    if operation not in values:
        raise ValueError(f"operation: expected one of {', '.join(values)}, got {operation!r}")
    read, written = values[operation]
    return itemsize * (3 * read + 2 * written if direction == BOTH else read + written)


def floor_seconds(
    operation: str, workload: Workload, rate: float, bandwidth: float, *, direction: str = FORWARD, itemsize: int = 4
) -> float:
    """The larger of the arithmetic's and the memory's time.

    Args:
        operation, workload: what is computed.
        rate: operations a second of a matrix product in the dtype at hand; a multiply-add is two.
        bandwidth: bytes a second, read and written, of a copy.
        direction: with the backward pass each product has two more.
        itemsize: bytes of a value.
    """
    arithmetic = 2 * (3 if direction == BOTH else 1) * products(operation, workload) / rate
    return max(arithmetic, moved_bytes(operation, workload, itemsize, direction) / bandwidth)
