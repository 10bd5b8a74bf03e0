"""A training small enough for a test: photographs of noise and ramps, encoders of a few fixed weights, a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup.encoders import Encoder
from anyup.images import complete_or_absent, save_picture
from anyup.reporting import Reporter
from anyup.training import config
from anyup.training.config import Settings

SETTINGS = """
output = "{folder}/run"
encoders = ["tiny:8"]

[data]
photographs = "{folder}/photographs"
cache = "{folder}/cache"
held_out_every = 4
min_side = 48
image_size = 64
crop_size = 32
input_sizes = [32]
views = 2
crops = 3
crops_per_sample = 2

[model]
qk_dim = 16
num_heads = 2
lfu_dim = 8
kernel_size_lfu = 3

[optimizer]
steps = 4
batch = 4
learning_rate = 1e-2
warmup = 2
decay = "cosine"
average = 0.9

[guidance]
schedule = [[0, 16], [3, 32]]

[loss]
self_consistency_size = 0

[run]
device = "cpu"
precision = "float32"
log_every = 1
save_every = 2
validate_every = 2
tensorboard = false
"""


class TinyEncoder(Encoder):
    """A random projection of patches, whose weights the name decides."""

    def __init__(self, stride: int, channels: int = 6) -> None:
        super().__init__(f"tiny:{stride}:{channels}", channels=channels, stride=stride)
        generator = torch.Generator().manual_seed(stride)
        weight = torch.randn(channels, 3, stride, stride, generator=generator) / stride
        self.weight = nn.Parameter(weight, requires_grad=False)

    def features(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.weight, stride=self.stride)


def load_encoder(name: str, device: str | torch.device = "cpu") -> Encoder:
    """In place of `anyup.encoders.load_encoder`: "tiny:8" has a stride of 8 pixels (and another name of its own)."""
    return TinyEncoder(int(name.removeprefix("tiny:"))).to(device).eval()


def make_photographs(folder: Path, count: int = 8, size: tuple[int, int] = (64, 80)) -> Path:
    """A folder with as many pictures: ramps with blocks of noise."""
    folder.mkdir(parents=True)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        blocks = torch.rand(1, 3, 8, 10, generator=generator)
        picture = F.interpolate(blocks, size=size, mode="nearest")[0] * 0.5
        ramp = torch.linspace(0, 0.5, size[1]) * torch.rand(3, 1, 1, generator=generator)
        save_picture(folder / f"photo_{index:02}.png", picture + ramp)
    return folder


def settings(folder: Path, *overrides: str) -> Settings:
    """The settings above for a folder, changed by `key=value`."""
    path = folder / "config.toml"
    with complete_or_absent(path) as partial:  # several processes may be at it
        partial.write_text(SETTINGS.format(folder=folder.as_posix()), encoding="utf-8")
    return config.read(str(path), overrides)


class Told(Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def tick(self, text: str, *, last: bool = False) -> None:
        self.lines.append(text)


def records(folder: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    import json

    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
