"""Surface normals by Probe3D's protocol: loss and metrics as functions of maps, and normals of a depth map.

Normals are unit vectors in the camera's frame (x right, y down, z forwards) that face the camera; (0, 0, 0) is unknown
and counts for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

OUTPUTS = 4
"""Of a head: a vector, whose direction is the normal, and what kappa comes from."""

METRICS = ("below_11_25", "below_22_5", "below_30", "rmse", "mean", "median")

_NEAR_ONE = 1e-4  # a cosine's distance to 1 at least, in the loss: there the arc cosine's gradient is infinite
_SAME_SURFACE = 0.05  # share of a pixel's depth by which others may differ and still be fitted with it


def normals_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """log(1 + exp(-pi kappa)) - log(kappa^2 + 1) + kappa angle, the mean over the known pixels of a batch.

    The angle is that between the first three outputs and the target, in radians; kappa = elu(fourth) + 1.01 says how
    sure the head is. Predictions (N, B, 4, H, W), target (B, 3, H, W) to (N,); a known pixel at least is expected.
    """
    known = target.square().sum(dim=1) > 0
    cosine = F.cosine_similarity(prediction[:, :, :3], target[None], dim=2)
    angle = cosine.clamp(-1 + _NEAR_ONE, 1 - _NEAR_ONE).acos()
    kappa = F.elu(prediction[:, :, 3]) + 1.01
    each = torch.log1p(torch.exp(-math.pi * kappa)) - torch.log(kappa.square() + 1) + kappa * angle
    return (each * known).flatten(1).sum(dim=1) / known.sum()


def normals_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Of one image, over the known pixels: `below_11_25`, `below_22_5`, `below_30`, the shares of pixels whose normal
    is wrong by less than so many degrees, and `rmse`, `mean` and `median` in degrees.

    prediction (3 or more, H, W), of which the first three count, target (3, H, W). In float64.
    """
    known = target.square().sum(dim=0) > 0
    of, to = prediction[:3, known].double(), target[:, known].double()
    # By the half angle: the arc cosine of a float64 near 1 loses half of its digits.
    of, to = F.normalize(of, dim=0), F.normalize(to, dim=0)
    degrees = torch.rad2deg(2 * torch.atan2((of - to).norm(dim=0), (of + to).norm(dim=0)))
    shares = {
        f"below_{bound:g}".replace(".", "_"): float((degrees < bound).double().mean()) for bound in (11.25, 22.5, 30)
    }
    return {
        **shares,
        "rmse": float(degrees.square().mean().sqrt()),
        "mean": float(degrees.mean()),
        "median": float(numpy.median(degrees.cpu().numpy())),
    }


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, in pixels of the depth map: focal lengths and principal point; a pixel's centre has whole
    coordinates, the first (0, 0)."""

    fx: float
    fy: float
    cx: float
    cy: float


def normals_of_depth(depth: Tensor, camera: Camera, window: int) -> Tensor:
    """(3, H, W) float32 normals of a depth map (H, W), 0 unknown: planes fitted to `window` x `window` pixels each.

    A plane's inverse depth is linear in the pixel's coordinates, so each fit is a linear regression, in float64.
    Pixels whose depth differs by more than 5 % from the central one's are left out of its fit. A normal is unknown
    where the depth is, and where fewer than a quarter of the window's pixels are fitted.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window: expected an odd number of 3 and more, got {window}")
    height, width = depth.shape
    reach = window // 2
    depth = depth.double()
    known = depth > 0
    inverse = torch.where(known, depth, 1).reciprocal()
    around = F.pad(torch.where(known, depth, 0), [reach] * 4)
    inverse_around = F.pad(inverse, [reach] * 4)
    # Sums over a window of 1, x, y, x^2, xy, y^2, q, xq, yq, q the inverse depth and x, y pixels from the centre.
    count, sx, sy, sxx, sxy, syy, sq, sxq, syq = (torch.zeros_like(depth) for _ in range(9))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            rows, columns = slice(reach + dy, reach + dy + height), slice(reach + dx, reach + dx + width)
            there = around[rows, columns]
            same = ((there > 0) & ((there - depth).abs() <= _SAME_SURFACE * depth)).double()
            q = same * inverse_around[rows, columns]
            for total, term in (
                (count, same), (sx, dx * same), (sy, dy * same), (sxx, dx * dx * same), (sxy, dx * dy * same),
                (syy, dy * dy * same), (sq, q), (sxq, dx * q), (syq, dy * q),
            ):  # fmt: skip
                total += term
    n = count.clamp(min=1)
    xx, xy, yy = sxx - sx * sx / n, sxy - sx * sy / n, syy - sy * sy / n
    xq, yq = sxq - sx * sq / n, syq - sy * sq / n
    determinant = xx * yy - xy * xy
    fitted = known & (count >= window * window / 4) & (determinant > 0)
    divisor = torch.where(fitted, determinant, 1)
    slope_x, slope_y = (xq * yy - yq * xy) / divisor, (yq * xx - xq * xy) / divisor
    at_centre = (sq - slope_x * sx - slope_y * sy) / n
    x = torch.arange(width, dtype=torch.float64, device=depth.device) - camera.cx
    y = (torch.arange(height, dtype=torch.float64, device=depth.device) - camera.cy)[:, None]
    # Of the plane <normal, point> = 1, whose points have the inverse depth <normal, (x / fx, y / fy, 1)>.
    away = torch.stack([slope_x * camera.fx, slope_y * camera.fy, at_centre - slope_x * x - slope_y * y])
    return torch.where(fitted, -F.normalize(away, dim=0), 0).float()
