"""Pictures to look at: the photograph, the encoder's features, and what each method makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.encoders import Encoder
from anyup.evaluation.upsamplers import Learned, Upsampler
from anyup.images import normalize_imagenet, read_photo, round_to_multiple, save_picture
from anyup.panels import draw_panels
from anyup.reporting import Reporter
from anyup.training.photographs import square_crop
from anyup.visualization import pca_picture


def draw(
    photo: Tensor, encoder: Encoder, upsamplers: Sequence[Upsampler], output: Path, *, side: int, device: torch.device
) -> None:
    """Write one picture (.png) of the central square of a photograph (1, 3, H, W) in 0..1.

    Its side is `side` pixels, rounded to the encoder's stride.

    The colours are the first three principal components of the low-resolution features, in all panels.
    """
    size = round_to_multiple((side, side), encoder.stride)
    with torch.inference_mode():
        view = square_crop(photo, size[0])
        low = encoder(encoder.normalize(view).to(device)).float()
        image = normalize_imagenet(view).to(device)
        panels, titles, alarms = [view[0]], [f"photograph, {size[0]} x {size[1]}"], []
        for upsampler in upsamplers:
            # One map of all channels at full resolution alive at a time; the basis is the low map's in each.
            low_picture, high_picture = pca_picture(low, upsampler(image, low, size))
            if len(panels) == 1:
                panels.append(F.interpolate(low_picture[None], size=size, mode="nearest-exact")[0].cpu())
                titles.append(f"features, {' x '.join(map(str, low.shape[1:]))}")
            panels.append(high_picture.cpu())
            untrained = isinstance(upsampler, Learned) and not upsampler.trained
            titles.append(f"{upsampler.name}, UNTRAINED WEIGHTS" if untrained else upsampler.name)
            alarms += titles[-1:] if untrained else []
    footer = [f"Features: {encoder.name}. Colours: first three principal components of the low-resolution features."]
    save_picture(output, draw_panels(panels, titles, footer, alarms))


def _file_name(photograph: str, encoder: str, taken: set[str]) -> str:
    """A picture's name that no other has: with the photograph's suffix, and a number, where these tell it apart."""
    stems = [Path(photograph).with_suffix("").as_posix(), photograph]
    stems += [f"{photograph}-{number}" for number in range(2, len(taken) + 3)]
    for stem in stems:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{stem}--{encoder}") + ".png"
        if name not in taken:
            break
    taken.add(name)
    return name


def run(
    photographs: Mapping[str, Path],
    encoders: Sequence[Encoder],
    upsamplers: Sequence[Upsampler],
    folder: Path,
    *,
    side: int,
    device: torch.device,
    reporter: Reporter,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One picture for each photograph and encoder: what was written and of what, and the photographs left out.

    A photograph that cannot be read, or that an encoder refuses, is reported and left out; ValueError where no picture
    is drawn.
    """
    written: list[dict[str, Any]] = []
    left_out: dict[str, None] = {}
    total = len(photographs) * len(encoders)
    taken: set[str] = set()
    for name, path in photographs.items():
        try:
            photo = read_photo(path)
        except (ValueError, OSError) as error:
            reporter.note(f"left out: {error}")
            left_out[name] = None
            continue
        for encoder in encoders:
            picture = folder / _file_name(name, encoder.name, taken)
            try:
                draw(photo, encoder, upsamplers, picture, side=side, device=device)
            except ValueError as error:
                reporter.note(f"left out: {name}, {encoder.name}: {error}")
                left_out[name] = None
                continue
            written.append({"picture": picture.name, "photograph": name, "encoder": encoder.name})
            reporter.tick(f"{len(written)} of {total} pictures", last=len(written) == total)
    if not written:
        raise ValueError("photographs: none could be used")
    return written, list(left_out)
