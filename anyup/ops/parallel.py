"""Running the tiles of an operation side by side on a CPU.

Torch splits each small operation of a tile over its threads, which then wait for each other before the next one. Here
each worker thread takes whole tiles and runs them with its share of the threads: nobody waits for anybody. It is
faster on an idle machine and much faster on a busy one, where each wait may last until the other thread is
scheduled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import TypeVar

import torch

from anyup.ops.memory import keep_freed_memory

Tile = TypeVar("Tile")
Result = TypeVar("Result")

# More workers than this would wait for Python's interpreter lock; beyond it, each gets several threads.
_MOST_WORKERS = 8

# Elements of a map: steps over fewer are too short for several threads to share.
_FEW = 2**17

# The system's numbers of the workers that ended last: a little of a thread goes on after Python has joined it.
_ended: deque[int] = deque(maxlen=64)
_LONGEST_END = 1.0  # seconds, for a number that another thread has by now


def even_slices(length: int, most: int, device: torch.device, multiple: int = 1) -> list[slice]:
    """Slices of about one size that cover `length`, none longer than `most`, as many for each worker as for another.

    All but the last are as long as some multiple of `multiple`.
    """
    if multiple > 1:
        units = even_slices(-(-length // multiple), max(1, most // multiple), device)
        return [slice(unit.start * multiple, min(unit.stop * multiple, length)) for unit in units]
    if not length:
        return []
    workers = _workers(device)
    count = -(-length // most)
    if count > 1:
        count = min(-(-count // workers) * workers, length)
    bounds = [index * length // count for index in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many threads for what the calling thread has torch do; as many as ever where that cannot be set.

    `torch.set_num_threads` would set the number of each thread that is born later, too.
    """
    before = torch.get_num_threads()  # asked for first: torch sets the number of a new thread when it needs it
    runtime = _runtime()
    if runtime is None or count == before:
        yield
        return
    numbers = runtime.set(count, count)
    try:
        yield
    finally:
        runtime.set(*numbers)


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """For small work, and between two calls of `map_tiles`: torch's own threads, once woken, spin while tiles run."""
    with on_threads(1):
        yield


def on_threads_for(elements: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """One thread, or as many as ever, by the elements of the largest map that is worked on."""
    return on_one_thread() if device.type == "cpu" and elements <= _FEW else contextlib.nullcontext()


def map_tiles(function: Callable[[Tile], Result], tiles: Sequence[Tile], device: torch.device) -> list[Result]:
    """`[function(tile) for tile in tiles]`, on worker threads where `device` is a CPU with threads to share.

    The function must not differentiate, and must touch no memory that another tile's call touches. Each call starts
    its own threads, so nothing idles between calls and a process may fork.
    """
    if device.type == "cpu":
        keep_freed_memory()
    workers = min(_workers(device), len(tiles))
    if workers <= 1:
        return [function(tile) for tile in tiles]
    runtime = _runtime()
    assert runtime is not None
    results: list[Result | None] = [None] * len(tiles)
    errors: list[BaseException] = []
    queue = iter(range(len(tiles)))
    lock = threading.Lock()
    inference = torch.is_inference_mode_enabled()
    share = torch.get_num_threads() // workers

    def work() -> None:
        try:
            with on_threads(share), torch.inference_mode(inference), torch.no_grad():
                while not errors:
                    with lock:
                        index = next(queue, None)
                    if index is None:
                        return
                    results[index] = function(tiles[index])
        except BaseException as error:
            errors.append(error)
        finally:
            runtime.end_helpers()
            _ended.append(threading.get_native_id())

    pool = [threading.Thread(target=work, name=f"anyup-tiles-{n}", daemon=True) for n in range(workers)]
    for thread in pool:
        thread.start()
    try:
        for thread in pool:
            thread.join()
    except BaseException as error:  # an interrupt: let the workers end before their memory goes
        errors.append(error)
        for thread in pool:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


def workers_of(threads: int) -> int:
    """Workers that each take tiles, of so many threads of a CPU."""
    return max(1, min(threads, _MOST_WORKERS))


def _workers(device: torch.device) -> int:
    """One where each would use as many threads as all of them together should."""
    return workers_of(torch.get_num_threads()) if device.type == "cpu" and _runtime() else 1


class _Runtime:
    """What the threads of torch's operations come from: OpenMP, and MKL's own number of them.

    Raises AttributeError where a number cannot be set.
    """

    def __init__(self, openmp: ctypes.CDLL, torch_library: ctypes.CDLL) -> None:
        self._set_openmp = openmp.omp_set_num_threads
        # Of products it is this that counts, once torch has set it.
        self._set_mkl = torch_library.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else None
        self._pause = getattr(openmp, "omp_pause_resource_all", None)

    def set(self, openmp: int, mkl: int) -> tuple[int, int]:
        """Set the numbers of the calling thread, and of no other; returns those before."""
        before = torch.get_num_threads()
        self._set_openmp(openmp)
        return before, self._set_mkl(mkl) if self._set_mkl else mkl

    def end_helpers(self) -> None:
        """End the threads that work for the calling thread; they come back when they are needed."""
        if self._pause:
            soft = 1
            self._pause(soft)

    def is_obeyed(self) -> bool:
        """Whether torch has as many threads as are set in the thread that sets them, and as many as ever in another."""
        before = torch.get_num_threads()
        found = []

        def work() -> None:
            self.set(before + 1, before + 1)
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found == [before + 1] and torch.get_num_threads() == before


@lru_cache(maxsize=1)
def _runtime() -> _Runtime | None:
    """Of this process; None where nothing is found that torch obeys."""
    if os.name == "nt":
        return None
    torch_library = ctypes.CDLL(torch._C.__file__)
    for openmp in (ctypes.CDLL(None), torch_library):  # one loaded for all goes before that which torch was built with
        try:
            runtime = _Runtime(openmp, torch_library)
        except AttributeError:
            continue
        if runtime.is_obeyed():
            os.register_at_fork(before=partial(_end_threads, runtime))
            return runtime
    return None


def _end_threads(runtime: _Runtime) -> None:
    """Before a fork: GNU's OpenMP waits in the child for helpers, which it has not; MKL for a lock of one that ends."""
    runtime.end_helpers()
    deadline = time.monotonic() + _LONGEST_END
    while _ended and time.monotonic() < deadline:
        if os.path.exists(f"/proc/self/task/{_ended[0]}"):
            time.sleep(1e-4)
        else:
            _ended.popleft()
    _ended.clear()
