"""The statistics between two passes of the pixel encoder: what a pass leaves, and what the next one makes of it.

A program leaves count, mean and summed squared deviation of the eight groups of channels over its pixels. It sums what
a group lies away from a pivot, the group's mean over its first pixels, and the squares of that: numbers as small as the
deviation, whatever the mean is. A thread adds up those that it holds of a product, of each run of at most eight
channels, and threads and runs join their sums once, at the program's end.

The next pass joins the programs' statistics: the mean is their weighted mean, the deviation the sum of theirs and of
count * (mean - common mean)^2 (Chan, Golub and LeVeque 1983), which subtracts no squares. Each of its programs does so
for itself, in the same fixed order, and keeps the normalisation that follows in a copy of its own in memory: registers
do not hold it, and no program waits for another.

A group's channels are slots of a tile, padded to a power of two: `slot_channel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUPS = 8


@triton.jit
def slot_channel(slot, CHANNELS: tl.constexpr, DIM: tl.constexpr):
    """The channel of a slot of DIM that pad each of eight groups to a power of two."""
    if CHANNELS == DIM:
        return slot
    else:
        return slot // (DIM // 8) * (CHANNELS // 8) + slot % (DIM // 8)


@triton.jit
def slot_exists(slot, CHANNELS: tl.constexpr, DIM: tl.constexpr):
    """Whether a slot holds a channel."""
    if CHANNELS == DIM:
        return slot < DIM
    else:
        return slot % (DIM // 8) < CHANNELS // 8


@triton.jit
def run_sums(y, RUN: tl.constexpr):
    """Of pixels (n, runs of RUN slots, at most 8): what a thread that holds some of a product can add up of each run.

    The result's axis 2 is the runs'; the others are what is still to be joined. A warp holds runs of eight slots, where
    it may not hold a group.
    """
    PIXELS: tl.constexpr = y.shape[0]
    if RUN < 8:
        return tl.sum(tl.reshape(y, (PIXELS // 16, 16, y.shape[1] // RUN, 1, RUN)), axis=4)
    else:
        # A thread holds two neighbours of each eight channels of a row and of the row eight below; four share a row.
        return tl.sum(tl.sum(tl.reshape(y, (PIXELS // 16, 2, 8, y.shape[1] // 8, 4, 2)), axis=5), axis=1)


@triton.jit
def joined_threads(sums):
    """Of what `run_sums` leaves: the runs' sums."""
    return tl.sum(tl.sum(tl.sum(sums, axis=3), axis=1), axis=0)


@triton.jit
def joined_runs(of_runs, RUNS: tl.constexpr):
    """The sums of groups of RUNS runs."""
    return tl.sum(tl.reshape(of_runs, (of_runs.shape[0] // RUNS, RUNS)), axis=1)


@triton.jit
def in_runs(of_groups, RUNS: tl.constexpr):
    """A number of each group for each of its runs."""
    shape: tl.constexpr = (of_groups.shape[0], RUNS)
    return tl.reshape(tl.broadcast_to(of_groups[:, None], shape), (of_groups.shape[0] * RUNS,))


@triton.jit
def no_sums(PIXELS: tl.constexpr, RUNS_HERE: tl.constexpr, RUN: tl.constexpr):
    """Zeros of the shape that `run_sums` makes."""
    if RUN < 8:
        return tl.zeros((PIXELS // 16, 16, RUNS_HERE, 1), tl.float32)
    else:
        return tl.zeros((PIXELS // 16, 8, RUNS_HERE, 4), tl.float32)


@triton.jit
def away_from(y, pivot, exists, RUN: tl.constexpr):
    """y - pivot, of pixels (n, runs of RUN slots) and a pivot of each run; zero where no pixel exists.

    By one multiplication and addition each, where choosing would take another instruction.
    """
    factor = tl.where(exists, 1.0, 0.0)
    parts = tl.reshape(y, (y.shape[0], y.shape[1] // RUN, RUN))
    parts = parts * factor[:, None, None] - (pivot[None, :] * factor[:, None])[:, :, None]
    return tl.reshape(parts, y.shape)


@triton.jit
def store_sums(place, plane, sums, squares, pivot, values, existing):
    """Count, mean and squared deviation, `plane` numbers apart, of groups of so many values each, of pixels existing.

    Of their sums about a pivot, and those of the squares.
    """
    offset = sums / values
    tl.store(place, tl.zeros_like(pivot) + existing)
    tl.store(place + plane, pivot + offset)
    tl.store(place + 2 * plane, squares - sums * offset)


@triton.jit
def store_statistics(place, plane, y, exists, wanted, CHANNELS: tl.constexpr, DIM: tl.constexpr):
    """The same, all groups', of all pixels (n, groups of slots) of a program; some pixels exist, some slots do."""
    GROUP: tl.constexpr = DIM // 8
    GROUPS_HERE: tl.constexpr = y.shape[1] // GROUP
    existing = tl.sum(exists.to(tl.float32), axis=0)
    values = existing * (CHANNELS // 8)
    counted = exists[:, None] & wanted[None, :]
    shape: tl.constexpr = (y.shape[0], GROUPS_HERE, GROUP)
    mean = tl.sum(tl.sum(tl.reshape(tl.where(counted, y, 0.0), shape), axis=2), axis=0) / values
    away = tl.reshape(y, shape) - mean[None, :, None]
    away = tl.where(tl.reshape(counted, shape), away, 0.0)
    group = tl.arange(0, GROUPS_HERE)
    tl.store(place + group, tl.zeros_like(mean) + existing)
    tl.store(place + plane + group, mean)
    tl.store(place + 2 * plane + group, tl.sum(tl.sum(away * away, axis=2), axis=0))


@triton.jit
def make_norm(
    norm, parts, gain, bias, programs, eps,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, HALVED: tl.constexpr, CENTERED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Fill a normalisation, (2, DIM) scale and shift, with CENTERED (3, DIM) and a centre, from partial statistics.

    `parts` are (3, programs, 8). HALVED: scale and shift are halved. Without a centre it goes into the shift.
    """
    group = tl.arange(0, 8)
    plane = programs * 8
    pivot = tl.load(parts + plane + group)
    count = tl.zeros((AT_ONCE, 8), tl.float32)
    offset = tl.zeros((AT_ONCE, 8), tl.float32)
    for first in tl.range(0, programs, AT_ONCE):
        program = first + tl.arange(0, AT_ONCE)
        place = parts + program[:, None] * 8 + group[None, :]
        exists = (program < programs)[:, None]
        pixels = tl.load(place, mask=exists, other=0.0)
        count += pixels
        offset += pixels * (tl.load(place + plane, mask=exists, other=0.0) - pivot[None, :])
    total = tl.sum(count, axis=0)
    mean = tl.sum(offset, axis=0) / total
    deviation = tl.zeros((AT_ONCE, 8), tl.float32)
    for first in tl.range(0, programs, AT_ONCE):
        program = first + tl.arange(0, AT_ONCE)
        place = parts + program[:, None] * 8 + group[None, :]
        exists = (program < programs)[:, None]
        between = tl.load(place + plane, mask=exists, other=0.0) - pivot[None, :] - mean[None, :]
        within = tl.load(place + 2 * plane, mask=exists, other=0.0)
        values = tl.load(place, mask=exists, other=0.0) * (CHANNELS // 8)
        deviation += within + values * between * between
    variance = tl.sum(deviation, axis=0) / (total * (CHANNELS // 8))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    # The centre is rounded; what that leaves of the mean goes into the shift.
    center = pivot + mean
    rest = mean - (center - pivot)
    slot = tl.arange(0, DIM)
    exists = slot_exists(slot, CHANNELS, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    factor = 0.5 if HALVED else 1.0
    weight = tl.load(gain + channel, mask=exists, other=0.0).to(tl.float32) * factor
    scale = weight * in_slots(inverse, DIM)
    shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32) * factor - in_slots(rest, DIM) * scale
    if CENTERED:
        tl.store(norm + 2 * DIM + slot, in_slots(center, DIM))
    else:
        shift -= in_slots(center, DIM) * scale
    tl.store(norm + slot, scale)
    tl.store(norm + DIM + slot, shift)


@triton.jit
def in_slots(of_groups, DIM: tl.constexpr):
    """A number of each group, (8,), for each slot: (DIM,)."""
    return in_runs(of_groups, DIM // 8)
