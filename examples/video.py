"""The features of a video's frames as pictures: `python video.py VIDEO OUT`. It needs PyAV (`pip install av`).

`upsampler.frames` keeps memory, and on a GPU a CUDA graph, from one frame to the next. All pictures have the colours of
the first one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import anyup
from anyup.images import fit_within, normalize_imagenet, resize, round_to_multiple, save_picture
from anyup.video import Video
from anyup.visualization import pca_picture

out = Path(sys.argv[2])
out.mkdir(exist_ok=True)
upsampler = anyup.load()
encoder = anyup.encoders.load_encoder("dinov2_s_derived")


def frames(video: Video) -> Iterator[tuple[Tensor, Tensor]]:
    for rgb in video:  # (1, 3, H, W), 0 ... 255
        frame = resize(rgb / 255, round_to_multiple(fit_within(rgb.shape[2:], 336), encoder.patch_size or 1))
        yield normalize_imagenet(frame), encoder(encoder.normalize(frame))


first = None
with Video(sys.argv[1]) as video, torch.inference_mode():
    for number, features in enumerate(upsampler.frames(frames(video))):
        first = features if first is None else first
        save_picture(out / f"{number:06d}.jpg", pca_picture(first, features)[1])
print(f"{number + 1} frames")
