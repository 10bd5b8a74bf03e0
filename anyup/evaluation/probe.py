"""Probes of upsampled features, many trained side by side, everything below them frozen.

A linear probe is a 1x1 convolution, and the weights of a pixel sum to one, so it is applied on the small grid and its
logits are brought to the pixels (`attention_weights`): exact, and features at image resolution never exist. So is the
linear beginning of a DPT head (`dpt`). Every method has one probe for
each seed; the probes of a seed begin with the same values, see the same images in the same order, and do not influence
one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyup.evaluation.attention_weights import AttentionWeights, BilinearWeights, Carrier, FixedWeights, some_tiles
from anyup.evaluation.datasets import VOID
from anyup.images import to_pil, to_rgb01
from anyup.training.randomness import Key, drawer

HEADS = ("linear", "dpt")

SCHEDULES = ("epochs", "iterations", "published", "warm-up")
"""How the learning rate follows a cosine: see `Recipe`."""

WARM_UP, LEAST_RATE = 1.5, 0.01  # epochs, and the share of the learning rate that "warm-up" begins and ends with


@dataclass(frozen=True, order=True)
class View:
    """How an image and what is known of it are seen in a step.

    Attributes:
        crop: (top, left, side) as shares of the image's side, empty for the whole; resized to the whole's size.
        jitter: seed of a change of the image's colours, -1 for none.
    """

    mirrored: bool = False
    crop: tuple[float, ...] = ()
    jitter: int = -1

    @property
    def is_seen_again(self) -> bool:
        """Whether the same view comes again in another epoch."""
        return not self.crop and self.jitter < 0

    def image(self, image: Tensor) -> Tensor:
        """The view of an image (1, 3, S, S) in 0..1."""
        size = image.shape[2:]
        if self.jitter >= 0:
            image = _jittered(image, self.jitter)
        if self.crop:
            cut = self._cut(image)
            image = F.interpolate(cut, size=size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return image.flip(3) if self.mirrored else image

    def target(self, target: Tensor) -> Tensor:
        """The view of a map (..., S, S), by its nearest pixels."""
        if self.crop:
            cut = self._cut(target)
            at = F.interpolate(
                torch.arange(cut.shape[-1], dtype=torch.float64)[None, None], target.shape[-1], mode="nearest-exact"
            ).long()[0, 0]
            target = cut[..., at, :][..., at]
        return target.flip(-1) if self.mirrored else target

    def _cut(self, pixels: Tensor) -> Tensor:
        top, left, side = (round(share * pixels.shape[-1]) for share in self.crop)
        return pixels[..., top : top + side, left : left + side]


def drawn_view(*key: Key) -> View:
    """Probe3D's augmentation, drawn by a key: colours changed with probability 0.8, and with probability 0.5 a square
    crop of half to all of the area."""
    draw = drawer(*key)
    jitter = draw.randrange(1 << 31) if draw.random() < 0.8 else -1
    if draw.random() >= 0.5:
        return View(jitter=jitter)
    side = math.sqrt(draw.uniform(0.5, 1))
    return View(crop=(draw.uniform(0, 1 - side), draw.uniform(0, 1 - side), side), jitter=jitter)


def _jittered(image: Tensor, seed: int) -> Tensor:
    from anyup.training.augmentations import colour_jitter

    changed = colour_jitter(to_pil(image[0]), drawer("jitter", seed), strength=0.2, hue=0.2)
    return to_rgb01(changed, "image")


@dataclass(frozen=True)
class Recipe:
    """How probes are trained: by default JAFAR's protocol, of segmentation.

    Attributes:
        schedule: the cosine's half period is "epochs": all epochs, the rate changing after each; "iterations": all
            iterations, the rate changing after each; "published": as many *iterations* as there are epochs, so that
            the rate goes down and up again all through the training. "warm-up" is Probe3D's: a line from 1 % of the
            rate up to all of it over 1.5 epochs, then a quarter period of a cosine down to 1 %, changing after each
            iteration.
        head: "linear", or "dpt" of `width` channels (`dpt.DptHead`).
        flips: mirror a batch with probability one half.
        augment: each image is seen once as it is drawn anew in each epoch, by Probe3D's protocol (`drawn_view`).
    """

    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-5
    batch: int = 2
    epochs: int = 20
    schedule: str = "epochs"
    flips: bool = False
    augment: bool = False
    order_seed: int = 0
    head: str = "linear"
    width: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {self.head!r}")
        if (self.width > 0) != (self.head == "dpt"):
            raise ValueError(f"width: expected with the head dpt alone, got {self.width} with {self.head}")
        for name in ("batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.schedule == "warm-up" and self.epochs <= WARM_UP:
            raise ValueError(f"epochs: expected more than the {WARM_UP} of the warm-up, got {self.epochs}")

    def rate(self, epoch: int, iteration: int, iterations: int) -> float:
        """The learning rate of an iteration of all `iterations`, in the epoch it lies in; both from 0."""
        if self.schedule == "warm-up":
            warm = WARM_UP * iterations / self.epochs
            rising = iteration / warm
            falling = math.cos(math.pi / 2 * (iteration - warm) / (iterations - warm))
            share = LEAST_RATE + (1 - LEAST_RATE) * (rising if rising <= 1 else falling)
            return self.learning_rate * share
        done, period = {
            "epochs": (epoch, self.epochs),
            "iterations": (iteration, iterations),
            "published": (iteration, self.epochs),
        }[self.schedule]
        return self.learning_rate * (1 + math.cos(math.pi * done / period)) / 2

    def batches(self, images: int, epoch: int) -> list[list[tuple[int, View]]]:
        """(image, view) in the order of an epoch, which depends on nothing but the seed and the epoch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.order_seed + epoch)
        order = torch.randperm(images, generator=generator).tolist()
        batches = [order[first : first + self.batch] for first in range(0, images, self.batch)]
        mirrored = torch.rand(len(batches), generator=generator) < 0.5

        def view(image: int, mirror: bool) -> View:
            drawn = drawn_view("probe", self.order_seed, epoch, image) if self.augment else View()
            return replace(drawn, mirrored=self.flips and mirror)

        return [[(image, view(image, bool(m))) for image in b] for b, m in zip(batches, mirrored, strict=True)]


class Probes(nn.Module):
    """The probes of `methods` x `seeds`: what they do on the small grid, and what is left for the pixels."""

    def __init__(self, methods: Sequence[str], seeds: Sequence[int]) -> None:
        super().__init__()
        self.methods, self.seeds = tuple(methods), tuple(seeds)

    def forward(self, features: Tensor) -> Tensor:
        """(1, C, h, w) to what is carried (methods, seeds * ..., h, w)."""
        raise NotImplementedError

    def carrier(self, method: int, weights: FixedWeights) -> Carrier:
        """What brings a method's `forward` (seeds * ..., h, w) to the pixels, as the outputs of its probes there."""
        return weights

    def finish(self, method: int, carried: Tensor) -> Tensor:
        """The outputs (seeds * outputs, H, W) from a method's `forward`, brought to the pixels by an upsampler."""
        return carried


class LinearProbes(Probes):
    """Probes that are a linear map each, from `channels` to `outputs`."""

    def __init__(self, methods: Sequence[str], seeds: Sequence[int], channels: int, outputs: int) -> None:
        super().__init__(methods, seeds)
        self.channels, self.outputs = channels, outputs
        weights, biases = zip(*(self._start(seed) for seed in seeds), strict=True)
        self.weight = nn.Parameter(torch.stack(weights).expand(len(methods), -1, -1, -1).clone())
        self.bias = nn.Parameter(torch.stack(biases).expand(len(methods), -1, -1).clone())

    def _start(self, seed: int) -> tuple[Tensor, Tensor]:
        """Torch's initial values of a 1x1 convolution after `manual_seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convolution = nn.Conv2d(self.channels, self.outputs, 1)
        assert convolution.bias is not None
        return convolution.weight.detach().flatten(1), convolution.bias.detach()

    def forward(self, features: Tensor) -> Tensor:
        """(1, C, h, w) to logits (methods, seeds * outputs, h, w)."""
        logits = self.weight @ features[0].flatten(1) + self.bias[..., None]  # (methods, seeds, outputs, h * w)
        return logits.flatten(1, 2).unflatten(2, features.shape[2:])


def losses(fixed_weights: Carrier, logits: Tensor, labels: Tensor, seeds: int, classes: int) -> Tensor:
    """Cross-entropy summed over an image's valid pixels, of each seed's probe: (seeds,).

    logits (seeds * ..., h, w) on the small grid, which are carried to those of the classes; labels (H, W) uint8 with
    VOID.
    """
    total = logits.new_zeros(seeds)
    targets = fixed_weights.targets(labels, classes)
    if isinstance(fixed_weights, AttentionWeights | BilinearWeights):
        for (near, weights), of_tiles in zip(fixed_weights.factors(logits), targets, strict=True):
            total = total + CarriedEntropy.apply(near, weights, of_tiles, seeds)
        return total
    for carried, of_tiles in zip(fixed_weights.logits(logits), targets, strict=True):
        carried = carried.unflatten(1, (seeds, classes)).flatten(0, 1)  # (tiles * seeds, classes, pixels)
        of_tiles = of_tiles.unsqueeze(1).expand(-1, seeds, *of_tiles.shape[1:]).flatten(0, 1)
        # Class numbers, or for each class how many pixels have it: those without void, which torch wants to hear.
        ignored = -100 if of_tiles.is_floating_point() else VOID
        entropy = F.cross_entropy(carried, of_tiles, ignore_index=ignored, reduction="none")  # (tiles * seeds, pixels)
        total = total + entropy.unflatten(0, (-1, seeds)).sum(dim=(0, 2))
    return total


class CarriedEntropy(torch.autograd.Function):
    """Cross-entropy of logits that are carried to pixels, summed for each seed, without the logits of all pixels.

    `near` (tiles, seeds * classes, keys) and `weights` (tiles, pixels, keys), whose product over the keys are the
    logits, and labels (tiles, pixels) int64 with VOID give (seeds,). The gradient is made beside the sum, while the
    logits of some tiles are in a processor's cache; of a seed it is a multiple of the sum's. The weights have none.
    """

    @staticmethod
    def forward(ctx: Any, near: Tensor, weights: Tensor, labels: Tensor, seeds: int) -> Tensor:
        known = (labels != VOID)[:, None, None]  # (tiles, 1, 1, pixels)
        index = labels.masked_fill(labels == VOID, 0)[:, None, None].expand(-1, seeds, -1, -1)
        total = near.new_zeros(seeds)
        found = torch.empty_like(near, memory_format=torch.contiguous_format)
        for tiles, logits in some_tiles(near, weights):
            # (tiles, seeds, classes, pixels): logarithms of probabilities, probabilities, derivatives by the logits.
            made = logits.unflatten(1, (seeds, -1)).log_softmax(dim=2)
            total -= (made.gather(2, index[tiles]) * known[tiles]).sum(dim=(0, 2, 3))
            made.exp_().scatter_add_(2, index[tiles], made.new_full((), -1).expand(index[tiles].shape))
            torch.matmul(made.mul_(known[tiles]).flatten(1, 2), weights[tiles], out=found[tiles])
        ctx.save_for_backward(found)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (found,) = ctx.saved_tensors
        by_seed = found.unflatten(1, (len(gradient), -1)) * gradient[:, None, None]
        return by_seed.flatten(1, 2), None, None, None


@dataclass(frozen=True)
class Example:
    """What training needs of one image: what probes see (1, C, h, w), target (..., H, W), weights of each method."""

    features: Tensor
    target: Tensor
    weights: Mapping[str, FixedWeights]


class Objective(Protocol):
    """What is learned: `outputs` of each probe, and a loss of what is carried from them."""

    @property
    def outputs(self) -> int: ...

    def known(self, target: Tensor) -> int:
        """The number of pixels that count."""

    def backward(
        self, weights: Sequence[Carrier], logits: Sequence[Tensor], targets: Sequence[Tensor], seeds: int
    ) -> Tensor:
        """One method's mean loss over a batch's known pixels, (seeds,) on the CPU, detached; each logits' gradient is
        added to its `.grad`.

        The logits are what the probes give on the small grid (`Probes.forward`), one tensor for each image.
        """


def train_step(
    probes: Probes, optimizer: torch.optim.Optimizer, batch: Sequence[Example], objective: Objective
) -> Tensor | None:
    """One step of all probes: the mean loss over the batch's known pixels, (methods, seeds), detached.

    None, and no step, where no pixel is known.
    """
    if not any(objective.known(example.target) for example in batch):
        return None
    optimizer.zero_grad(set_to_none=True)
    lows = [probes(example.features) for example in batch]
    # What is carried of one method alive at a time; the gradients meet the probes once.
    leaves = [low.detach().requires_grad_() for low in lows]
    targets = [example.target for example in batch]
    total = [
        objective.backward(
            [probes.carrier(index, example.weights[method]) for example in batch],
            [leaf[index] for leaf in leaves],
            targets,
            len(probes.seeds),
        )
        for index, method in enumerate(probes.methods)
    ]
    for low, leaf in zip(lows, leaves, strict=True):
        low.backward(leaf.grad)
    optimizer.step()
    return torch.stack(total)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Of an image's logits (seeds, classes, H, W) and labels (H, W) with VOID: pixels of each true and predicted class.

    (seeds, classes, classes) int64, on the CPU.
    """
    classes = logits.shape[1]
    known = labels.cpu() != VOID
    true = labels.cpu()[known].long() * classes
    predicted = logits.argmax(dim=1).cpu()[:, known]
    counts = [torch.bincount(true + of_seed, minlength=classes**2) for of_seed in predicted]
    return torch.stack(counts).view(-1, classes, classes)


def scores(counts: Tensor) -> dict[str, Any]:
    """{"miou", "iou", "accuracy"} in 0..1 of the pixels (classes, classes) of each true and predicted class.

    "iou" is each class's, 0 where the class is neither true nor predicted anywhere; the mean is over the others.
    """
    right = counts.diagonal().double()
    union = counts.sum(dim=0) + counts.sum(dim=1) - right
    iou = right / union.clamp(min=1)
    return {
        "miou": iou[union > 0].mean().item(),
        "iou": iou.tolist(),
        "accuracy": (right.sum() / counts.sum()).item(),
    }
