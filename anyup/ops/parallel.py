"""Running the tiles of an operation side by side on a CPU.

Torch splits each small operation of a tile over its threads, which then wait for each other before the next one. Here
each worker thread computes whole tiles with its share of torch's threads, and waits for no other worker. This is faster
on an idle machine, and much faster on a busy one, where each wait may last until the other thread is scheduled.
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

# More workers would wait for Python's interpreter lock. With more threads than this, each worker gets several.
_MOST_WORKERS = 8

# Elements of a map. Work on a smaller map is too short to be split among threads.
_FEW = 2**17


class _TileThreads(threading.local):
    """The threads that tiles of this thread's work share, where there are more than torch uses; None: torch's."""

    count: int | None = None


_tile_threads = _TileThreads()

# Native ids of the workers that ended last: a thread still runs for a moment after Python has joined it.
_ended: deque[int] = deque(maxlen=64)
_LONGEST_END = 1.0  # seconds; a limit, because a new thread may have got the id of an ended one


def even_slices(length: int, most: int, device: torch.device, multiple: int = 1) -> list[slice]:
    """Slices of about equal size that cover `length`, none longer than `most`, in equal number for each worker.

    The length of each slice but the last is a multiple of `multiple`. What fits into one slice is cut too, but not
    into less than an eighth of `most`.
    """
    if multiple > 1:
        units = even_slices(-(-length // multiple), max(1, most // multiple), device)
        return [slice(unit.start * multiple, min(unit.stop * multiple, length)) for unit in units]
    if not length:
        return []
    workers = _workers(device)
    count = min(-(-length // (most * workers)) * workers, length, max(1, 8 * length // most))
    bounds = [index * length // count for index in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def tile_threads() -> int:
    """How many threads tiles of the calling thread's work share."""
    return _tile_threads.count or torch.get_num_threads()


@contextlib.contextmanager
def on_threads(count: int, for_tiles: int | None = None) -> Iterator[None]:
    """Within the block torch uses `count` threads for the calling thread's work, if that can be set.

    Tiles share as many, or `for_tiles`. `torch.set_num_threads` is not used, because it also changes the number for
    every thread that starts later.
    """
    torch.get_num_threads()  # before `set`: this call makes torch initialise the number of a new thread
    runtime = _runtime()
    if runtime is None:
        yield
        return
    numbers, shared = runtime.set(count, count), _tile_threads.count
    _tile_threads.count = for_tiles
    try:
        yield
    finally:
        runtime.set(*numbers)
        _tile_threads.count = shared


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """One thread for small work."""
    with on_threads(1):
        yield


def on_threads_for_tiles() -> contextlib.AbstractContextManager[None]:
    """One thread for what lies between calls of `map_tiles`: torch's threads, once woken, spin while the tiles run."""
    return on_threads(1, tile_threads())


def on_threads_for(elements: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context with one thread if the largest map has few elements, else with the threads for tiles alone."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    return on_one_thread() if elements <= _FEW else on_threads_for_tiles()


def map_tiles(function: Callable[[Tile], Result], tiles: Sequence[Tile], device: torch.device) -> list[Result]:
    """`[function(tile) for tile in tiles]`, on worker threads where `device` is a CPU with threads to share.

    The function must not differentiate, and must touch no memory that another tile's call touches. Each call starts
    and ends its own threads, so that no thread idles between calls and the process may fork.
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
    share = tile_threads() // workers

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
    except BaseException as error:  # an interrupt: the workers must end before their tensors are freed
        errors.append(error)
        for thread in pool:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


def workers_of(threads: int) -> int:
    """The number of workers for a number of CPU threads."""
    return max(1, min(threads, _MOST_WORKERS))


def _workers(device: torch.device) -> int:
    """The number of workers; 1 where the number of threads of one worker cannot be limited."""
    return workers_of(tile_threads()) if device.type == "cpu" and _runtime() else 1


class _Runtime:
    """The libraries that give torch its threads: OpenMP, and MKL, which has a number of its own.

    Raises AttributeError where a library has no function to set the number.
    """

    def __init__(self, openmp: ctypes.CDLL, torch_library: ctypes.CDLL) -> None:
        self._set_openmp = openmp.omp_set_num_threads
        # Once torch has set MKL's own number, products follow it and not OpenMP's.
        self._set_mkl = torch_library.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else None
        self._pause = getattr(openmp, "omp_pause_resource_all", None)

    def set(self, openmp: int, mkl: int) -> tuple[int, int]:
        """Set both numbers for the calling thread alone; return the previous ones."""
        before = torch.get_num_threads()
        self._set_openmp(openmp)
        return before, self._set_mkl(mkl) if self._set_mkl else mkl

    def end_helpers(self) -> None:
        """End the OpenMP threads that help the calling thread; OpenMP starts them again when needed."""
        if self._pause:
            soft = 1
            self._pause(soft)

    def is_obeyed(self) -> bool:
        """Whether `set` changes torch's number of threads in the calling thread and in no other thread."""
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
    """The runtime of this process; None where no library is found whose number torch obeys."""
    if os.name == "nt":
        return None
    torch_library = ctypes.CDLL(torch._C.__file__)
    for openmp in (ctypes.CDLL(None), torch_library):  # a globally loaded library precedes torch's own
        try:
            runtime = _Runtime(openmp, torch_library)
        except AttributeError:
            continue
        if runtime.is_obeyed():
            os.register_at_fork(before=partial(_end_threads, runtime))
            return runtime
    return None


def _end_threads(runtime: _Runtime) -> None:
    """End all helper threads before a fork: in the child OpenMP would wait for them, and MKL for a lock of theirs."""
    runtime.end_helpers()
    deadline = time.monotonic() + _LONGEST_END
    while _ended and time.monotonic() < deadline:
        if os.path.exists(f"/proc/self/task/{_ended[0]}"):
            time.sleep(1e-4)
        else:
            _ended.popleft()
    _ended.clear()
