"""Entry points of ``torch.hub.load``; they work from a source tree that was never installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Whatever this module can call without a leading underscore, torch.hub lists as an entry point; and it
# reports the dependencies that are missing only after importing this module. So the package is imported
# inside the functions.
if TYPE_CHECKING:
    import torch as _torch

    from anyup.model import AnyUp as _AnyUp
    from anyup.model import ModelBackend as _ModelBackend

dependencies = ["torch", "einops"]


def _build(
    name: str,
    use_natten: bool,
    pretrained: bool,
    device: str | _torch.device,
    backend: _ModelBackend,
) -> _AnyUp:
    import anyup

    if pretrained:
        return anyup.load(name, device=device, backend=backend, window="cell" if use_natten else "ratio")
    return anyup.AnyUp(use_natten=use_natten, backend=backend).to(device)


def anyup(
    use_natten: bool = False,
    pretrained: bool = True,
    device: str | _torch.device = "cpu",
    backend: _ModelBackend = None,
) -> _AnyUp:
    """Return the AnyUp upsampler trained on the features of DINOv2 ViT-S/14.

    Args:
        use_natten: attend within the window of each query's cell (``window="cell"``); NATTEN is not needed.
        pretrained: load the published weights, downloaded once; in eval mode. Else: new weights, in training
            mode.
        device: where the model is put.
        backend: which implementation runs the heavy operations, see ``anyup.AnyUp``; None chooses.

    Raises:
        anyup.checkpoints.DownloadError: the weights are neither in torch.hub's cache nor to be downloaded.
    """
    return _build("anyup", use_natten, pretrained, device, backend)


def anyup_multi_backbone(
    use_natten: bool = False,
    pretrained: bool = True,
    device: str | _torch.device = "cpu",
    backend: _ModelBackend = None,
) -> _AnyUp:
    """Return the AnyUp upsampler trained on the features of several backbones; arguments as for ``anyup``."""
    return _build("anyup_multi_backbone", use_natten, pretrained, device, backend)


def anyup_mini(
    use_natten: bool = False,
    pretrained: bool = True,
    device: str | _torch.device = "cpu",
    backend: _ModelBackend = None,
) -> _AnyUp:
    """Return the AnyUp upsampler with the little-trained weights that come with the package.

    Needs the package safetensors and no download of its own. Arguments as for ``anyup``.
    """
    return _build("anyup_mini", use_natten, pretrained, device, backend)
