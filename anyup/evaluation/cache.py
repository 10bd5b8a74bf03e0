"""Tensors that cost much to make, kept on disk under what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor

from anyup.images import save_array


class TensorCache:
    """A folder of `.npy` files, each named by the hash of its description; None keeps nothing.

    A file is complete or absent, and one that cannot be read is made again, so that several processes may share a
    folder and any of them may be killed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, kind: str, description: Mapping[str, object], make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that description, on the CPU: from the folder, else made and put there.

        `kind` is a subfolder. The description, of what JSON holds, must name everything that the tensor depends on.
        """
        if self.folder is None:
            return make().cpu()
        path = self.path(kind, description)
        if path.is_file():
            try:
                return torch.from_numpy(numpy.load(path, allow_pickle=False))
            except (ValueError, EOFError, OSError):
                pass  # damaged: made again
        tensor = make().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_array(path, tensor)
        return tensor

    def path(self, kind: str, description: Mapping[str, object]) -> Path:
        """Where the tensor of that description is, or would be; ValueError for a cache that keeps nothing."""
        if self.folder is None:
            raise ValueError("path: this cache keeps nothing")
        text = json.dumps(description, sort_keys=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npy"
