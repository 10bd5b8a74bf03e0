"""Loading an upsampler's weights from the packaged checkpoint, a published one or a file, and saving them to a file."""

from __future__ import annotations

import os
from typing import Any

import torch

from anyup import stored_weights
from anyup.model import AnyUp, ModelBackend
from anyup.stored_weights import (
    MINI,
    NAMED,
    PACKAGED,
    CheckpointNotFoundError,
    DownloadError,
    NamedCheckpoint,
    PackagedCheckpoint,
)

__all__ = [
    "MINI",
    "NAMED",
    "PACKAGED",
    "CheckpointNotFoundError",
    "DownloadError",
    "NamedCheckpoint",
    "PackagedCheckpoint",
    "load",
    "save",
    "untrained_model",
]

UNTRAINED_SEED = 0
"""The seed of random weights."""


def load(
    name_or_path: str | os.PathLike[str] = MINI,
    device: str | torch.device = "cpu",
    backend: ModelBackend = None,
    window: str | None = None,
    **model_arguments: Any,
) -> AnyUp:
    """Return the upsampler with the weights of a named checkpoint or of a file, in eval mode.

    A file is ``.pth``, ``.pt`` or ``.safetensors`` and holds a bare state dict; the first two may also be a
    training checkpoint that holds one under ``anyup`` or ``state_dict``. Only tensors and plain containers
    are unpickled. The parameters have torch's default dtype (float32), whichever floating-point dtype the
    file stores.

    The widths (``input_dim``, ``qk_dim``, ``kernel_size``, ``kernel_size_lfu``, ``lfu_dim``) follow from the
    shapes. What no shape tells (``num_heads``, ``window_ratio``, ``window``) is, in this order: the argument
    given here, what ``save`` stored, the constructor's default. The published checkpoints store none of it.

    Args:
        name_or_path: a name of ``PACKAGED``, which comes with the package (``"anyup_mini"``: the full
            architecture, little training), a name of ``NAMED``, downloaded once into torch.hub's cache, or the
            path of a file, or of a folder as `AnyUp.save_pretrained` writes it, or `"hf://owner/name"`, such a
            folder on Hugging Face's hub (`"hf://owner/name@revision"`), downloaded once into its cache. A string
            that is such a name always means the named checkpoint.
        device: where the model is put.
        backend: which implementation runs the heavy operations, see ``AnyUp``; None chooses.
        window: ``"ratio"`` or ``"cell"``; None means the stored window, and ``"ratio"`` where none is stored.
        **model_arguments: further arguments of ``AnyUp``; None means the file's, or the constructor's
            default. A width that is not the file's is an error. ``use_natten=True`` is ``window="cell"``.

    Raises:
        DownloadError: a published checkpoint that is not cached and cannot be downloaded.
        CheckpointNotFoundError: neither a name of ``PACKAGED`` or ``NAMED`` nor a file.
        ValueError: a file that cannot be read, holds another model's weights or some that are not finite, an
            argument that contradicts the file or another argument, or a device that torch cannot use.
        ImportError: a ``.safetensors`` file without the package that reads it.
    """
    return stored_weights.load(AnyUp, name_or_path, device, backend, window, **model_arguments)


def untrained_model(device: torch.device, backend: str | None = None, **arguments: Any) -> AnyUp:
    """A model with random weights, the same on every call; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        model = AnyUp(init_gaussian_derivatives=True, backend=backend, **arguments)
    return model.eval().to(device)


def save(model: AnyUp, path: str | os.PathLike[str]) -> None:
    """Write the weights and the constructor's arguments, as ``load`` reads them.

    A ``.pth`` or ``.pt`` file holds ``{"anyup": state dict, "config": arguments}``; a ``.safetensors`` file
    holds the state dict, and the arguments as JSON in its metadata. Tensors keep their dtype. A file of that
    name is replaced once the new one is complete; on an error it stays as it was.

    Args:
        model: the upsampler; one wrapped for distribution or compiled is to be unwrapped first.
        path: a file in a folder that exists, with one of the suffixes above.

    Raises:
        TypeError: not an ``AnyUp``.
        ValueError: another suffix.
        FileNotFoundError: the folder does not exist.
        ImportError: a ``.safetensors`` file without the package that writes it.
    """
    if not isinstance(model, AnyUp):
        raise TypeError(f"model: expected an AnyUp, got {type(model).__name__}")
    stored_weights.save(model, path)
