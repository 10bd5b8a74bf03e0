"""Hashes of files, tensors and networks, by which caches and resumed runs recognise them."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor, nn


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """Hash of a tensor's shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def module_fingerprint(module: nn.Module) -> str:
    """Hash of a module's class, parameters and buffers: names, shapes, dtypes and values."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
