"""Tiles on worker threads."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.patience import PATIENCE
from torch import Tensor, nn

import anyup
from anyup.ops import parallel
from anyup.ops.parallel import even_slices, map_tiles, on_one_thread, on_threads_for, tile_threads

CPU = torch.device("cpu")

can_set = pytest.mark.skipif(parallel._runtime() is None, reason="torch obeys no number of threads of one thread alone")
can_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or sys.platform != "linux", reason="forks of Linux"
)


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


@can_set
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


_SECONDS = 2.0


def _call_at_random(seconds: float, seed: int) -> None:
    """Calls, streams and gradients of small models, by one thread among others."""
    rng = random.Random(seed)
    model = anyup.AnyUp(qk_dim=16, num_heads=2, lfu_dim=8).eval()
    before = torch.get_num_threads()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        side = rng.choice([9, 40, 97])  # of few pixels, of one tile, of several
        image, features = torch.randn(1, 3, side, side), torch.randn(1, 5, 4, 4)
        match rng.randrange(5):
            case 0:
                model(image, features).sum().backward()
            case 1:
                with torch.no_grad():
                    model(model.encode_image(image), features)
            case 2:
                with torch.inference_mode():
                    list(model.stream(image, features, tile=8))
            case 3:
                with pytest.raises(LookupError), torch.no_grad():
                    map_tiles(lambda n: {}[n], range(9), CPU)
            case _:
                with torch.no_grad():
                    model(image, features)
        assert torch.get_num_threads() == before


def test_no_call_changes_the_number_of_threads_that_another_thread_sees(threads: None) -> None:
    torch.set_num_threads(3)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(_call_at_random, _SECONDS, seed) for seed in range(8)]
        seen = set()
        while not all(call.done() for call in calls):
            with ThreadPoolExecutor(1) as young:
                seen |= {torch.get_num_threads(), young.submit(torch.get_num_threads).result()}
        for call in calls:
            call.result()
    assert seen == {3}


@can_set
def test_a_workers_number_is_its_share_in_openmp_and_in_mkl(threads: None) -> None:
    torch.set_num_threads(20)

    def numbers(n: int) -> list[int]:
        told = torch.__config__.parallel_info()
        return [
            int(line.rsplit(":")[-1])
            for line in told.splitlines()
            if "max_threads" in line or "get_num_threads" in line
        ]

    for found in map_tiles(numbers, range(8), CPU):
        assert found and set(found) == {2}


def test_where_no_number_can_be_set_for_a_thread_alone_the_tiles_run_in_the_caller(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(parallel, "_runtime", lambda: None)
    with on_one_thread():
        assert torch.get_num_threads() == 4
    assert set(map_tiles(lambda n: threading.current_thread(), range(8), CPU)) == {threading.current_thread()}


class _Deaf:
    """A library that torch does not listen to."""

    def omp_set_num_threads(self, number: int) -> None:
        pass

    MKL_Set_Num_Threads_Local = omp_set_num_threads


def test_a_runtime_that_torch_does_not_listen_to_is_not_taken() -> None:
    deaf: Any = _Deaf()
    assert not parallel._Runtime(deaf, deaf).is_obeyed()


def _in_process_of_its_own(code: str) -> list[str]:
    code = f"import os, signal, torch, anyup\nPATIENCE = {int(PATIENCE / 4)}\ntorch.set_num_threads(4)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@can_set
@can_fork
def test_loading_and_calls_leave_no_threads_behind() -> None:
    counts = _in_process_of_its_own(
        """
image, features = torch.randn(1, 3, 28, 28), torch.randn(1, 384, 2, 2)
def threads(): print(len(os.listdir("/proc/self/task")))
threads()
upsampler = anyup.load()
threads()
with torch.inference_mode():
    upsampler(image, features)
    upsampler(torch.randn(1, 3, 112, 112), torch.randn(1, 384, 8, 8))
    upsampler.encode_image(image, grids=[(2, 2)])
    list(upsampler.stream(image, features))
threads()
torch.randn(512, 512) @ torch.randn(512, 512)
threads()
"""
    )
    assert counts[0] == counts[1] == counts[2] != counts[3]


_FORKS = {
    "os.fork": """
def check():
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        call()
        os._exit(0)
    print(os.waitpid(child, 0)[1])
""",
    "multiprocessing": """
import multiprocessing
def check():
    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    child.join(PATIENCE)
    print(child.exitcode)
    child.kill()
""",
}


@pytest.mark.slow
@can_fork
@pytest.mark.parametrize("how", _FORKS)
def test_a_child_of_a_process_that_loaded_or_called_does_the_same_work(how: str) -> None:
    code = """
upsampler = anyup.load()
image, features = torch.randn(1, 3, 112, 112), torch.randn(1, 384, 8, 8)
def call():
    with torch.no_grad(): return upsampler(image, features)
FORK
check()
call()
check()
large = torch.randn(512, 512)
large @ large, large.exp()
check()
"""
    assert _in_process_of_its_own(code.replace("FORK", _FORKS[how])) == ["0", "0", "0"]


@can_fork
def test_a_worker_is_gone_when_its_process_forks() -> None:
    code = """
import warnings
from anyup.ops.parallel import map_tiles
warnings.simplefilter("ignore")
a = torch.randn(256, 256)
def call(): map_tiles(lambda n: a @ a, range(8), torch.device("cpu"))
FORK
for _ in range(20):
    call()
    check()
"""
    assert set(_in_process_of_its_own(code.replace("FORK", _FORKS["os.fork"]))) == {"0"}


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


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 4097])
@pytest.mark.parametrize("multiple", [1, 7, 300])
def test_a_config_covers_the_length_in_whole_multiples(length: int, multiple: int, threads: None) -> None:
    tiles = even_slices(length, 64, CPU, multiple)
    assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(length))
    assert all(tile.start % multiple == 0 for tile in tiles)
    assert all(tile.stop - tile.start <= max(64, multiple) for tile in tiles)


@can_set
def test_small_work_between_tiles_wakes_no_thread_and_leaves_their_number_alone(threads: None) -> None:
    before = torch.get_num_threads()
    with on_one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@can_set
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiles_have_all_threads_and_what_lies_between_them_has_one(count: int, threads: None) -> None:
    torch.set_num_threads(count)

    def workers() -> int:
        def slow(n: int) -> str:
            time.sleep(0.02)
            return threading.current_thread().name

        return len(set(map_tiles(slow, range(12), CPU)))

    with on_threads_for(10**9, CPU):
        assert (torch.get_num_threads(), tile_threads(), workers()) == (1, count, count)
        with on_threads_for(1, CPU):
            assert (torch.get_num_threads(), tile_threads(), workers()) == (1, 1, 1)
        assert (torch.get_num_threads(), tile_threads(), workers()) == (1, count, count)
        assert map_tiles(lambda n: tile_threads(), range(4), CPU) == [1] * 4
    assert torch.get_num_threads() == tile_threads() == count


@can_set
def test_what_fits_into_one_slice_is_cut_unless_it_is_small(threads: None) -> None:
    torch.set_num_threads(4)
    numbers = {length: len(even_slices(length, 64, CPU)) for length in (1, 8, 15, 16, 31, 32, 64, 65)}
    assert numbers == {1: 1, 8: 1, 15: 1, 16: 2, 31: 3, 32: 4, 64: 4, 65: 4}
    assert [len(even_slices(length, 4, CPU)) for length in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 4]
