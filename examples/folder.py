"""Features of every photograph of a folder, at the photograph's resolution: `python folder.py PHOTOS OUT`.

`anyup upsample PHOTOS --encoder NAME -o OUT` does the same with a manifest, and resumes. This is what it comes to.
"""

import sys
from pathlib import Path

import torch

import anyup
from anyup.images import fit_within, normalize_imagenet, read_photo, resize, round_to_multiple, save_array

photos, out = map(Path, sys.argv[1:])
out.mkdir(exist_ok=True)
upsampler = anyup.load()
encoder = anyup.encoders.load_encoder("dinov2_s_derived")

for path in sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
    photo = read_photo(path)  # (1, 3, H, W) in 0 ... 1
    photo = resize(photo, round_to_multiple(fit_within(photo.shape[2:], 448), encoder.patch_size or 1))
    with torch.inference_mode():
        features = upsampler(normalize_imagenet(photo), encoder(encoder.normalize(photo)))  # (1, C, H, W)
    save_array(out / f"{path.name}.npy", features[0].half())
    print(path.name, tuple(features.shape[1:]))
