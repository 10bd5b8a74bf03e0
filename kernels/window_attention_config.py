"""Configs of the window attention: sizes of tiles and blocks, warps, stages. A rule that always works.

A `Config` changes speed and never a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from .launch import Target

MostKeys = Callable[[int, int], int]
"""Rows and columns of a tile to the most keys that one such tile sees."""


@dataclass(frozen=True)
class ForwardConfig:
    """A config of the forward pass.

    Attributes:
        rows, columns: pixels of a tile.
        block_keys: keys worked on at once.
        resident_blocks: blocks whose weights stay in registers, the most that a tile sees; 0: any number, streamed.
        channel_slice: channels multiplied at once.
        slices: channel slices alive at once where keys are streamed.
        num_warps, num_stages: Triton's.
        row_partials: running maxima and sums of a pixel, each of a share of a block's keys: 4 where four threads hold a
            row of a product.
        load_once: whether all heads' queries stay in registers, and all heads' keys of a block are asked for at once.
        piece: channels of a head multiplied at once where queries are not kept.
        group_blocks: resident blocks whose logits are in registers at once.
        tail_keys: of a last, smaller block that stays in registers too; 0: there is none.
        kept_programs: programs of a multiprocessor that keep a tile's weights in memory, where none stay in registers;
            0: they are made anew for each run of `slices`.
    """

    rows: int
    columns: int
    block_keys: int
    resident_blocks: int
    channel_slice: int
    slices: int
    num_warps: int
    num_stages: int
    row_partials: int = 4
    load_once: bool = True
    piece: int = 32
    tail_keys: int = 0
    group_blocks: int = 4
    kept_programs: int = 0

    def __post_init__(self) -> None:
        check(self)


# Queries of more channels, all heads' together, do not stay in registers.
_KEPT_CHANNELS = 128
# Weights of more keys are made anew: a program would keep more than half a megabyte.
_MOST_KEPT_KEYS = 2048


def _resident_keys(target: Target, half: bool, heads: int, head_dim: int) -> int:
    """The most keys whose weights stay in registers: more would take those that everything else needs."""
    if not half:
        if head_dim <= 32 and heads * head_dim <= _KEPT_CHANNELS and target.arch in (80, 86, 89, 90, 120):
            return 96
        narrow = head_dim <= 64 or (heads == 1 and (target.arch == 90 or target.backend == "hip"))
        return 64 if narrow else 0
    if head_dim <= 32:
        # 15 x 15 keys are one more than 7 blocks. A tail of 16 spills 32 bytes at most, on sm_90 none, and is worth it.
        fits = target.arch == 90 or (target.arch in (80, 86, 89) and heads * head_dim <= _KEPT_CHANNELS)
        return 240 if fits else 224
    if heads * head_dim <= _KEPT_CHANNELS:
        return 160 if target.arch == 120 and head_dim == 64 else 208
    return 128 if head_dim == 64 else 64


def forward_configs(
    most_keys: MostKeys, *, target: Target, half: bool, heads: int, head_dim: int, channels: int
) -> list[ForwardConfig]:
    """Configs of the forward pass, best first; what comes later asks less of a card.

    `half` says that all operands of products are of two bytes. They were chosen by `python -m benchmarks.modelled_gpu`:
    none of the best spills a register in half precision, but where 225 to 240 keys stay in them (32 bytes, sm_80 to
    sm_89), nor in float32 where all heads have 128 channels together and the values a multiple of 16, but one head of
    128 on sm_86 and sm_89 (8 bytes). Wider ones in float32 were seen to spill, and the last configs up to 160 bytes.
    """
    configs = _forward_configs(most_keys(8, 8), target, half, heads, head_dim, channels % 16 == 0)
    if not configs[0].resident_blocks and channels > configs[0].slices * configs[0].channel_slice:
        kept = _kept_in_memory(target, half, heads, head_dim, channels)
        if kept is not None and most_keys(kept.rows, kept.columns) <= _MOST_KEPT_KEYS:
            configs = (kept, configs[1])
    # Slices beyond the last channel would be multiplied too.
    return [
        replace(config, slices=min(config.slices, max(1, -(-channels // config.channel_slice)))) for config in configs
    ]


@cache
def _forward_configs(
    most_keys: int, target: Target, half: bool, heads: int, head_dim: int, even: bool
) -> tuple[ForwardConfig, ForwardConfig]:
    wide = heads * head_dim > _KEPT_CHANNELS
    once = half and not wide
    # Four threads hold a row of a product, except where the products have a memory of their own (sm_100) or a wave's
    # matrix units another layout (AMD).
    partials = 1 if target.backend == "hip" or target.arch == 100 else 4
    # Products of float32 take tensor memory of sm_100 by the piece; eight heads of 128 ask for more than there is, and
    # run with the last config, whose 32 pixels are too few for that kind of product.
    piece = 32 if target.arch == 100 else 16
    slice_ = 32 if half else 16  # the narrowest that is stored 16 bytes at a time
    block = 32 if half else 16
    blocks, left = divmod(most_keys, block)
    # A half block at the end where that is enough.
    tail = 16 if half and blocks and 0 < left <= 16 else 0
    blocks += bool(left and not tail)
    resident = block * blocks + tail <= _resident_keys(target, half, heads, head_dim)
    if resident and half:
        # Products of 64 channels, where they leave registers enough.
        roomy = block * blocks + tail <= (208 if head_dim <= 32 else 0 if target.arch == 100 else 64)
        roomy = roomy and target.arch != 120
        most = block * blocks + tail > 224
        group = 4 if target.arch == 100 or most else 8
        stages = 1 if most or (wide and head_dim == 64) else 2
        best = ForwardConfig(
            8, 8, 32, blocks, 64 if roomy else 32, 1, 4, stages, partials, once, tail_keys=tail, group_blocks=group
        )
    elif resident and block * blocks > 64:
        best = ForwardConfig(8, 8, 32, -(-blocks // 2), 32 if target.arch == 90 else slice_, 1, 4, 1, partials, once)
    elif resident:
        # On sm_100 four heads of 32 spill with one share.
        two = 2 if target.arch == 100 and heads == 4 else partials
        best = ForwardConfig(8, 8, 16, blocks, 16 if head_dim == 64 else 32, 1, 4, 1, two, once)
    elif once:
        best = ForwardConfig(8, 8, 16, 0, 64, 3 if heads <= 4 else 2, 4, 1, partials, once)
    elif not wide:
        best = _streamed_float32(target, heads, head_dim, partials, even)
    else:
        # By less than half a head of 128 at a time these two targets spill a few registers.
        roomy = half and target.arch in (100, 120)
        best = ForwardConfig(
            8, 8, 16, 0, slice_, 1, 4, 1, partials, load_once=roomy and head_dim <= 32, piece=64 if roomy else piece
        )
    rows = 4 if target.arch == 100 else 8
    return best, ForwardConfig(rows, 8, 16, 0, slice_, 1, 4, 1, partials, load_once=False, piece=piece)


def _kept_in_memory(target: Target, half: bool, heads: int, head_dim: int, channels: int) -> ForwardConfig | None:
    """The config that keeps weights in memory; None where those that were tried spill.

    128 pixels at a time ask the L2 cache for half as many keys and values. But one program then takes all registers of
    a multiprocessor, whose units wait for each other: worth it where the matrix units are fast.
    """
    partials = 1 if target.backend == "hip" or target.arch == 100 else 4
    if heads > 4 or head_dim > 32 or channels % 16:
        return None
    if not half:
        if target.arch == 100:
            return ForwardConfig(8, 16, 32, 0, 32, 4, 8, 1, partials, load_once=False, piece=32, kept_programs=1)
        stay = target.arch in (80, 90, 120)
        programs = 1 if target.arch == 120 else 2
        block = 32 if target.arch == 90 else 16
        return ForwardConfig(8, 8, block, 0, 32, 4, 4, 1, partials, load_once=stay, piece=16, kept_programs=programs)
    if target.arch == 90:
        # Where the last run is not full 64 keys at a time spill.
        run = (64, 64, 3) if channels % 192 == 0 else (64, 128, 2) if channels % 256 == 0 else (32, 64, 3)
        return ForwardConfig(8, 16, run[0], 0, *run[1:], 8, 2, partials, kept_programs=1)
    if target.arch == 100:
        return ForwardConfig(8, 16, 32, 0, 64, 3, 8, 1, partials, kept_programs=1)
    if target.backend == "hip":
        return ForwardConfig(8, 16, 64, 0, 64, 3, 8, 2, partials, kept_programs=1)
    if target.arch == 120 and heads * head_dim < 128:
        return None
    run = (32, 4) if target.arch == 120 else (64, 2)
    return ForwardConfig(8, 8, 32, 0, *run, 4, 2, partials, kept_programs=2)


def _streamed_float32(target: Target, heads: int, head_dim: int, partials: int, even: bool) -> ForwardConfig:
    """The logits are made anew for each run of slices, so runs are as long as they can be without a spill.

    `even`: the channels are a multiple of 16.
    """
    full = heads * head_dim > 96
    narrow, wide = (16, 8), (32, 4)  # a slice's channels and how many: 128
    if target.arch == 90 or (target.arch == 80 and head_dim < 128):
        # Queries wait in shared memory, where two programs' have room.
        if head_dim == 128:
            run = 16, 4
        elif target.arch == 80:
            run = narrow if full and heads > 2 else wide
        else:
            run = (32, 3) if full and heads > 4 else wide
        return ForwardConfig(8, 8, 16, 0, *run, 4, 1, partials)
    if target.arch == 120 and full and heads > 4:
        return ForwardConfig(8, 8, 16, 0, 32, 3, 4, 1, partials)
    if heads == 4 and head_dim == 32 and even and target.arch in (86, 89, 100):
        run = (32, 6) if target.arch == 100 else (16, 12)
    elif heads > 1:
        run = 16, 6 if heads == 2 and head_dim >= 32 else 8
    else:
        run = 16, 2 if target.arch == 120 else 4
    partials = 1 if target.arch == 120 and head_dim == 128 else partials
    return ForwardConfig(8, 8, 16, 0, *run, 4, 1, partials, load_once=False)


@dataclass(frozen=True)
class BackwardQueryConfig:
    """A config of the backward pass of the queries: `heads` of a program, a divisor of their number, 0: all.

    The other attributes are as of `ForwardConfig`; resident blocks are those whose <dO, v> stay in registers, and the
    first `waiting_blocks` of these keep a head's exponentials too, which the others make twice.
    """

    rows: int
    columns: int
    block_keys: int
    resident_blocks: int
    channel_slice: int
    num_warps: int
    num_stages: int
    heads: int = 0
    load_once: bool = True
    piece: int = 32
    tail_keys: int = 0
    row_partials: int = 4
    waiting_blocks: int = 16

    def __post_init__(self) -> None:
        check(self)
        if self.waiting_blocks < 0:
            raise ValueError(f"waiting_blocks: expected at least 0, got {self.waiting_blocks}")
        smallest = min(self.block_keys, self.tail_keys or self.block_keys)
        # The bits of an integer say which keys of a thread's share a pixel sees.
        if self.resident_blocks and not 2 * self.row_partials <= smallest <= self.block_keys <= 32 * self.row_partials:
            raise ValueError(
                f"row_partials: expected blocks of 2 to 32 keys for each of {self.row_partials}, got {self}"
            )
        tail = self.tail_keys
        if tail and (not self.resident_blocks or tail & (tail - 1) or not 16 <= tail < self.block_keys):
            raise ValueError(
                f"tail_keys: expected 0, or a power of two from 16 to less than resident block_keys, got {self}"
            )


@dataclass(frozen=True)
class BackwardGridConfig:
    """A config of the backward pass of keys or values.

    Attributes:
        rows, columns: keys of a tile.
        block_pixels: pixels worked on at once.
        channel_slice: channels multiplied at once.
        slices: channel slices that a program adds up, of values.
        partials: programs that share the pixels of a tile, each with a partial sum of its own.
        num_warps, num_stages: Triton's.
        heads: of a program, of keys: a divisor of their number; 0: all.
        load_once: whether all heads' keys stay in registers.
        piece: channels of a head multiplied at once where keys are not kept.
        tall: whether the gradients are summed with their channels as rows, not the tile's keys; those of values that
            are summed together with the keys' always are.
        refetch: of keys and values together, whether a block's queries are fetched again for the keys' gradient
            instead of waiting in registers.
    """

    rows: int
    columns: int
    block_pixels: int
    channel_slice: int
    slices: int
    partials: int
    num_warps: int
    num_stages: int
    heads: int = 0
    load_once: bool = True
    piece: int = 32
    tall: bool = False
    refetch: bool = False

    def __post_init__(self) -> None:
        check(self)


def check(config: ForwardConfig | BackwardQueryConfig | BackwardGridConfig) -> None:
    """Raise a ValueError that names an attribute of a config which the language or the matrix units do not take."""
    numbers = {name: number for name, number in vars(config).items() if type(number) is int}
    powers = ("rows", "columns", "block_keys", "block_pixels", "channel_slice", "piece", "row_partials", "num_warps")
    for name in powers:
        number = numbers.get(name, 1)
        if number < 1 or number & (number - 1):
            raise ValueError(f"{name}: expected a power of two, got {number}")
    numbers["rows * columns"] = config.rows * config.columns
    for least, names in (
        (16, ("rows * columns", "block_keys", "block_pixels", "channel_slice", "piece")),
        (1, ("slices", "partials", "num_stages", "group_blocks")),
        (0, ("resident_blocks", "kept_programs", "heads")),
    ):
        for name in names:
            if numbers.get(name, least) < least:
                raise ValueError(f"{name}: expected at least {least}, got {numbers[name]}")
    if config.num_warps > 32:
        raise ValueError(f"num_warps: expected at most 32, got {config.num_warps}")
    if isinstance(config, ForwardConfig):
        _check_forward(config)


def _check_forward(config: ForwardConfig) -> None:
    if config.block_keys < 2 * config.row_partials:
        raise ValueError(f"row_partials: expected at most half of {config.block_keys} keys, got {config.row_partials}")
    # `side_by_side` makes runs of up to 8 blocks.
    if config.resident_blocks > 15:
        raise ValueError(f"resident_blocks: expected at most 15, got {config.resident_blocks}")
    if config.resident_blocks and config.kept_programs:
        raise ValueError(f"kept_programs: expected 0 with resident_blocks, got {config.kept_programs}")
    # The bits of an integer say which keys of a thread's share a pixel sees.
    if config.resident_blocks and config.block_keys > 32 * config.row_partials:
        raise ValueError(
            f"block_keys: expected at most 32 for each of {config.row_partials} shares, got {config.block_keys}"
        )
    tail = config.tail_keys
    if tail and (not config.resident_blocks or tail & (tail - 1) or not 16 <= tail < config.block_keys):
        raise ValueError(
            f"tail_keys: expected 0, or a power of two from 16 to less than resident block_keys, got {config}"
        )
    if tail and tail < 2 * config.row_partials:
        raise ValueError(f"row_partials: expected at most half of {tail} keys, got {config.row_partials}")


def backward_query_configs(
    most_keys: MostKeys, *, target: Target, half: bool, heads: int, head_dim: int
) -> list[BackwardQueryConfig]:
    """Configs of the backward pass of the queries, best first; chosen as those of the forward pass."""
    group = _heads_of_a_program(heads, head_dim, most=8 if half else 4)
    few = heads <= 4 and head_dim <= 32
    kept = _resident_backward if half else _resident_backward_float32
    resident = kept(most_keys(8, 8), target, heads, head_dim)
    if resident is not None:
        best = resident
    elif half and target.arch == 120:
        best = BackwardQueryConfig(4, 4, 32, 0, 64, num_warps=4, num_stages=2, heads=group, load_once=False)
    elif half:
        # Four warps, 16 rows of a product each, waste none; elsewhere they have too few registers.
        warps = 4 if target.arch == 90 and few else 8
        best = BackwardQueryConfig(8, 8, 32, 0, 64, num_warps=warps, num_stages=2, heads=group, load_once=False)
    elif few and target.backend == "cuda" and target.arch != 120:
        # 32 keys where the matrix units take 64 rows of tf32 from shared memory, which saves registers. On sm_90 it
        # spills 8 bytes all the same; with 16 keys it does too, and takes half as long again.
        block, slice_ = (32, 16) if target.arch in (90, 100) else (16, 32 if target.arch == 80 else 16)
        best = BackwardQueryConfig(
            8, 8, block, 0, slice_, num_warps=4, num_stages=1, heads=group, load_once=False, piece=16
        )
    elif few and target.backend == "cuda":
        # Two warps divide a product of 16 by 16 between them; four make half of it twice.
        best = BackwardQueryConfig(4, 4, 16, 0, 32, num_warps=2, num_stages=1, heads=group, load_once=False)
    else:
        warps = 4 if head_dim <= 32 else 8
        best = BackwardQueryConfig(4, 4, 16, 0, 16, num_warps=warps, num_stages=1, heads=group, load_once=False)
    return [best, BackwardQueryConfig(4, 4, 16, 0, 16, 4, 1, heads=group, load_once=False, piece=16)]


def _resident_backward(keys: int, target: Target, heads: int, head_dim: int) -> BackwardQueryConfig | None:
    """The config that keeps <dO, v> of up to so many keys in registers; None where every one that was tried spills."""
    partials = 1 if target.backend == "hip" or target.arch == 100 else 4
    if heads * head_dim > _KEPT_CHANNELS or head_dim > 64:
        return None
    if keys <= 64:
        block = 64 if target.arch == 120 else 32
        slice_ = 32 if target.arch in (86, 89) else 64
        return BackwardQueryConfig(
            8, 8, block, -(-keys // block), slice_, num_warps=4, num_stages=2, row_partials=partials
        )
    if keys > 208 or heads != 4 or head_dim != 32:
        return None
    # A few registers more or less decide: six blocks spill where six and a half do not.
    blocks, tail = (-(-keys // 32), 0) if keys <= 128 else (6, 16)
    if target.arch == 80:
        piece, stages, waiting = 32, 2, 1
    elif target.arch in (90, 100) or target.backend == "hip":
        piece, stages, waiting = 64, 1, 1 if target.arch == 90 else 0 if target.arch == 100 else 16
    else:
        return None
    return BackwardQueryConfig(
        8,
        8,
        32,
        blocks,
        piece,
        num_warps=4,
        num_stages=stages,
        tail_keys=tail,
        row_partials=partials,
        waiting_blocks=waiting,
    )


def _resident_backward_float32(keys: int, target: Target, heads: int, head_dim: int) -> BackwardQueryConfig | None:
    """The same in float32."""
    tight = target.arch in (100, 120)
    if target.backend != "cuda" or heads > 4 or head_dim > 32 or keys > (64 if tight else 96):
        return None
    slice_, waiting = (16, 0) if target.arch == 100 else (32, 16)
    return BackwardQueryConfig(8, 8, 32, -(-keys // 32), slice_, num_warps=4, num_stages=1, waiting_blocks=waiting)


def _heads_of_a_program(heads: int, head_dim: int, most: int) -> int:
    """The most heads whose gradients stay in registers, a divisor of their number, not above `most`."""
    most = min(most, max(1, _KEPT_CHANNELS // head_dim))
    return max(number for number in range(1, heads + 1) if heads % number == 0 and number <= most)


# Programs enough for the cards of today; a fixed number, or the sums would depend on the card.
_GRID_PROGRAMS = 512
_MOST_PARTIALS = 16
# Fewer would not be worth a partial sum.
_LEAST_PIXELS_OF_A_PARTIAL = 2048


# Of 64 channels: with more the kernel of keys and values spills.
_SLICES_TOGETHER = {80: 6, 90: 12, 100: 12, 120: 1}


def backward_key_value_configs(
    pixels: int, keys: int, channels: int, *, target: Target, half: bool, heads: int, head_dim: int
) -> list[BackwardGridConfig]:
    """Configs of the backward pass of keys and values at once; none where its sums would not stay in registers.

    Arguments as for `backward_grid_configs`.
    """
    hip = target.backend == "hip"
    most = 16 if hip else _SLICES_TOGETHER.get(target.arch, 3)
    # A slice half as long where there is but one that is not full.
    slice_ = 32 if channels <= 32 else 64
    slices = -(-channels // slice_)
    # What is left out spills: three heads 8 bytes on sm_80, a last slice that is not full up to 72.
    uneven = channels % 16 > 0 and (slices > 1 or target.arch == 120)
    if not half or heads not in (1, 2, 4) or head_dim > 32 or not 0 < slices <= most or uneven:
        return []
    partials = _partials(pixels, keys, channels + heads * head_dim, heads * head_dim, half)
    tall = not hip and target.arch not in (90, 100)
    refetch = tall or (target.arch == 100 and slices > 6)
    # Two stages fetch into shared memory, of which sm_90 has enough, and not into registers.
    stages = 2 if target.arch == 90 and slices > 6 else 1
    return [BackwardGridConfig(4, 4, 64, slice_, 1, partials, 4, stages, heads=heads, tall=tall, refetch=refetch)]


def _partials(pixels: int, keys: int, row: int, width: int, half: bool) -> int:
    """Programs that share the pixels of a tile; `row`: what a key has of partial sums, `width` of channels."""
    # The partial sums, of float32, are no larger than the queries' gradient.
    as_large = pixels * width * (2 if half else 4) // (4 * max(keys * row, 1))
    partials = min(_MOST_PARTIALS, _GRID_PROGRAMS * 16 // max(keys, 1), pixels // _LEAST_PIXELS_OF_A_PARTIAL, as_large)
    return max(1, partials)


def backward_grid_configs(
    pixels: int, keys: int, channels: int, *, target: Target, half: bool, heads: int, head_dim: int,
    of_values: bool = False,
) -> list[BackwardGridConfig]:  # fmt: skip
    """Configs of the backward pass of the keys (or of the values), best first; chosen as those of the forward pass.

    `pixels` are those of one image, `keys` those of all images.
    """
    partials = _partials(pixels, keys, max(channels, heads * head_dim), heads * head_dim, half)
    group = _heads_of_a_program(heads, head_dim, most=4)
    few = heads <= 4 and head_dim <= 32
    # Two stages hold every head's queries in shared memory.
    block, stages = (64, 2) if heads * head_dim <= _KEPT_CHANNELS else (32, 1)
    if target.arch == 120 and not (half and few):
        block = 32
    if not few or channels <= 128:
        slices = 2
    elif half and target.backend == "cuda" and target.arch != 100:
        # Of 64 channels: most features in one run. These two targets spill 8 bytes where the last run is not full.
        slices = 4 if target.arch in (86, 89) and channels % 384 else 6
    else:
        slices = 4
    # Products of 16 rows by many columns make all warps repeat the logits, unless rows and columns change places.
    tall = half and few and target.arch in (80, 86, 89, 120)
    if half:
        stages = 1 if tall and of_values else stages
        # With 64 channels at once these two targets' keys spill 8 bytes.
        slice_ = 128 if few and not of_values and target.arch in (86, 89) and channels % 128 == 0 else 64
        best = BackwardGridConfig(
            4, 4, block, slice_, slices, partials, num_warps=4, num_stages=stages, heads=group, load_once=few, tall=tall
        )
    elif few and target.backend == "cuda":
        config = _float32_values(target, channels) if of_values else _float32_keys(target)
        best = replace(config, partials=partials, heads=group)
    else:
        best = BackwardGridConfig(
            4, 4, 16, 32, slices, partials, num_warps=4, num_stages=1, heads=group, load_once=False
        )
    return [best, BackwardGridConfig(4, 4, 16, 32, 2, partials, 4, 1, heads=group, load_once=False, piece=16)]


def _float32_keys(target: Target) -> BackwardGridConfig:
    """The keys' config for few heads, but for its partials and heads."""
    if target.arch == 100:
        return BackwardGridConfig(4, 4, 64, 32, 1, 1, num_warps=4, num_stages=1)
    if target.arch in (86, 89, 90):
        # More pixels spill.
        return BackwardGridConfig(4, 4, 16, 32, 1, 1, num_warps=2, num_stages=1)
    # Two warps divide a product of 16 by 32 between them; four make half of it twice.
    return BackwardGridConfig(4, 4, 32, 32, 1, 1, num_warps=2, num_stages=1, load_once=False)


def _float32_values(target: Target, channels: int) -> BackwardGridConfig:
    """The values' config for few heads, but for its partials and heads; each run of slices makes the logits anew."""
    even = channels % 16 == 0
    if target.arch == 90 or (target.arch == 80 and even):
        slices = min(3, -(-max(channels, 1) // 64))
        return BackwardGridConfig(4, 4, 64, 64, slices, 1, num_warps=4, num_stages=1, load_once=False, tall=True)
    slices = min(4, -(-max(channels, 1) // 32))
    if target.arch in (86, 89) and even and channels > 128:
        return BackwardGridConfig(4, 4, 32, 32, 6, 1, num_warps=2, num_stages=1, load_once=False, piece=16)
    if channels % 192 == 0 or (target.arch == 100 and even and channels > 128):
        slices = 6
    return BackwardGridConfig(4, 4, 16, 32, slices, 1, num_warps=2, num_stages=1, load_once=False)
