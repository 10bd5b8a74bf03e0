"""The command `anyup evaluate`: from what was typed to results. Torch is imported when a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyup.evaluation.arguments import PUBLISHED_CROP, PUBLISHED_VIEW, PUBLISHED_WIDTH, checkpoint_of
from anyup.options import UsageError, check_output, naming_the_options
from anyup.run_lock import folder_for, only_run

if TYPE_CHECKING:
    import torch

    from anyup.encoders import Encoder
    from anyup.evaluation.cache import TensorCache
    from anyup.evaluation.datasets import Labels, Layout
    from anyup.evaluation.probe import Recipe
    from anyup.evaluation.probing import Evaluation
    from anyup.evaluation.upsamplers import Upsampler
    from anyup.reporting import Reporter


def run(arguments: argparse.Namespace) -> None:
    """Do what was typed; results on stdout and in files, progress on stderr."""
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        for folder in (arguments.cache, arguments.output if arguments.evaluation == "pictures" else None):
            if folder is not None:
                stack.enter_context(folder_for(folder))
        {"features": _features, "pictures": _pictures}.get(arguments.evaluation, _probes)(arguments)


def _features(arguments: argparse.Namespace) -> None:
    from anyup.evaluation import reconstruction
    from anyup.evaluation.cache import TensorCache
    from anyup.evaluation.report import surroundings, write_json

    output = check_output(arguments.output, (".json",), "results")
    photographs = _held_out(arguments.photographs, arguments.every)
    reporter, device, upsamplers = _start(arguments)
    sides = arguments.sides or [112]
    results: dict[str, Any] = {}
    cache = TensorCache(arguments.cache)
    plans = []
    for name, encoder in zip(arguments.encoder, _load_encoders(arguments.encoder, device), strict=True):
        plans.append((name, encoder, reconstruction.plan(encoder, PUBLISHED_VIEW, PUBLISHED_CROP, sides)))
    for name, encoder, tasks in plans:
        results[name] = reconstruction.run(
            photographs,
            encoder,
            upsamplers,
            tasks=tasks,
            guidance=arguments.guidance,
            cache=cache,
            device=device,
            reporter=reporter,
        )
    write_json(
        output,
        {
            "evaluation": "features",
            "guidance": arguments.guidance,
            "photographs": list(photographs),
            "methods": _describe(upsamplers),
            "made_with": surroundings(device),
            "encoders": results,
        },
    )
    print(reconstruction.as_table(results))
    print(output)


def _pictures(arguments: argparse.Namespace) -> None:
    from anyup.evaluation import pictures
    from anyup.evaluation.report import surroundings, write_json

    photographs = dict(list(_held_out(arguments.photographs, arguments.every).items())[: arguments.count])
    folder = Path(arguments.output)
    reporter, device, upsamplers = _start(arguments)
    encoders = _load_encoders(arguments.encoder, device)
    shown = [upsampler for upsampler in upsamplers if upsampler.name != "nearest"]  # it is the picture of the features
    settings: dict[str, Any] = {"side": arguments.side, "device": device, "reporter": reporter}
    written, left_out = pictures.run(photographs, encoders, shown, folder, **settings)
    results = {
        "evaluation": "pictures",
        "side": arguments.side,
        "methods": _describe(shown),
        "made_with": surroundings(device),
        "pictures": written,
        "left_out": left_out,
    }
    write_json(folder / "index.json", results)
    for entry in written:
        print(folder / entry["picture"])
    if left_out:
        raise ValueError(f"photographs: {len(left_out)} of {len(photographs)} left out: {', '.join(left_out)}")


def _probes(arguments: argparse.Namespace) -> None:
    from anyup.reporting import Reporter

    output = check_output(arguments.output, (".json",), "results")
    checkpoint = check_output(str(checkpoint_of(arguments)), (".pt",), "checkpoint")
    with only_run(checkpoint, Reporter().note):
        try:
            _probe(arguments, output, checkpoint)
        except KeyboardInterrupt:
            if checkpoint.exists():
                Reporter().note(f"{checkpoint}: what is done; --resume goes on")
            raise


def _probe(arguments: argparse.Namespace, output: Path, checkpoint: Path) -> None:
    import dataclasses

    from anyup.evaluation import datasets, probing
    from anyup.evaluation.cache import TensorCache
    from anyup.evaluation.dpt import BLOCKS, FourBlocks
    from anyup.evaluation.report import surroundings, write_json

    if checkpoint.exists() and not arguments.resume:
        raise FileExistsError(
            f"{checkpoint}: left by an earlier run, interrupted or complete; --resume goes on from it (only tests "
            "again where all is trained), deleting it begins anew"
        )
    cache = TensorCache(arguments.cache)
    layout, what, evaluation = _evaluation(arguments, cache)
    with naming_the_options():
        recipe = _recipe(arguments)
    if arguments.attention == "keep" and (arguments.cache is None or recipe.augment):
        beside = "without --augment" if recipe.augment else "with --cache, the folder to keep it in"
        raise UsageError(f"--attention keep: goes {beside}")
    splits = arguments.train_split or layout.train, arguments.test_split or layout.test
    found = [datasets.load_split(arguments.data, layout, split, what)[: arguments.limit] for split in splits]
    wanted, beside = (1, "") if recipe.head == "linear" else (BLOCKS, " with --head dpt, the blocks it sees")
    if len(arguments.encoder) != wanted:
        raise UsageError(f"--encoder: expected {wanted}{beside}, got {len(arguments.encoder)}")
    reporter, device, upsamplers = _start(arguments)
    encoders = _load_encoders(arguments.encoder, device)
    with naming_the_options():
        encoder = encoders[0] if recipe.head == "linear" else FourBlocks(encoders).eval()
        source = probing.Source(
            encoder,
            upsamplers,
            evaluation.task,
            arguments.size,
            cache,
            device,
            encoder_size=arguments.encoder_size,
            class_token=arguments.class_token,
        )
    to_train, to_test = (
        evaluation.check(samples, arguments.size, split, reporter) for samples, split in zip(found, splits, strict=True)
    )
    source.keep_attention = probing.keep_attention(source, to_train, recipe, arguments.attention, reporter)
    seeds = list(range(arguments.seeds))
    probes, history = probing.train(
        source, to_train, recipe, seeds, checkpoint=checkpoint, resume=arguments.resume, reporter=reporter
    )
    results = evaluation.test(source, to_test, probes, reporter)
    write_json(
        output,
        {
            "evaluation": arguments.evaluation,
            "layout": arguments.layout,
            "splits": dict(zip(splits, (len(to_train), len(to_test)), strict=True)),
            **evaluation.task.settings(),
            "encoder": encoder.name,
            "size": source.size,
            "encoder_size": source.encoder_size,
            "class_token": source.class_token,
            "recipe": dataclasses.asdict(recipe),
            "seeds": seeds,
            "methods": _describe(upsamplers),
            "made_with": surroundings(device),
            "results": results,
            "losses": history,
        },
    )
    print(evaluation.table(results, history))
    print(output)


def _evaluation(arguments: argparse.Namespace, cache: TensorCache) -> tuple[Layout[Any], str, Evaluation]:
    """The layout, what its samples are called, and what is done with them."""
    if arguments.evaluation == "segmentation":
        from anyup.evaluation import datasets, segmentation

        labelled = datasets.LAYOUTS[arguments.layout]
        return labelled, "images with masks", segmentation.Evaluation(_labels(arguments, labelled.labels))
    from anyup.evaluation import depth_datasets, regression
    from anyup.evaluation.normals import Camera

    task: regression.Regression
    if arguments.evaluation == "depth":
        largest = 1.0 if arguments.relative_depth else arguments.max_depth
        task = regression.Depth(arguments.bins, largest, arguments.published_gradient, arguments.relative_depth)
    else:
        camera = Camera(*arguments.intrinsics) if arguments.intrinsics else None
        task = regression.Normals(arguments.window, camera, cache)
    return depth_datasets.LAYOUTS[arguments.layout], "images with depth or normals", regression.Evaluation(task)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from anyup.evaluation.probe import Recipe

    if arguments.width and arguments.head == "linear":
        raise UsageError("--width: goes with --head dpt")
    common = {name: getattr(arguments, name) for name in ("learning_rate", "batch", "epochs", "order_seed", "head")}
    common["width"] = (arguments.width or PUBLISHED_WIDTH) if arguments.head == "dpt" else 0
    if arguments.evaluation == "segmentation":
        return Recipe(**common, schedule=arguments.schedule, flips=arguments.flips)
    return Recipe(**common, schedule="warm-up", weight_decay=1e-2, augment=arguments.augment)


def _labels(arguments: argparse.Namespace, known: Labels | None) -> Labels:
    """The layout's labels, or what was typed where the layout has none."""
    from anyup.evaluation.datasets import VOID, make_labels

    typed = {"--classes": arguments.classes, "--first-class": arguments.first_class, "--void": arguments.void}
    if known is not None:
        if given := [name for name, value in typed.items() if value is not None]:
            raise UsageError(f"{given[0]}: not expected, --layout {arguments.layout} knows its own classes")
        return known
    if arguments.classes is None:
        raise UsageError(f"--classes: expected with --layout {arguments.layout}")
    values = arguments.classes
    if len(values) == 1:
        first = arguments.first_class or 0
        values = range(first, first + values[0])
    elif arguments.first_class is not None:
        raise UsageError("--first-class: goes with the number of classes, got their values too")
    if len(values) > VOID:
        raise UsageError(f"--classes: expected at most {VOID}, got {len(values)}")
    void = arguments.void
    if void is None:
        void = sorted({VOID, *range(arguments.first_class or 0)} - set(values))
    return make_labels([str(value) for value in values], void, values)


def _held_out(folder: str, every: int) -> dict[str, Path]:
    """The photographs that training held out, by their path below the folder."""
    from anyup.photographs import find_photographs
    from anyup.training.photographs import split

    paths = find_photographs(folder)
    if every:
        _, held_out = split(paths, every)
        if not held_out:
            raise UsageError(f"--every: expected at least one of each {every} photographs, {folder} has {len(paths)}")
        paths = held_out
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _start(arguments: argparse.Namespace) -> tuple[Reporter, torch.device, list[Upsampler]]:
    from anyup.devices import choose_device
    from anyup.evaluation.upsamplers import make_upsamplers
    from anyup.reporting import Reporter

    device = choose_device(arguments.device)
    with naming_the_options():
        upsamplers = make_upsamplers(
            arguments.weights,
            untrained=arguments.untrained,
            window_ratios=arguments.window_ratios,
            device=device,
            backend=arguments.backend,
        )
    reporter = Reporter()
    if not (arguments.weights or arguments.untrained):
        reporter.note("no --weights: interpolation alone; --weights anyup_mini takes those that come with the package")
    return reporter, device, upsamplers


def _load_encoders(names: Sequence[str], device: torch.device) -> list[Encoder]:
    from anyup.encoders import load_encoder

    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise UsageError(f"--encoder: expected each once, got {', '.join(repeated)} more than once")
    with naming_the_options():
        return [load_encoder(name, device=device) for name in names]


def _describe(upsamplers: Sequence[Upsampler]) -> dict[str, Any]:
    return {upsampler.name: upsampler.describe() for upsampler in upsamplers}
