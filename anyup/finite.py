"""Checks for numbers that silently spoil a result: NaN, infinities, and numbers too large for a dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_MOST_NAMED = 3
_CHANNELS = 16


def check_map(tensor: Tensor, name: str) -> None:
    """Raise ValueError where a map (B, C, h, w) holds a NaN or an infinity, with the first place and the count.

    One such number spreads over the whole image through the normalisations of the upsampler.
    """
    # A sum is finite almost always, and ten times cheaper than a mask of every value. (MPS has no float64.) A few
    # channels at a time: torch copies what it sums in another dtype.
    parts = tensor.split(_CHANNELS, dim=1)
    if tensor.device.type == "cpu" and all(torch.isfinite(part.sum(dtype=torch.float64)) for part in parts):
        return
    bad = ~torch.isfinite(tensor)
    if not bad.any():
        return
    image, channel, row, column = (int(i) for i in bad.nonzero()[0])
    kind = "a NaN" if tensor[image, channel, row, column].isnan() else "an infinity"
    raise ValueError(
        f"{name}: holds {kind}: image {image} of the batch, channel {channel}, row {row}, column {column} "
        f"({int(bad.sum())} of {bad.numel()} values are not finite)"
    )


def check_features(features: Tensor, name: str) -> None:
    """Raise ValueError, which names the features `name`, where features (B, C, h, w) or their norm are not finite."""
    check_map(features, name)
    # Their norm, a sum of squares in float32, is what the model divides by.
    check_map(features.float().norm(dim=1, keepdim=True), f"the norm in float32 of {name}")


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The names of the tensors that hold a NaN or an infinity, with counts, in words; "" if none does."""
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    bad = [f"{name} ({count} of {tensors[name].numel()} numbers)" for name, count in counts.items() if count]
    more = f" and {len(bad) - _MOST_NAMED} more tensors" if len(bad) > _MOST_NAMED else ""
    return ", ".join(bad[:_MOST_NAMED]) + more


def overflow(carried: Tensor, dtype: torch.dtype) -> str:
    """Why the upsampled map of `carried` may not fit a dtype, in words; "" if it fits.

    The weights of a pixel are positive and sum to one, so no number is larger than the largest that is carried.
    """
    most = torch.finfo(dtype).max
    if most >= torch.finfo(carried.dtype).max or not carried.numel():
        return ""
    low, high = (extreme.item() for extreme in torch.aminmax(carried.detach()))
    if not max(-low, high) > most:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"{name} holds numbers up to {most:g}, and what is upsampled reaches {low:.4g} to {high:.4g}"
