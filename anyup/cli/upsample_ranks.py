"""The run of `anyup upsample --split-over-ranks`: one photograph over the processes that torchrun started.

Process 0 reads the photograph and runs the encoder. It begins the result's file, into which each process writes its
rows, and gives it its name when all are done.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from anyup.cli.upsample_inputs import guidance, load_model, read_inputs
from anyup.cli.upsample_result import Files, checked_numbers, in_words
from anyup.options import PrintedElsewhere, UsageError
from anyup.progress import Progress

if TYPE_CHECKING:
    import torch


def run(arguments: argparse.Namespace, files: Files) -> None:
    """Run the command in one of the processes; process 0 prints the path, the progress and what fails in all."""
    if "LOCAL_RANK" not in os.environ:
        raise UsageError("--split-over-ranks goes with torchrun: torchrun --nproc-per-node N -m anyup upsample ...")
    import torch
    import torch.distributed as dist

    from anyup.devices import choose_device
    from anyup.ranks import is_of_every_rank

    device = choose_device(arguments.device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        _upsample(arguments, files, device)
    except Exception as error:
        if dist.get_rank() and is_of_every_rank(error):
            raise PrintedElsewhere from error
        raise
    finally:  # threads of the group may not survive the interpreter's end
        dist.destroy_process_group()


def _upsample(arguments: argparse.Namespace, files: Files, device: torch.device) -> None:
    import torch

    from anyup import array_files, distributed
    from anyup.ranks import Ranks

    ranks = Ranks(None, device)
    first = ranks.rank == 0
    output = files.output
    assert output is not None
    with ExitStack() as stack:
        progress = Progress() if first else Progress(stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
        begun = array_files.begun(output, resume=False, report=progress.note)
        ranks.each(lambda: stack.enter_context(begun) if first else None)
        given = ranks.each(lambda: read_inputs(arguments, files, device, progress) if first else None)
        model = ranks.each(lambda: load_model(arguments, device, progress) if given is None else given.model)
        image = features = values = None
        if given is not None:
            image = guidance(given.photo, given.whole, progress).to(device)
            features = given.features.to(device)
            values = None if given.values is None else given.values.to(device)

        def describe() -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype, str] | None:
            if given is None:
                return None
            low = given.features if given.values is None else given.values
            dtype, whole = files.fitting(arguments.dtype, low), given.whole
            return whole, (low.shape[1], *whole), dtype, f"{in_words(low, whole, device)}, on {ranks.count} ranks"

        described = ranks.all_of(describe)[0]
        assert described is not None
        whole, shape, dtype, what = described
        rows = distributed.rows_of(whole[0], ranks.count, 0).stop
        partial = ranks.each(lambda: array_files.PartialArray(output, shape, dtype, {}, rows) if first else None)
        try:
            out = ranks.each(lambda: array_files.partial_array(output) if partial is None else partial.out)
            with torch.inference_mode(), progress.stage(what) as share:
                pieces = distributed.stream(
                    model, image, features, whole, values=values, max_memory=arguments.max_memory, dtype=dtype, out=out
                )
                for number in checked_numbers(pieces, 1):
                    share(number / len(pieces))
                ranks.each(lambda: None)  # the other ranks have their rows written too
        except BaseException:
            if partial is not None:
                partial.discard()
            raise
        if partial is not None:
            partial.complete()
            print(output)
        ranks.each(lambda: None)  # no process ends before the file has its name
