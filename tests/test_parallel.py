"""Tiles on worker threads."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor, nn

from anyup.ops.parallel import cut, map_tiles, on_one_thread

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 100])
def test_results_come_in_the_order_of_the_tiles(tiles: int, count: int, threads: None) -> None:
    torch.set_num_threads(count)

    def slow_at_first(n: int) -> int:
        time.sleep(0.01 if n == 0 else 0)
        return n * n

    assert map_tiles(slow_at_first, range(tiles), CPU) == [n * n for n in range(tiles)]


@pytest.mark.parametrize("count", [1, 4])
def test_an_error_reaches_the_caller_and_ends_the_work(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    done = []

    def fail(n: int) -> None:
        if n == 3:
            raise LookupError("tile 3")
        time.sleep(0.02)
        done.append(n)

    with pytest.raises(LookupError, match="tile 3"):
        map_tiles(fail, range(1000), CPU)
    assert len(done) < 900
    assert not [t for t in threading.enumerate() if t.name.startswith("anyup")]


def test_no_thread_outlives_a_call(threads: None) -> None:
    torch.set_num_threads(4)
    before = threading.active_count()
    map_tiles(lambda n: torch.ones(10) * n, range(50), CPU)
    assert threading.active_count() == before


def test_tiles_run_side_by_side(threads: None) -> None:
    torch.set_num_threads(2)
    barrier = threading.Barrier(2, timeout=PATIENCE)
    map_tiles(lambda n: barrier.wait(), range(2), CPU)  # each waits for the other


def test_another_device_is_not_given_threads(threads: None) -> None:
    torch.set_num_threads(4)
    names = map_tiles(lambda n: threading.current_thread(), range(8), torch.device("meta"))
    assert set(names) == {threading.current_thread()}


@pytest.mark.parametrize("count", [1, 3])
def test_parameters_that_want_gradients_may_be_used(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    weight = nn.Parameter(torch.ones(4, 4))
    out = torch.zeros(8, 4)

    def go(n: int) -> Tensor:
        out[n] = torch.mm(torch.ones(1, 4), weight, out=torch.empty(1, 4)) if not torch.is_grad_enabled() else 4.0
        return out[n]

    with torch.no_grad():
        map_tiles(go, range(8), CPU)
    assert torch.equal(out, torch.full((8, 4), 4.0)) and not out.requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("count", [1, 3])
def test_results_are_tensors_of_the_caller_s_mode(mode: Any, count: int, threads: None) -> None:
    torch.set_num_threads(count)
    with mode():
        target = torch.zeros(6, 3)

        def go(n: int) -> Tensor:
            target[n] = n  # writing into an inference tensor is allowed in inference mode alone
            return torch.full((3,), float(n))

        results = map_tiles(go, range(6), CPU)
    assert all(r.is_inference() == (mode is torch.inference_mode) for r in results)
    assert torch.equal(target, torch.arange(6.0)[:, None].expand(6, 3))


def test_the_callers_number_of_threads_is_left_alone(threads: None) -> None:
    torch.set_num_threads(4)
    map_tiles(lambda n: n, range(8), CPU)
    assert torch.get_num_threads() == 4


def test_threads_started_later_have_as_many_threads_as_ever(threads: None) -> None:
    torch.set_num_threads(4)
    map_tiles(lambda n: n, range(8), CPU)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_callers_at_once_get_their_own_results(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(6, 20, 64, 64, generator=torch.Generator().manual_seed(1))

    def caller(which: int) -> list[Tensor]:
        return map_tiles(lambda n: inputs[which, n] @ weight, range(20), CPU)

    with ThreadPoolExecutor(6) as pool:
        for which, results in enumerate(pool.map(caller, range(6))):
            torch.testing.assert_close(torch.stack(results), inputs[which] @ weight)


def _in_child(queue: Any) -> None:
    queue.put([t.item() for t in map_tiles(lambda n: torch.ones(1000).sum() * n, range(10), CPU)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_run_tiles_after_its_parent_did(threads: None) -> None:
    torch.set_num_threads(2)
    map_tiles(lambda n: torch.ones(1000).sum() * n, range(10), CPU)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=PATIENCE) == [1000.0 * n for n in range(10)]
        child.join(timeout=PATIENCE)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 4097])
@pytest.mark.parametrize("multiple", [1, 7, 300])
def test_a_cut_covers_the_length_in_whole_multiples(length: int, multiple: int, threads: None) -> None:
    tiles = cut(length, 64, CPU, multiple)
    assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(length))
    assert all(tile.start % multiple == 0 for tile in tiles)
    assert all(tile.stop - tile.start <= max(64, multiple) for tile in tiles)


def test_small_work_between_tiles_wakes_no_thread_and_leaves_their_number_alone(threads: None) -> None:
    before = torch.get_num_threads()
    with on_one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
