"""Classes for each pixel from a linear head: `python probe.py PHOTO MASK OUT.png`.

MASK is a picture of the same view whose grey levels are class numbers, 0, 1, ... The head learns from the cells of the
encoder's map, and only its few outputs are upsampled: `anyup.with_head` gives what the head after the upsampling gives.
"""

import sys

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import anyup
from anyup.images import fit_within, normalize_imagenet, read_photo, resize, round_to_multiple, save_picture

upsampler = anyup.load()
encoder = anyup.encoders.load_encoder("dinov2_s_derived")
photo = read_photo(sys.argv[1])
photo = resize(photo, round_to_multiple(fit_within(photo.shape[2:], 448), encoder.patch_size or 1))
with torch.no_grad():
    features = encoder(encoder.normalize(photo))  # (1, C, h, w)

mask = torch.from_numpy(np.array(Image.open(sys.argv[2]).convert("L"))).long()
shares = F.one_hot(mask).permute(2, 0, 1)[None].float()  # (1, classes, H, W)
shares = F.adaptive_avg_pool2d(shares, features.shape[2:])  # of each class, by cell
head = nn.Conv2d(features.shape[1], shares.shape[1], 1)
optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
for _ in range(100):
    loss = F.cross_entropy(head(features), shares)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss:.3f}")

with torch.inference_mode():
    classes = anyup.with_head(upsampler, head)(normalize_imagenet(photo), features).argmax(1)  # (1, H, W)
save_picture(sys.argv[3], (classes / (shares.shape[1] - 1)).expand(3, -1, -1))
