"""What comes with the package as files: the demonstration's photograph and features, and the checkpoint `anyup_mini`.

The demonstration needs no encoder and no network. ``README.md`` beside this file is the licence note of photograph
and features in full, ``tools/make_demo_assets.py`` made both; ``anyup_mini.md`` is the checkpoint's card.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEMO_ENCODER = "dinov2_s_derived"
"""Encoder of the stored features, by the name that `anyup.encoders.load_encoder` takes."""

DEMO_CREDIT = "Coffee cup, photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar (CC0), from scikit-image"
"""The photograph, its author and its licence in one line."""


def path(name: str) -> Path:
    """Path of an asset; the package is installed as plain files, so nothing has to be extracted."""
    found = Path(str(resources.files(__name__).joinpath(name)))
    if not found.is_file():
        raise FileNotFoundError(f"{name}: not in {found.parent}; was the package installed without its data files?")
    return found


def demo_photo_path() -> Path:
    """Path of the photograph (sRGB JPEG, 588 x 392 pixels: both sides are multiples of 14)."""
    return path("demo.jpg")


def demo_features_path() -> Path:
    """Path of the stored features, a float16 ``.npy`` file of shape (1, C, h, w)."""
    return path("demo_features.npy")


def demo_features() -> Tensor:
    """Stored features of the photograph: (1, C, h, w) float32 on the CPU, from float16 in the file."""
    return torch.from_numpy(np.load(demo_features_path(), allow_pickle=False).astype(np.float32))
