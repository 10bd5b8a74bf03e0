"""A result larger than the memory, streamed to the disk: `python to_zarr.py PHOTO OUT.zarr SIDE`. It needs zarr.

The longer side of the result has SIDE pixels. At most 1 GB is allocated at a time.
"""

import sys

import torch
import zarr

import anyup
from anyup.images import fit_within, normalize_imagenet, read_photo, resize, round_to_multiple

photo = read_photo(sys.argv[1])  # (1, 3, H, W) in 0 ... 1
side = int(sys.argv[3])
factor = side / max(photo.shape[2:])
size = (round(photo.shape[2] * factor), round(photo.shape[3] * factor))
upsampler = anyup.load()
encoder = anyup.encoders.load_encoder("dinov2_s_derived")

seen = resize(photo, round_to_multiple(fit_within(photo.shape[2:], 448), encoder.patch_size or 1))
with torch.inference_mode():
    features = encoder(encoder.normalize(seen))
    shape = (1, features.shape[1], *size)
    chunks = (1, features.shape[1], 16, size[1])
    array = zarr.create_array(sys.argv[2], shape=shape, chunks=chunks, dtype="float16")
    stream = upsampler.stream(normalize_imagenet(photo), features, size, tile=64, max_memory="1GB", out=array)
    for number, _ in enumerate(stream, start=1):
        print(f"piece {number} of {len(stream)}", end="\r")
print(f"\n{sys.argv[2]}: {array.shape}, {array.dtype}")
