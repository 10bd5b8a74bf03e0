"""Running the tiles of an operation side by side on a CPU.

Torch splits each small operation of a tile over its threads, which then wait for each other before the next one. Here
each worker thread takes whole tiles and runs them with its share of the threads: nobody waits for anybody. It is
faster on an idle machine and much faster on a busy one, where each wait may last until the other thread is
scheduled again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from anyup.ops.memory import keep_freed_memory

Tile = TypeVar("Tile")
Result = TypeVar("Result")

# More workers than this would wait for Python's interpreter lock; beyond it, each gets several threads.
_MOST_WORKERS = 8


def cut(length: int, most: int, device: torch.device, multiple: int = 1) -> list[slice]:
    """Slices of about one size that cover `length`, none longer than `most`, as many for each worker as for another.

    All but the last are as long as some multiple of `multiple`.
    """
    if multiple > 1:
        units = cut(-(-length // multiple), max(1, most // multiple), device)
        return [slice(unit.start * multiple, min(unit.stop * multiple, length)) for unit in units]
    if not length:
        return []
    workers = min(torch.get_num_threads(), _MOST_WORKERS) if device.type == "cpu" else 1
    count = -(-length // most)
    if count > 1:
        count = min(-(-count // workers) * workers, length)
    bounds = [index * length // count for index in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """For small work between two calls of `map_tiles`: torch's own threads, once woken, spin while the tiles run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_tiles(function: Callable[[Tile], Result], tiles: Sequence[Tile], device: torch.device) -> list[Result]:
    """`[function(tile) for tile in tiles]`, on worker threads where `device` is a CPU with threads to share.

    The function must not differentiate, and must touch no memory that another tile's call touches. Each call starts
    its own threads, so nothing idles between calls and a process may fork.
    """
    if device.type == "cpu":
        keep_freed_memory()
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS, len(tiles)) if device.type == "cpu" else 1
    if workers <= 1:
        return [function(tile) for tile in tiles]
    results: list[Result | None] = [None] * len(tiles)
    errors: list[BaseException] = []
    queue = iter(range(len(tiles)))
    lock = threading.Lock()
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        try:
            torch.set_num_threads(max(1, threads // workers))  # of this thread alone
            with torch.inference_mode(inference), torch.no_grad():
                while not errors:
                    with lock:
                        index = next(queue, None)
                    if index is None:
                        return
                    results[index] = function(tiles[index])
        except BaseException as error:
            errors.append(error)

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
    finally:
        # The number is each thread's own, but torch also keeps the last one set, for threads started from now on.
        torch.set_num_threads(threads)
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
