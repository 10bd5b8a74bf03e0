"""A part of a large result, without the rest: `python region.py PHOTO OUT.png TOP LEFT HEIGHT WIDTH`.

The output has four times the photograph's sides. Only the part is computed, and it is what the whole output has there.
"""

import sys

import torch

import anyup
from anyup.images import fit_within, normalize_imagenet, read_photo, resize, round_to_multiple, save_picture
from anyup.visualization import pca_picture

photo = read_photo(sys.argv[1])  # (1, 3, H, W) in 0 ... 1
size = (4 * photo.shape[2], 4 * photo.shape[3])
top, left, height, width = map(int, sys.argv[3:])
upsampler = anyup.load()
encoder = anyup.encoders.load_encoder("dinov2_s_derived")

seen = resize(photo, round_to_multiple(fit_within(photo.shape[2:], 448), encoder.patch_size or 1))
with torch.inference_mode():
    features = encoder(encoder.normalize(seen))
    part = torch.empty(1, features.shape[1], height, width)
    region = (top, left, height, width)
    for rows, _, _ in upsampler.stream(normalize_imagenet(photo), features, size, region=region, out=part):
        print(f"rows {rows.start} to {rows.stop} of {size[0]}")
save_picture(sys.argv[2], pca_picture(features, part)[1])
