"""One image over several ranks: processes of gloo on a CPU against the plain call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.accuracy import assert_close_enough
from support.patience import PATIENCE
from support.ranks import RankError, Ranks, start
from support.recipe import INTERPRETED, fill, wave
from torch import Tensor

import anyup.distributed
from anyup import AnyUp
from anyup.limited_memory import choice, prediction
from anyup.ops.pixel_encoder.banded import BandedEncoder
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.statistics import Statistics
from anyup.ops.precision import working_dtype
from anyup.ranks import RankShare

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

IMAGE, FEATURES = wave((1, 3, 23, 17), 3, 0.8), wave((1, 9, 6, 5), 7)

TOLERANCE = 1e-5
"""How far results of other numbers of ranks may be apart in float32, in parts of the largest value."""


def upsampler(**arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3, **arguments), 0).eval()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


Rows = list[tuple[Tensor | None]]
"""The image argument of each rank."""


def shares(image: Tensor, counts: Sequence[int]) -> Rows:
    """So many rows for each rank; None where there are none."""
    return [(rows if rows.shape[2] else None,) for rows in image.split(list(counts), dim=2)]


def first_only(count: int, image: Tensor) -> Rows:
    """The whole image for rank 0."""
    return [(image,), *([(None,)] * (count - 1))]


def job(
    group: Any,
    image: Tensor | None,
    features: Tensor | None,
    size: Any = None,
    arguments: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[slice, Tensor]:
    """On each rank: the rows and the values of its part."""
    part = part_of(group, image, features, size, arguments, settings)
    return part.rows, part.values.clone()


def part_of(
    group: Any,
    image: Tensor | None,
    features: Tensor | None,
    size: Any = None,
    arguments: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> anyup.distributed.Part:
    prediction.BAND_PIXELS = 5 * 17  # so that a small image has several bands
    model = upsampler(**(arguments or {}))
    kind = next((each.dtype for each in (image, features) if each is not None), torch.float32)
    with torch.inference_mode():
        return anyup.distributed.upsample(model.to(kind), image, features, size, group=group, **(settings or {}))


def whole(parts: Sequence[tuple[slice, Tensor]], height: int) -> Tensor:
    """The output of which these are the parts."""
    assert [parts[0][0].start, *(rows.stop for rows, _ in parts)] == [*(rows.start for rows, _ in parts), height]
    return torch.cat([values for _, values in parts], dim=2)


def plain(dtype: torch.dtype, size: Any = None, backend: str | None = None, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        return upsampler(backend=backend, **arguments).to(dtype)(IMAGE.to(dtype), FEATURES.to(dtype), size)


def assert_is_the_call(actual: Tensor, size: Any = None, **arguments: Any) -> None:
    """Raise an AssertionError unless the result obeys the error rule."""
    reference = plain(actual.dtype, size, "reference", **arguments)
    assert_close_enough(actual, reference, plain(torch.float64, size, "reference", **arguments))


SPLITS = {1: [23], 2: [9, 14], 3: [0, 23, 0], 4: [1, 7, 12, 3]}
"""Odd rows of each rank."""


SIZES = None, (9, 13), (46, 34), (1, 1), (3, 17)
ARGUMENTS: list[dict[str, Any]] = [{"kernel_size": 2, "window": "cell"}, {"kernel_size": 3}, {}]
# A kernel changes which rows a rank needs of the image, a size those of the output: each number of ranks meets all
# kernels at the image's own size, and all sizes with one kernel each.
CALLS = [
    (count, size, arguments)
    for count in SPLITS
    for number, size in enumerate(SIZES)
    for turn, arguments in enumerate(ARGUMENTS)
    if size is None or (count + number) % 3 == turn
]


@pytest.mark.parametrize(("count", "size", "arguments"), CALLS, ids=str)
def test_the_parts_of_all_ranks_are_the_plain_call(
    ranks: Ranks, count: int, size: tuple[int, int] | None, arguments: dict[str, Any]
) -> None:
    wide = IMAGE.double()
    parts = ranks.run(shares(wide, SPLITS[count]), job, FEATURES.double(), size, arguments)
    assert_is_the_call(whole(parts, (size or (23, 17))[0]), size, **arguments)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_dtype_obeys_the_error_rule_whatever_the_number_of_ranks(
    ranks: Ranks, count: int, dtype: torch.dtype
) -> None:
    features = FEATURES.to(dtype)
    parts = ranks.run(first_only(count, IMAGE.to(dtype)), job, features)
    assert_is_the_call(whole(parts, 23))


def test_the_result_hardly_depends_on_the_number_of_ranks_and_not_on_who_has_the_image(ranks: Ranks) -> None:
    found = [whole(ranks.run(first_only(count, IMAGE), job, FEATURES), 23) for count in (1, 2, 3, 4)]
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= TOLERANCE * found[0].abs().max()
    assert not found[3].equal(found[0]), "the sums are split elsewhere; equal bits would mean that nothing was shared"
    shared = ranks.run(shares(IMAGE, SPLITS[4]), job, FEATURES)
    assert whole(shared, 23).equal(found[3])


def test_there_may_be_more_ranks_than_rows(ranks: Ranks) -> None:
    image = IMAGE[:, :, :3].double()
    parts = ranks.run(first_only(4, image), job, FEATURES.double())
    assert [rows for rows, _ in parts] == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 3)]
    with torch.inference_mode():
        expected = upsampler().double()(image, FEATURES.double())
    torch.testing.assert_close(whole(parts, 3), expected, rtol=0, atol=1e-12)


def test_values_are_carried_and_a_batch_is_several_images(ranks: Ranks) -> None:
    image, features, values = wave((2, 3, 11, 9), 1), wave((2, 5, 4, 3), 2), wave((2, 2, 4, 3), 3)
    image, features, values = image.double(), features.double(), values.double()
    settings = {"values": values, "dtype": torch.float32}
    parts = ranks.run(shares(image, (5, 5, 1)), job, features, None, {}, settings)
    with torch.inference_mode():
        expected = upsampler().double()(image, features, values=values).float()
    torch.testing.assert_close(whole(parts, 11), expected)


def gathered(group: Any, *arguments: Any) -> Tensor:
    return part_of(group, *arguments).as_dtensor().full_tensor().clone()


def test_the_parts_are_a_dtensor_sharded_over_rows(ranks: Ranks) -> None:
    parts = ranks.run(first_only(3, IMAGE), job, FEATURES, (10, 7))
    for each in ranks.run(first_only(3, IMAGE), gathered, FEATURES, (10, 7)):
        assert each.equal(whole(parts, 10))


def job_in_room(group: Any, kept: tuple[int, int, int], *arguments: Any) -> tuple[slice, Tensor]:
    """`job` in bands of four rows that keep a map of so many rows: for the statistics, the output, and beside it."""

    def choose(task: Any, limit: int | None, **_: Any) -> Any:
        plan = original(task, None)
        names = "kept", "kept_for_output", "encoded"
        rows = {name: min(each, task.own_rows) for name, each in zip(names, kept, strict=True)}
        return replace(plan, bands=replace(plan.bands, rows=4, output_rows=3, **rows))

    original, choice.choose = choice.choose, choose
    try:
        return job(group, *arguments)
    finally:
        choice.choose = original


def test_each_rank_keeps_what_it_has_room_for(ranks: Ranks) -> None:
    room = [(4, 0, 0), (8, 4, 4), (0, 0, 0), (5, 5, 5)]
    each = [(kept, *rows) for kept, rows in zip(room, shares(IMAGE.double(), SPLITS[4]), strict=True)]
    parts = ranks.run(each, job_in_room, FEATURES.double(), (30, 40))
    assert_is_the_call(whole(parts, 30), (30, 40))


def job_out_of_memory_once(group: Any, fails: bool, *arguments: Any) -> tuple[slice, Tensor]:
    """`job`, where a band of the third pass finds no memory."""
    accumulate, calls = BandedEncoder.accumulate_statistics, [0]

    def failing(self: BandedEncoder, *args: Any, **settings: Any) -> None:
        calls[0] += 1
        if fails and calls[0] == 8:
            raise torch.OutOfMemoryError("no room")
        accumulate(self, *args, **settings)

    BandedEncoder.accumulate_statistics = failing  # type: ignore[method-assign]
    try:
        return job(group, *arguments)
    finally:
        BandedEncoder.accumulate_statistics = accumulate  # type: ignore[method-assign]
        assert calls[0] > 8


def test_a_rank_without_memory_repeats_its_pass_and_the_others_wait(ranks: Ranks) -> None:
    each = [(False, *rows) for rows in shares(IMAGE.double(), SPLITS[2])]
    each[1] = (True, *each[1][1:])
    settings = {"max_memory": "1GB"}
    parts = ranks.run(each, job_out_of_memory_once, FEATURES.double(), None, {}, settings)
    assert_is_the_call(whole(parts, 23))


def job_with_backend(group: Any, backend: str, *arguments: Any) -> tuple[slice, Tensor]:
    """`job` with this pixel encoder; keys are in the dtype that kernels take, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anyup.network.key_dtype", lambda dtype, device: working_dtype(dtype))
        return job(group, *arguments, None, {"backend": {"pixel_encoder": backend}})


@INTERPRETED
@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_card")
def test_a_rank_with_kernels_and_one_without_share_their_statistics(ranks: Ranks) -> None:
    each = [(name, *rows) for name, rows in zip(("triton", "torch"), shares(IMAGE, SPLITS[2]), strict=True)]
    assert_is_the_call(whole(ranks.run(each, job_with_backend, FEATURES), 23))


def test_merging_asks_no_device_for_a_number() -> None:
    """A number asked for would wait for a GPU; on the device "meta" there is none, and asking raises."""
    meta = torch.device("meta")
    stub: Any = SimpleNamespace(gather=lambda tensor, what: [torch.empty_like(tensor) for _ in range(3)])
    rows = [slice(0, 8), slice(8, 16), slice(16, 23)]
    share = RankShare(
        first_row=8, image_height=23, rows=rows[1], output_rows=rows[1],
        ranks=stub, all_rows=rows, size=(23, 17), device=meta,
    )  # fmt: skip
    numbers = torch.empty(2, 32, dtype=torch.float64, device=meta)
    for own in (Statistics(8 * 17, *numbers), None):
        joined = share.join(own)
        assert (joined.count, joined.mean.shape, joined.mean.device) == (23 * 17, (8,), meta)
    cells = Cells(0, 6, 6, 23).touching(rows[1])
    part = torch.empty(len(cells), 5, 32, device=meta)
    assert share.join_cells(part, cells, 6).shape == (6, 5, 32)


BAD = {
    "image: expected rows of one image": {"image": wave((1, 3, 4, 16), 1)},
    "image: expected 3 channels": {"image": wave((1, 2, 4, 17), 1)},
    "image: expected a floating-point tensor": {"image": torch.zeros(1, 3, 4, 17, dtype=torch.uint8)},
    "image: expected a tensor or None, got str": {"image": "photo.png"},
    "features: expected \\(1, 9, 6, 5\\) of torch.float32, as on rank 0": {"features": wave((1, 9, 5, 6), 1)},
    "values: expected None, as on rank 0": {"values": wave((1, 2, 6, 5), 1)},
    "output_size: expected that of rank 0": {"output_size": (12, 13)},
    "output_size: expected positive integers": {"output_size": (0, 4)},
    "dtype: expected that of rank 0": {"dtype": torch.float64},
    "dtype: expected a floating-point dtype of 16, 32 or 64 bits, got 'float16'": {"dtype": "float16"},
    "upsampler: the hash of its weights": {"weight": 1.0},
    "upsampler: its settings": {"ratio": 0.2},
    "upsample does not differentiate": {"gradient": True},
    "max_memory: expected bytes": {"max_memory": "a lot"},
    "max_memory: expected more than the .* bytes of this rank's part of the result": {"max_memory": 12},
    "this call cannot be done in": {"max_memory": "1MB"},
    "tile: .*0": {"tile": 0},
    "out: expected shape": {"out": np.zeros((1, 9, 3, 3), np.float32)},
}


def bad_job(group: Any, image: Tensor | None, given: dict[str, Any]) -> None:
    given = {"image": image, "features": FEATURES, **given}
    model, gradient = upsampler(window_ratio=given.pop("ratio", 0.1)), given.pop("gradient", False)
    with torch.no_grad():
        model.rope.freqs += given.pop("weight", 0.0)

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("something large was sent")

    call = anyup.distributed.upsample if given.keys().isdisjoint(("tile", "out")) else anyup.distributed.stream
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(gradient):
        patch.setattr("anyup.ranks.Ranks.rows", work)
        call(model, group=group, **given)


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_of_one_rank_is_an_error_on_every_rank_and_nothing_is_sent(ranks: Ranks, message: str) -> None:
    first, second = shares(IMAGE, SPLITS[2])
    found = ranks.run([(*first, {}), (*second, BAD[message])], bad_job)
    for error in found:
        assert isinstance(error, RankError)
        assert re.search(message, error.args[1]), error
    assert ("rank 1" in found[0].args[1]) or ("rank 0" in found[0].args[1])


@pytest.mark.parametrize("name", ["image", "features"])
def test_what_no_rank_has_is_an_error(ranks: Ranks, name: str) -> None:
    for error in ranks.run([(None if name == "image" else IMAGE, {name: None}), (None, {name: None})], bad_job):
        assert error.args[0] == "ValueError"
        assert error.args[1].startswith(f"{name}: expected")


def test_without_a_group_of_processes_the_error_says_how_to_start_one() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        anyup.distributed.upsample(upsampler(), IMAGE, FEATURES)
    with pytest.raises(TypeError, match="upsampler: expected an AnyUp, got Linear"):
        anyup.distributed.upsample(torch.nn.Linear(1, 1), IMAGE, FEATURES)  # type: ignore[arg-type]


def job_to_file(group: Any, image: Tensor | None, path: Path, chunk: int) -> list[slice]:
    """On each rank: the rows of its pieces, which are also in the array on the disk."""
    prediction.BAND_PIXELS = 5 * 17
    if path.suffix == ".zarr":
        zarr = pytest.importorskip("zarr")
        shape = {"shape": (1, 9, 23, 17), "chunks": (1, 9, chunk, 17), "dtype": "float32"}
        if image is not None:
            zarr.open_array(str(path), mode="w", **shape)
        torch.distributed.barrier(group)
        out = zarr.open_array(str(path), mode="r+")
    else:
        out = np.load(path, mmap_mode="r+")
    with torch.inference_mode():
        pieces = anyup.distributed.stream(upsampler(), image, FEATURES, group=group, out=out)
        return [rows for rows, _, _ in pieces]


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_all_ranks_write_one_array(ranks: Ranks, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    if suffix == ".npy":
        np.lib.format.open_memmap(path, "w+", dtype="float32", shape=(1, 9, 23, 17)).flush()
    found = ranks.run(first_only(3, IMAGE), job_to_file, path, 4)
    written = np.load(path) if suffix == ".npy" else pytest.importorskip("zarr").open_array(str(path))[...]
    assert_is_the_call(torch.from_numpy(written))
    assert [rows.stop for pieces in found for rows in pieces][-1] == 23
    if suffix == ".zarr":
        assert [pieces[0].start for pieces in found] == [0, 8, 16], "no two ranks write one chunk"


DIES = """
import os, sys
import test_distributed as cases
from anyup.ranks import Ranks
gather, calls = Ranks.gather, []
def dying(self, tensor, what):
    calls.append(what)
    if self.rank == 1 and len(calls) == 6:
        os._exit(9)
    return gather(self, tensor, what)
Ranks.gather = dying
cases.job(None, cases.IMAGE if dist.get_rank() == 0 else None, cases.FEATURES)
"""


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end_with_an_error(tmp_path: Path) -> None:
    processes = [start(DIES, tmp_path, rank, 2) for rank in (0, 1)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 9], errors
    expected = "RuntimeError: rank 0 of 2: another rank ended, or did not answer within the group's timeout, while"
    assert f"{expected} merging statistics" in errors[0]
