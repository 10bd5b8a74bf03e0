"""Checks of what a caller passes to the upsampler, before any work is done."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyup.caller_warning import warn
from anyup.ops.parallel import on_one_thread
from anyup.ops.precision import FLOATING, check_dense

# ImageNet normalisation brings colours in [0, 1] to within -2.2 ... 2.7.
_LARGEST_NORMALISED = 20.0
# Largest rounding of a level 0 ... 255 that float32 arithmetic has divided by 255 and multiplied by 255.
_LEVEL_ROUNDING = 1e-3
# The check reads about so many rows and columns (at most twice as many): a copy of a large image takes memory.
_LEVELS_A_SIDE = 256

_warned_unnormalised = False


OutputSize = int | Sequence[int | None] | None
"""As `torch.nn.functional.adaptive_avg_pool2d` takes it: a number is both lengths, None the image's."""


def check_transforms() -> None:
    """Raise NotImplementedError inside torch.jit.trace and torch.func.grad, which cannot trace the operators."""
    if torch.jit._trace.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace would keep one size's windows and one machine's backends: use torch.export.export"
        )
    functorch = torch._C._functorch
    transform = functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == functorch.TransformType.Grad:
        raise NotImplementedError(
            "anyup's operators have no derivatives by torch.func (grad, vjp, jacrev, hessian): use "
            "torch.autograd.grad or torch.autograd.functional.jacobian"
        )


def check_inputs(
    image: Tensor,
    features: Tensor,
    values: Tensor | None,
    output_size: OutputSize,
    q_chunk_size: int | None,
    *,
    input_dim: int,
    device: torch.device,
    name: str = "image",
) -> tuple[int, int]:
    """The output's (height, width); raises a ValueError or TypeError that names the argument at fault.

    `name` is the caller's name of the image argument; the image has `input_dim` channels.
    """
    if not torch.compiler.is_compiling():
        check_transforms()
    _check_map(name, image, input_dim, device)
    others = {"features": features} if values is None else {"features": features, "values": values}
    for other, tensor in others.items():
        _check_map(other, tensor, None, device)
        if tensor.shape[0] != image.shape[0]:
            raise ValueError(f"{other}: expected the image's batch of {image.shape[0]}, got {tensor.shape[0]}")
    if values is not None and values.shape[2:] != features.shape[2:]:
        raise ValueError(
            f"values: expected the features' grid {tuple(features.shape[2:])}, got {tuple(values.shape[2:])}"
        )
    if q_chunk_size is not None:
        _check_positive("q_chunk_size", integer(q_chunk_size))
    size = check_output_size(output_size, (image.shape[2], image.shape[3]))
    if name == "image" and image.device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_unnormalised(image)
    return size


def check_image(image: Tensor, output_size: OutputSize, *, input_dim: int, device: torch.device) -> tuple[int, int]:
    """The output's (height, width) for an image alone; raises a ValueError or TypeError that names the argument."""
    _check_map("image", image, input_dim, device)
    size = check_output_size(output_size, (image.shape[2], image.shape[3]))
    if image.device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_unnormalised(image)
    return size


def check_output_size(output_size: Any, image: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an `OutputSize`, or of an array or tensor of two integers; `image` is the image's.

    Raises a ValueError or TypeError for anything else.
    """
    if output_size is None:
        return image
    size = integer(output_size)
    if isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool):
        size = (size, size)
    elif hasattr(size, "tolist"):
        size = size.tolist()
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        size = [whole if length is None else length for length, whole in zip(size, image, strict=True)]
    return check_size("output_size", size)


def check_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width); raises a ValueError or TypeError that names the argument unless it is one."""
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise ValueError(f"{name}: expected two positive integers (height, width), got {size!r}")
    height, width = (integer(length) for length in size)
    for length in (height, width):
        _check_positive(name, length)
    return height, width


def check_region(region: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width); raises a ValueError or TypeError unless it lies inside the output. None: all."""
    if region is None:
        return 0, 0, *size
    if not isinstance(region, Sequence) or len(region) != 4:
        raise ValueError(f"region: expected (top, left, height, width), got {region!r}")
    numbers = [integer(number) for number in region]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"region: expected integers, got {number!r}")
    top, left, height, width = numbers
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"region: expected (top, left, height, width) inside the output of {size}, got {tuple(region)}"
        )
    return top, left, height, width


def check_tile(tile: Any, region: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of a tile; an integer is a number of rows, which are as wide as the region. None stays None."""
    if tile is None:
        return None
    tile = integer(tile)
    if isinstance(tile, int):
        tile = (tile, region[1])
    return check_size("tile", tile)


def _check_map(name: str, tensor: Any, channels: int | None, device: torch.device) -> None:
    """Raise unless this is (B, channels, height, width), floating-point, on the device; any channels if None."""
    check_dense(name, tensor)
    layout = f"(B, {channels or 'C'}, height, width)"
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, {layout}, got shape {tuple(tensor.shape)}")
    if min(tensor.shape[1:]) < 1:
        raise ValueError(f"{name}: expected at least one channel, row and column, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATING:
        hint = "; convert to floating point and normalise (ImageNet mean and std)" if name == "image" else ""
        raise TypeError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}{hint}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the model, got one on {tensor.device}")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        # The operators have no forward-mode derivative, for which torch would silently take zero.
        raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented; use torch.autograd.grad")


def integer(number: Any) -> Any:
    """Convert an integer of another library to Python's; return any other value, and a bool, as it is."""
    if isinstance(number, (bool, int, torch.SymInt)) or not hasattr(number, "__index__"):
        return number
    try:
        return operator.index(number)
    except TypeError:
        return number


def _check_positive(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected positive integers, got {number!r}")
    if number < 1:
        raise ValueError(f"{name}: expected positive integers, got {number}")


def _warn_unnormalised(image: Tensor) -> None:
    global _warned_unnormalised
    if _warned_unnormalised or not image.numel():
        return
    try:
        with on_one_thread():
            low, high = (extreme.item() for extreme in torch.aminmax(image.detach()))
    except RuntimeError:  # the tensor has no values: inside vmap, or a fake tensor
        return
    if max(-low, high) > _LARGEST_NORMALISED:
        what = f"values reach {low:.4g} to {high:.4g}, which does not look normalised"
    elif 0 <= low < high <= 1 and _holds_levels(image.detach()):
        what = "values are levels of 0 to 255 divided by 255, and not normalised"
    else:
        return
    _warned_unnormalised = True
    warn(f"image: {what}; expected colours in [0, 1] minus the ImageNet mean, over its standard deviation")


def _holds_levels(image: Tensor) -> bool:
    """Whether an image of three channels in [0, 1] holds nothing but multiples of 1/255, and not 0 and 1 alone.

    That is a photograph divided by 255 and not normalised. Some normalised colours are such multiples by chance, but
    hardly ever all of them. Half precision rounds too much to decide.
    """
    if image.shape[1] != 3 or image.dtype in (torch.float16, torch.bfloat16):
        return False
    rows, columns = (max(1, side // _LEVELS_A_SIDE) for side in image.shape[2:])
    scaled = image[:, :, ::rows, ::columns] * 255
    levels = scaled.round()
    return (scaled - levels).abs().max().item() < _LEVEL_ROUNDING and bool((levels % 255 != 0).any())
