"""`out=`: where an upsampled map is written."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.allocations import LargestTensor
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.limited_memory import destinations, executor

IMAGE, FEATURES = wave((2, 3, 23, 17), 3, 0.8), wave((2, 9, 6, 5), 7)
SHAPE = (2, 9, 23, 17)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> AnyUp:
    return fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3), 0).eval()


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.limited_memory import prediction

    monkeypatch.setattr(prediction, "BAND_PIXELS", 5 * 17)


def tensor_of(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array[...]))


def file_map(folder: Path, dtype: str = "float32", mode: str = "w+", shape: tuple[int, ...] = SHAPE) -> np.memmap:
    path = folder / "map.npy"
    if mode in ("r", "c"):
        np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape).flush()
        return np.load(path, mmap_mode=mode)
    return np.lib.format.open_memmap(path, mode, dtype=dtype, shape=shape)


def make(kind: str, folder: Path) -> Any:
    if kind == "tensor":
        return torch.full(SHAPE, torch.nan)
    if kind == "part of a tensor":
        return torch.full((2, 12, 30, 40), torch.nan)[:, 3:, 4:27, 20:37]
    if kind == "array":
        return np.full(SHAPE, np.nan, np.float32)
    if kind == "memory map":
        return file_map(folder)
    zarr = pytest.importorskip("zarr")
    return zarr.create_array(store=str(folder / "out.zarr"), shape=SHAPE, chunks=(1, 4, 4, 8), dtype="float32")


KINDS = ("tensor", "part of a tensor", "array", "memory map", "zarr array")


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_writes_what_it_returns_otherwise(kind: str, model: AnyUp, tmp_path: Path) -> None:
    out = make(kind, tmp_path)
    with torch.no_grad():
        assert model(IMAGE, FEATURES, out=out) is out
        torch.testing.assert_close(tensor_of(out), model(IMAGE, FEATURES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_writes_its_pieces(kind: str, model: AnyUp, tmp_path: Path) -> None:
    out = make(kind, tmp_path)
    with torch.no_grad():
        for rows, columns, piece in model.stream(IMAGE, FEATURES, out=out, tile=(4, 7)):
            assert torch.equal(tensor_of(out)[:, :, rows, columns], piece)
        torch.testing.assert_close(tensor_of(out), model(IMAGE, FEATURES), rtol=1e-5, atol=1e-5)


def test_a_region_is_written_into_an_array_of_its_size(model: AnyUp) -> None:
    out = np.full((2, 9, 6, 7), np.nan, np.float32)
    with torch.no_grad():
        for _ in model.stream(IMAGE, FEATURES, region=(9, 4, 6, 7), out=out):
            pass
        torch.testing.assert_close(
            torch.from_numpy(out), model(IMAGE, FEATURES)[:, :, 9:15, 4:11], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_take_the_dtype_of_out(dtype: torch.dtype, model: AnyUp) -> None:
    out = torch.empty(SHAPE, dtype=dtype)
    with torch.no_grad():
        model(IMAGE, FEATURES, out=out)
        torch.testing.assert_close(out, model(IMAGE, FEATURES).to(dtype), rtol=1e-2, atol=1e-3)


def test_a_file_that_is_mapped_holds_the_result(model: AnyUp, tmp_path: Path) -> None:
    with torch.no_grad():
        model(IMAGE, FEATURES, out=file_map(tmp_path, "float16"))
        expected = model(IMAGE, FEATURES).half()
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "map.npy")), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's list of resident pages")
def test_pages_of_a_map_are_let_go_after_each_piece(
    model: AnyUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = []
    write = destinations.MemoryMap.write

    def watched(self: destinations.MemoryMap, *piece: Any) -> None:
        write(self, *piece)
        let_go.append(resident())

    monkeypatch.setattr(destinations.MemoryMap, "write", watched)
    # Large enough that a piece is many pages.
    wide = file_map(tmp_path, shape=(1, 900, 60, 64))
    with torch.no_grad():
        model(wave((1, 3, 60, 64), 3, 0.8), wave((1, 900, 6, 5), 7), out=wide)
    assert len(let_go) > 5
    assert max(let_go) <= 64 * 1024


def resident() -> int:
    """Bytes of map.npy that count as resident."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counts = line.endswith("map.npy")
        elif counts and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_no_whole_map_of_the_output_is_made(model: AnyUp) -> None:
    image, features = wave((1, 3, 60, 64), 3, 0.8), wave((1, 300, 6, 5), 7)
    out = torch.empty(1, 300, 60, 64)
    with torch.no_grad(), LargestTensor() as seen:
        model(image, features, out=out)
    assert seen.largest < out.numel() / 4


def test_rows_of_pieces_are_whole_chunks(model: AnyUp) -> None:
    class Chunks:
        shape, dtype, chunks = SHAPE, np.dtype("float32"), (1, 9, 2, 17)

        def __init__(self) -> None:
            self.taken: list[tuple[slice, ...]] = []

        def __setitem__(self, where: tuple[slice, ...], piece: Any) -> None:
            self.taken.append(where)
            assert piece.shape[2] == where[2].stop - where[2].start

    out = Chunks()
    with torch.no_grad():
        model(IMAGE, FEATURES, out=out)
    starts = [where[2].start for where in out.taken]
    assert len(starts) > 3 and all(start % 2 == 0 for start in starts)


class Clock:
    """Events of a card that happen when they are waited for."""

    def __init__(self) -> None:
        self.waiting: list[Event] = []

    def event(self, device: torch.device) -> Event:
        assert device == torch.device("cpu")
        self.waiting.append(Event(self))
        return self.waiting[-1]


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.happened = clock, False

    def synchronize(self) -> None:
        self.happened = True
        self.clock.waiting.remove(self)


def test_a_piece_of_a_card_is_handed_on_while_the_next_is_on_its_way() -> None:
    clock, out = Clock(), torch.full((1, 2, 10, 3), torch.nan)
    made: list[int] = []

    def buffer(size: int, dtype: torch.dtype) -> Tensor:
        made.append(size)
        return torch.empty(size, dtype=dtype)

    target = destinations._Pinned(destinations._Memory(out), buffer, clock.event)
    pieces = torch.randn(1, 2, 10, 3)
    arrived = []
    for first, last in ((0, 4), (4, 7), (7, 10)):
        target.write(slice(first, last), slice(0, 3), pieces[:, :, first:last])
        arrived.append(int(out[0, 0, :, 0].isfinite().sum()))
    assert arrived == [0, 0, 4] and len(clock.waiting) == 2
    target.finish()
    assert torch.equal(out, pieces) and not clock.waiting
    assert made == [24, 18]


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ([1.0], TypeError, r"out: expected a tensor, a NumPy or a zarr array, got list"),
        (torch.empty(2, 9, 23, 18), ValueError, r"out: expected shape \(2, 9, 23, 17\).*got \(2, 9, 23, 18\)"),
        (np.empty((9, 23, 17), np.float32), ValueError, r"out: expected shape .* got \(9, 23, 17\)"),
        (torch.empty(SHAPE, dtype=torch.int32), TypeError, r"out: expected a floating-point tensor .* got torch.int32"),
        (np.empty(SHAPE, np.int16), TypeError, r"out: expected floating-point numbers .* got int16"),
        (np.empty(SHAPE, ">f4"), TypeError, r"out: expected floating-point numbers .* got >f4"),
        (torch.empty(SHAPE, device="meta"), ValueError, r"out: expected a tensor with memory"),
        (torch.empty(SHAPE, requires_grad=True), ValueError, r"out: expected a tensor that needs no gradient"),
        (np.broadcast_to(np.float32(0), SHAPE), ValueError, r"out: .*read-only"),
        (np.empty(SHAPE, np.float32)[:, :, ::-1], ValueError, r"out: .*strides"),
    ],
)
def test_a_wrong_out_is_named_before_any_work(
    out: Any, error: type[Exception], message: str, model: AnyUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "Executor", None)
    with torch.no_grad(), pytest.raises(error, match=message):
        model(IMAGE, FEATURES, out=out)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize(("mode", "message"), [("r", "read-only"), ("c", "mode 'c'")])
def test_a_map_that_does_not_reach_its_file_is_refused(
    mode: str, message: str, view: bool, model: AnyUp, tmp_path: Path
) -> None:
    out = file_map(tmp_path, mode=mode)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(IMAGE, FEATURES, out=np.asarray(out)[:] if view else out)


def test_pages_of_a_private_map_keep_what_was_written(model: AnyUp, tmp_path: Path) -> None:
    file_map(tmp_path).flush()
    with (tmp_path / "map.npy").open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    out = np.frombuffer(private, np.float32, offset=128).reshape(SHAPE)
    with torch.no_grad():
        model(IMAGE, FEATURES, out=out)
        torch.testing.assert_close(torch.from_numpy(out), model(IMAGE, FEATURES), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.name != "posix", reason="a file that is open cannot be deleted")
def test_a_map_whose_file_has_lost_its_name_is_written(model: AnyUp, tmp_path: Path) -> None:
    out = file_map(tmp_path)
    (tmp_path / "map.npy").unlink()
    with torch.no_grad():
        assert model(IMAGE, FEATURES, out=out) is out
    assert np.isfinite(out).all() and out.any()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's list of resident pages")
def test_pages_are_let_go_through_a_view_too(model: AnyUp, tmp_path: Path) -> None:
    out = file_map(tmp_path)
    with torch.no_grad():
        model(IMAGE, FEATURES, out=np.asarray(out)[...])
    assert resident() == 0 and out.any()


def test_a_gradient_into_out_is_refused(model: AnyUp) -> None:
    with pytest.raises(RuntimeError, match="out does not differentiate"):
        model(IMAGE, FEATURES, out=torch.empty(SHAPE))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_map_on_a_full_disk_is_refused_before_any_work(
    model: AnyUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = file_map(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(executor, "Executor", None)
    with torch.no_grad(), pytest.raises(OSError, match=r"\d+ kB needed, .* free: No space left.*map\.npy"):
        model(IMAGE, FEATURES, out=out)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_file_with_holes_gets_its_blocks_first(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    before = path.stat().st_blocks
    destinations.reserve(path)
    assert before * 512 < 1 << 20 <= path.stat().st_blocks * 512


def test_memory_of_what_is_still_read_is_refused(model: AnyUp) -> None:
    image, square, values = IMAGE, wave((2, 3, 23, 17), 5), wave((2, 4, 6, 5), 5)
    for name, arguments in {
        "image": {"image": image, "features": FEATURES[:, :3], "out": image},
        "features": {"image": image, "features": square, "out": square},
        "values": {"features": FEATURES, "output_size": (6, 5), "values": values, "out": values.numpy()},
    }.items():
        with torch.no_grad(), pytest.raises(ValueError, match=f"out: shares memory with {name}, which is read"):
            model(**{"image": image, **arguments})


def test_neighbours_in_one_block_of_memory_are_apart(model: AnyUp) -> None:
    block = torch.zeros(4, *SHAPE[1:])
    features = block[:2, :, :6, :5].copy_(FEATURES)
    with torch.no_grad():
        model(IMAGE, features, out=block[2:])
        torch.testing.assert_close(block[2:], model(IMAGE, FEATURES), rtol=1e-5, atol=1e-5)


def test_channels_between_those_of_another_map_are_apart(model: AnyUp) -> None:
    """Of a batch in one block: their extents overlap, and they have no number in common."""
    batch, channels, height, width = SHAPE
    block = torch.zeros(batch, channels + 3, height, width)
    image, out = block[:, channels:].copy_(IMAGE), block[:, :channels]
    with torch.no_grad():
        model(image, FEATURES, out=out)
        torch.testing.assert_close(out, model(IMAGE, FEATURES), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="out: shares memory with image"):
            model(block[:, channels - 1 : channels + 2], FEATURES, out=out)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda: torch.empty(1, 1, *SHAPE[2:]).expand(SHAPE), ValueError, "out: expected a place for each number"),
        (
            lambda: torch.empty(SHAPE).to_sparse(),
            TypeError,
            "out: expected a dense tensor, got one of torch.sparse_coo",
        ),
        (lambda: torch.inference_mode()(torch.empty)(SHAPE), ValueError, r"out: .*within torch.inference_mode\(\)"),
    ],
)
def test_a_tensor_that_cannot_be_written_to_is_refused_before_any_work(
    out: Any, error: type[Exception], message: str, model: AnyUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.Executor, "prepare", None)
    with torch.no_grad(), pytest.raises(error, match=message):
        model(IMAGE, FEATURES, out=out())
