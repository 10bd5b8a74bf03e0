"""The inputs of `anyup upsample`: the weights, the features, the head, the photograph as guidance."""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyup.options import UsageError, naming_the_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyup.cli.upsample_result import Files
    from anyup.encoders import Encoder
    from anyup.model import AnyUp
    from anyup.progress import Progress

ENCODER_LONGER_SIDE = 448
"""The default of --encoder-size: the longer side, in pixels, of the photograph that the encoder sees."""


@dataclass(frozen=True)
class Inputs:
    """What the options of one photograph ask for.

    Attributes:
        model: the upsampler.
        photo: (1, 3, H, W) in 0..1.
        features: (1, C, h, w).
        values: (1, Cv, h, w), what is upsampled instead of the features; or None.
        whole: (height, width) of the whole result.
        region: (top, left, height, width) of it that is computed.
        points: (1, N, 2), the pixels of it that are computed; or None.
    """

    model: AnyUp
    photo: Tensor
    features: Tensor
    values: Tensor | None
    whole: tuple[int, int]
    region: tuple[int, int, int, int]
    points: Tensor | None

    def asked(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """What, beside the features and the values, a resumed run must agree in with the interrupted one."""
        from anyup.fingerprint import file_fingerprint, module_fingerprint

        return {
            "photograph": file_fingerprint(arguments.photo),
            "weights": module_fingerprint(self.model),
            "size": list(self.whole),
            "region": list(self.region),
        }


def read_inputs(arguments: argparse.Namespace, files: Files, device: torch.device, progress: Progress) -> Inputs:
    """Read the files, load the weights and run the encoder; each is checked before what takes longer."""
    from anyup.finite import check_features
    from anyup.images import read_features

    given = read_features(arguments.features) if arguments.features else None
    photo = read_guide(arguments.photo, given, progress)
    whole, region = resolve_region(arguments.size, arguments.region, photo)
    points = read_points(arguments.points, whole) if arguments.points else None
    values = read_values(arguments.values) if arguments.values else None
    head = read_head(arguments.head) if arguments.head else None

    def check(features: Tensor, name: str) -> None:
        check_features(features, name)
        if values is not None and values.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"{arguments.values}: expected values on the grid of the features, {by(features)}, got {by(values)}"
            )
        if head is not None:
            check_head(head, features, arguments.head)
        channels = features.shape[1] if values is None else values.shape[1]
        channels = channels if head is None else head.weight.shape[0]
        itemsize = files.kept_as(arguments.dtype, features if values is None else values).itemsize
        places = region[2:] if points is None else points.shape[:2]
        files.check_memory((channels, *places), itemsize, device)
        files.check_room((channels, *places), itemsize, resume=arguments.resume)

    if given is not None:
        features = given
        check(features, arguments.features)
    model = load_model(arguments, device, progress)
    if arguments.encoder:
        encoder = load_named_encoder(arguments, device, progress)
        features = encode(encoder, photo, arguments.encoder_size, device, progress)
        check(features, f"features of {arguments.encoder}")
    if head is not None:
        values = carried_by(head, features, arguments.head)
    return Inputs(model, photo, features, values, whole, region, points)


def load_model(arguments: argparse.Namespace, device: torch.device, progress: Progress) -> AnyUp:
    """The upsampler with the weights of --weights, or with random ones."""
    from anyup.checkpoints import load, untrained_model

    with progress.stage("loading " + ("untrained weights" if arguments.untrained else f"weights {arguments.weights}")):
        if arguments.untrained:
            model = untrained_model(device, arguments.backend)
        else:
            with naming_the_options():
                model = load(arguments.weights, device=device, backend=arguments.backend)
    if arguments.untrained:
        progress.note("UNTRAINED weights: the result shows that everything runs and means nothing")
    return model


def read_guide(path: str, features: Tensor | None, progress: Progress) -> Tensor:
    """The photograph (1, 3, H, W) in 0..1, turned by its EXIF orientation.

    It is taken as stored, with a report, where features (1, C, h, w) of a file have its proportions so and not turned.
    """
    from anyup.images import read_picture, to_rgb01

    picture = read_picture(path)
    fits = [features is None or _proportions_of(size, features) for size in (picture.pixels.size, picture.turned_size)]
    if fits != [True, False]:
        return to_rgb01(picture.turned(), path)
    width, height = picture.pixels.size
    progress.note(
        f"{path}: taken as it is stored, {height} x {width}, not turned by its EXIF orientation: features from a file "
        "have these proportions"
    )
    return to_rgb01(picture.pixels, path)


def _proportions_of(size: tuple[int, int], features: Tensor) -> bool:
    """Whether a map has the proportions of a picture (width, height), if each side is rounded to whole cells."""
    (width, height), (rows, columns) = size, features.shape[2:]
    return abs(rows * width - columns * height) <= width + height


def load_named_encoder(arguments: argparse.Namespace, device: torch.device, progress: Progress) -> Encoder:
    """The encoder of --encoder."""
    from anyup.encoders import load_encoder

    extra = {"weights": arguments.encoder_weights} if arguments.encoder_weights else {}
    with progress.stage(f"loading encoder {arguments.encoder}"), naming_the_options():
        return load_encoder(arguments.encoder, device=device, **extra)


def encode(
    encoder: Encoder, photo: Tensor, wanted: tuple[int, ...] | None, device: torch.device, progress: Progress
) -> Tensor:
    """Features (1, C, h, w) of the photograph, resized so that the encoder's patches divide its sides."""
    import torch

    from anyup.images import resize, resolve_size, round_to_multiple

    native = (int(photo.shape[2]), int(photo.shape[3]))
    asked = resolve_size(wanted or (ENCODER_LONGER_SIDE,), native)
    rounded = round_to_multiple(asked, encoder.patch_size or 1)
    if rounded != native:
        why = f", a multiple of its patch of {encoder.patch_size} pixels" if encoder.patch_size else ""
        now = f"{rounded[0]} x {rounded[1]}{why}"
        progress.note(f"for the encoder the photograph of {native[0]} x {native[1]} is resized to {now}")
    with progress.stage(f"encoding {rounded[0]} x {rounded[1]}"), torch.inference_mode():
        features: Tensor = encoder(encoder.normalize(resize(photo, rounded).to(device)))
    progress.note(f"features: {features.shape[1]} x {by(features)}")
    return features


def guidance(photo: Tensor, whole: tuple[int, int], progress: Progress) -> Tensor:
    """The photograph as the guidance image: resized to the result where it is larger."""
    from anyup.images import guidance_size, normalize_imagenet, resize

    native = (int(photo.shape[2]), int(photo.shape[3]))
    guide = guidance_size(native, whole)
    if guide != native:
        progress.note(f"photograph of {native[0]} x {native[1]} reduced to {guide[0]} x {guide[1]}")
    return normalize_imagenet(resize(photo, guide))


def read_values(path: str) -> Tensor:
    """The maps (1, Cv, h, w) of --values, checked to be finite."""
    from anyup.finite import check_map
    from anyup.images import read_features

    values = read_features(path, "values")
    check_map(values, path)
    return values


def read_points(path: str, whole: tuple[int, int]) -> Tensor:
    """Points (1, N, 2) from lines "row,column", after a line of names if there is one; int64 where all are whole."""
    import torch

    from anyup.images import check_readable

    points: list[tuple[float, float]] = []
    with open(check_readable(path, f"points {path}"), encoding="utf-8-sig", errors="replace", newline="") as file:
        for number, line in enumerate(csv.reader(file), 1):
            if not line:
                continue
            try:
                row, column = (float(field) for field in line)
            except ValueError as error:
                if number == 1 and not any(character.isdigit() for character in "".join(line)):
                    continue
                raise ValueError(
                    f"points {path}: expected a row and a column on line {number}, got {','.join(line)[:80]!r}"
                ) from error
            if not (0 <= row <= whole[0] - 1 and 0 <= column <= whole[1] - 1):
                raise ValueError(
                    f"points {path}: expected rows from 0 to {whole[0] - 1} and columns from 0 to {whole[1] - 1}, line "
                    f"{number} has {','.join(line)[:80]!r}"
                )
            points.append((row, column))
    if not points:
        raise ValueError(f"points {path}: expected at least one line with a row and a column")
    found = torch.tensor(points, dtype=torch.float64)[None]
    return found.long() if bool((found == found.floor()).all()) else found


def read_head(path: str) -> torch.nn.Conv2d:
    """A 1x1 convolution from a file with one weight and at most one bias, under any names."""
    import torch

    from anyup.finite import not_finite
    from anyup.images import read_tensors
    from anyup.tensor_files import unfit

    tensors = read_tensors(path)
    weights = [
        name for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] == "weight" and tensor.dim() in (2, 4)
    ]
    biases = [name for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] == "bias" and tensor.dim() == 1]
    if len(weights) != 1 or len(biases) > 1:
        raise ValueError(
            f"head {path}: expected one weight (K, C) or (K, C, 1, 1) and at most one bias, it holds "
            f"{', '.join(sorted(tensors)) or 'nothing'}"
        )
    parts = {}
    for name in (*weights, *biases):
        if why := unfit(tensors[name]):
            raise ValueError(f"head {path}: {name}: {why}")
        parts[name] = tensors[name].float()
    if bad := not_finite(parts):
        raise ValueError(f"head {path}: holds numbers that are not finite: {bad}")
    weight = parts[weights[0]]
    if 0 in weight.shape or (weight.dim() == 4 and weight.shape[2:] != (1, 1)):
        raise ValueError(f"head {path}: expected a weight (K, C) or (K, C, 1, 1), got {tuple(weight.shape)}")
    head = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bool(biases))
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        if head.bias is not None:
            bias = parts[biases[0]]
            if bias.shape != head.bias.shape:
                raise ValueError(f"head {path}: expected a bias of {len(head.bias)}, got {tuple(bias.shape)}")
            head.bias.copy_(bias)
    return head


def check_head(head: torch.nn.Conv2d, features: Tensor, path: str) -> None:
    """Raise ValueError where the head in this file takes another number of channels."""
    if head.weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"{path}: expected a head for {features.shape[1]} channels, got one for {head.weight.shape[1]}"
        )


def carried_by(head: torch.nn.Conv2d, features: Tensor, path: str) -> Tensor:
    """The outputs (1, K, h, w) of the head in this file for the features, on the CPU, checked to be finite."""
    import torch

    from anyup.finite import check_map

    with torch.inference_mode():
        values: Tensor = head(features.float().cpu())
    check_map(values, f"what {path} makes of the features")
    return values


def resolve_region(
    wanted: tuple[int, ...] | None, region: tuple[int, int, int, int] | None, photo: Tensor
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The (height, width) of the whole result, and the region (top, left, height, width) of it to compute."""
    from anyup.argument_checks import check_region
    from anyup.images import resolve_size

    native = (int(photo.shape[2]), int(photo.shape[3]))
    whole = resolve_size(wanted, native)
    try:
        return whole, check_region(region, whole)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def by(features: Tensor) -> str:
    """The size of a map, in words."""
    return f"{features.shape[2]} x {features.shape[3]}"
