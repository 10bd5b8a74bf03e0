"""Train the packaged weights on one core: the recipe of `anyup_mini`, third edition, whose card tells how it was run.

    python tools/train_mini.py anyup_mini photographs features.pt --labelled camvid -o weights.safetensors --minutes 75

The second edition's first step is to give the weights waves of place (`tools/add_place_channels.py`); the third one
starts from the second. `features.pt` is made where it is not there.

Beside `anyup train` this has Muon for the matrices, a loss that is what is measured (1 - cosine as a share of bilinear
interpolation's), the whole view as the truth at 4x, random layers after an encoder, which make another encoder of it,
and compiled pixel encoders whose products are in bfloat16. It needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyup
from anyup.encoders import load_encoder
from anyup.evaluation.datasets import LAYOUTS, VOID, load_split, make_labels, read_mask, square_image
from anyup.images import normalize_imagenet, resize
from anyup.layers import Encoder, ResBlock
from anyup.model import AnyUp
from anyup.ops.feature_unification import unify_features
from anyup.photographs import find_photographs
from anyup.training.feature_augmentations import turn
from anyup.training.photographs import draw_view, read_large, split, view_of
from anyup.training.position_targets import position_maps
from anyup.training.synthetic import synthetic_features

SHARES = {
    "dinov2_s_derived 2x": 0.16,
    "dinov2_s_derived 4x": 0.10,
    "mobilenet_v2:13 2x": 0.04,
    "mobilenet_v2:13 4x": 0.04,
    "mobilenet_v2:6 2x": 0.06,
    "mobilenet_v2:6 4x": 0.03,
    "efficientnet_lite0:10 2x": 0.07,
    "efficientnet_lite0:10 4x": 0.04,
    "efficientnet_lite0:4 2x": 0.06,
    "efficientnet_lite0:4 4x": 0.02,
    "place": 0.02,
    "synthetic": 0.02,
    "labels": 0.36,
}
"""How many of the steps have which features; labels where there are labelled frames."""

WEIGHTS = {"place": 0.8, "synthetic": 0.5, "labels": 6.0}
LABELS = (0.10, 0.90)
"""What counts in a step of labels: their shares of the cells, and scores."""

RATE, WARMUP, AVERAGE, CLIP = 6e-4, 40, 0.995, 0.5
LATE = 0.85  # from this share of the run on most guidance images are larger

Maps = dict[str, Tensor]


def make_features(folder: str, names: set[str], views: int) -> tuple[Tensor, dict[str, Maps]]:
    """Views as bytes (N, 3, 224, 224), and each encoder's maps of them in float16.

    "l112" and "l224" are of the shrunk view, "whole" of its 448 pixels, "quarters" of its four quarters, side by side.
    """
    learned, _ = split(find_photographs(folder), 10)
    guidance: list[Tensor] = []
    made: dict[str, dict[str, list[Tensor]]] = {
        name: {key: [] for key in ("l112", "l224", "whole", "quarters")} for name in sorted(names)
    }
    encoders = {name: load_encoder(name) for name in made}

    @torch.inference_mode()
    def encode(name: str, rgb01: Tensor) -> Tensor:
        half = torch.autocast("cpu", torch.bfloat16) if name.startswith("dinov2") else contextlib.nullcontext()
        with half:
            parts = [encoders[name](encoders[name].normalize(part)).half() for part in rgb01.split(4)]
        return torch.cat(parts)

    for view in range(views):
        for path in learned:
            image = view_of(read_large(path, 448), draw_view(path.name, view, 0, (0.6, 1.0)), 448)
            small = resize(image, (224, 224))
            guidance.append((small * 255).round().to(torch.uint8)[0])
            quarters = torch.cat([image[:, :, y : y + 224, x : x + 224] for y in (0, 224) for x in (0, 224)])
            for name, maps in made.items():
                maps["l112"].append(encode(name, resize(image, (112, 112)))[0])
                maps["l224"].append(encode(name, small)[0])
                maps["whole"].append(encode(name, image)[0])
                top_left, top_right, left, right = encode(name, quarters)
                rows = torch.cat((top_left, top_right), 2), torch.cat((left, right), 2)
                maps["quarters"].append(torch.cat(rows, 1))
    return torch.stack(guidance), {n: {k: torch.stack(v) for k, v in maps.items()} for n, maps in made.items()}


def make_labelled(folder: str) -> Labelled:
    """The central square of each frame in `train`, with the classes that `trainannot` has, as CamVid lays them out."""
    encoder, guidance, masks = load_encoder("dinov2_s_derived"), list[Tensor](), list[Tensor]()
    maps: dict[str, list[Tensor]] = {"l224": [], "whole": []}
    labels = make_labels([str(value) for value in range(VOID)])
    for sample in load_split(folder, LAYOUTS["camvid"], "train"):
        image = square_image(sample.photo(), 448)
        small = resize(image, (224, 224))
        guidance.append((small * 255).round().to(torch.uint8)[0])
        masks.append(read_mask(sample, labels, 224))
        with torch.inference_mode():
            for key, pixels in (("l224", small), ("whole", image)):
                maps[key].append(encoder(encoder.normalize(pixels))[0].half())
    return Labelled(torch.stack(guidance), torch.stack(masks), {key: torch.stack(of) for key, of in maps.items()})


def block(x: Tensor, layers: ResBlock, half: bool) -> Tensor:
    """A residual block of pixels (B, N, C); the products are in bfloat16 where `half` is true."""
    norm1, _, conv1, norm2, _, conv2 = layers.block
    y = x
    for norm, conv in ((norm1, conv1), (norm2, conv2)):
        groups = y.float().unflatten(2, (norm.num_groups, -1))
        variance, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
        normed = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(2) * norm.weight + norm.bias
        y = product(F.silu(normed), conv.weight.flatten(1), half)
    return x + y


def product(x: Tensor, weight: Tensor, half: bool) -> Tensor:
    """Of pixels (..., C) with a weight (D, C)."""
    return F.linear(x.bfloat16(), weight.bfloat16()).float() if half else F.linear(x, weight)


def encode_pixels(model: AnyUp, image: Tensor) -> tuple[Tensor, Tensor]:
    """The encoded queries and keys (B, G * G, D) of a guidance image (B, 3, G, G)."""

    def blocks(x: Tensor, encoder: Encoder) -> Tensor:
        return block(block(x, encoder[1], True), encoder[2], True)

    def first(encoder: Encoder) -> Tensor:
        return encoder[0].weight.flatten(1)

    pixels = image.flatten(2).transpose(1, 2)
    encoded = blocks(F.linear(pixels, first(model.image_encoder)), model.image_encoder)
    axis, frequencies = torch.linspace(0, 1, image.shape[2]), model.rope.freqs
    angle = (axis[:, None, None] * frequencies[0] + axis[:, None] * frequencies[1]).flatten(0, 1)
    left, right = encoded.chunk(2, -1)
    encoded = encoded * angle.cos() + torch.cat((-right, left), -1) * angle.sin()
    queries, keys = (
        blocks(product(encoded, first(encoder), True), encoder) for encoder in (model.query_encoder, model.key_encoder)
    )
    return queries, keys


class Forward:
    """The upsampler's forward with gradients, for sides of the guidance that the sides of the maps divide."""

    def __init__(self, model: AnyUp) -> None:
        self.model = model
        self._pixels = torch.compile(encode_pixels, dynamic=False)

    def __call__(self, image: Tensor, low: Tensor, side: int, values: Tensor | None = None) -> Tensor:
        """Features `low` (B, C, h, h), or other values there, at `side` pixels."""
        block_ = self.model.cross_decode
        queries, keys = self._pixels(self.model, image)
        attention, width = block_.cross_attn, self.model.qk_dim
        q = F.conv2d(_pooled(queries, side), block_.conv2d.weight, padding=1).permute(0, 2, 3, 1)
        q = F.rms_norm(q, (width,), attention.norm_q.weight)
        weight, bias = attention.attention.in_proj_weight, attention.attention.in_proj_bias
        q = block_.split_heads(F.linear(q, weight[:width], bias[:width]))
        k = block_.project_keys(self._keys(_pooled(keys, low.shape[2]), low))
        return block_.attend(q, k, low if values is None else values, None)

    def _keys(self, image_keys: Tensor, low: Tensor) -> Tensor:
        model, grid = self.model, low.shape[2:]
        unification, *blocks = model.key_features_encoder
        unified = unify_features(F.normalize(low, dim=1), unification.basis).flatten(2).transpose(1, 2)
        for layers in blocks:
            unified = block(unified, layers, False)
        both = torch.cat((image_keys, unified.transpose(1, 2).unflatten(2, grid)), 1)
        convolution, *blocks = model.aggregation
        joined = F.conv2d(F.pad(both, (1,) * 4, mode="reflect"), convolution.weight).flatten(2).transpose(1, 2)
        for layers in blocks:
            joined = block(joined, layers, False)
        return joined.unflatten(1, grid)


def _pooled(pixels: Tensor, side: int) -> Tensor:
    across = math.isqrt(pixels.shape[1])
    return F.avg_pool2d(pixels.transpose(1, 2).unflatten(2, (across, across)), across // side)


class Samples:
    """What steps learn from; `late` steps have larger guidance images."""

    def __init__(self, guidance: Tensor, maps: dict[str, Maps], labelled: Sequence[Labelled] = ()) -> None:
        self._labelled = labelled
        self._guidance, self._maps = guidance, maps
        some = {name: of["l224"][::7].float() for name, of in maps.items()}
        self._spread = {name: (x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp_min(1e-3)) for name, x in some.items()}

    def loss(self, upsample: Forward, draw: random.Random, late: bool) -> tuple[str, Tensor]:
        """What a step has, and its loss as a share of bilinear interpolation's."""
        shares = {name: share for name, share in SHARES.items() if name != "labels" or self._labelled}
        (name,) = draw.choices(list(shares), list(shares.values()))
        if name == "labels":
            return name, self._labels(upsample, draw) @ torch.tensor(LABELS)
        encoder, _, ratio = name.rpartition(" ")
        views = len(self._maps[encoder]["l224"]) if encoder else len(self._guidance)
        chosen = [(draw.randrange(views), draw.randrange(8)) for _ in range(2 if name == "place" else 4)]
        if name == "place":
            return name, self._place(upsample, draw, chosen)
        if name == "synthetic":
            image, channels, key = self._images(chosen, 64), draw.randint(16, 96), draw.getrandbits(30)
            truth = torch.stack([synthetic_features(one, channels, key, i) for i, one in enumerate(image)])
            low = F.adaptive_avg_pool2d(truth, draw.choice((8, 16, 16, 32)))
        else:
            of = self._maps[encoder]
            pair = ("l224", "quarters") if ratio == "2x" else ("l112", "whole")
            low, truth = (_turned(of[key], chosen).float() for key in pair)
            low, truth = self._varied(encoder, low, truth, draw)
            image = self._images(chosen, _guidance_side(truth.shape[2], late, draw))
        out = upsample(image, low, truth.shape[2])
        return name, _distance(out, truth) / _distance(_bilinear(low, truth.shape[2]), truth)

    def _images(self, chosen: list[tuple[int, int]], side: int) -> Tensor:
        return _normalized(_turned(self._guidance, chosen), side)

    def _varied(self, encoder: str, low: Tensor, truth: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Both behind a random layer, with some of the channels, or as they are."""
        channels = low.shape[1]
        if draw.random() < (0.15 if encoder.startswith("dinov2") else 0.35):
            mean, spread = self._spread[encoder]
            width, generator = draw.randint(48, 160), torch.Generator().manual_seed(draw.getrandbits(40))
            weight = torch.randn(width, channels, generator=generator) / math.sqrt(channels) / spread
            bias = torch.randn(width, generator=generator) * 0.6 - 0.2 - weight @ mean
            low, truth = (torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None] for x in (low, truth))
            return (low.relu(), truth.relu()) if draw.random() < 0.75 else (low, truth)
        if draw.random() < 0.4:
            some = draw.sample(range(channels), max(8, round(channels * draw.uniform(0.3, 1))))
            return low[:, some], truth[:, some]
        return low, truth

    def _place(self, upsample: Forward, draw: random.Random, chosen: list[tuple[int, int]]) -> Tensor:
        """Of maps that are known at every pixel, carried with the weights of features of 32 x 32 cells."""
        side, key = 128, draw.getrandbits(30)
        image = self._images(chosen, side)
        low = _turned(self._maps["dinov2_s_derived"]["whole"], chosen).float()
        known = torch.stack(
            [
                torch.cat((2 * _regions(one, key + i), position_maps(one, 32, side, key, i)[:5] / 2))
                for i, one in enumerate(image)
            ]
        )
        values = F.adaptive_avg_pool2d(known, 32)
        out = upsample(image, low, side, values)
        return (out - known).square().mean() / (_bilinear(values, side) - known).square().mean()

    def _labels(self, upsample: Forward, draw: random.Random) -> Tensor:
        """Of a class at each pixel: the shares of each cell and a classifier's scores, both carried to pixels (2)."""
        of, key = draw.choice(self._labelled), draw.choice(("l224", "whole"))
        side, samples = draw.choice(((224, 1), *{"l224": [(112, 3)], "whole": [(128, 2)]}[key] * 3))
        chosen = [(draw.randrange(len(of.guidance)), draw.randrange(8)) for _ in range(samples)]
        low, scores = (_turned(maps[key], chosen).float() for maps in (of.maps, of.scores))
        truth = F.adaptive_avg_pool2d(_one_hot(_turned(of.labels, chosen), of.classes), side)
        shares, known = F.adaptive_avg_pool2d(truth, low.shape[2]), truth.sum(1, keepdim=True) > 0.99

        def errors(maps: Tensor) -> Tensor:
            of_shares, of_scores = maps.split(of.classes, 1)
            return torch.stack((((of_shares - truth).square() * known).mean(), F.cross_entropy(of_scores, truth)))

        values = torch.cat((shares, scores), 1)
        ours = errors(upsample(_normalized(_turned(of.guidance, chosen), side), low, side, values))
        return ours / errors(_bilinear(values, side))


class Labelled:
    """Views with a class at each pixel, in the order of their names, and scores of the classes for each cell.

    `guidance` (N, 3, 224, 224) and `labels` (N, 224, 224) are bytes; `maps` are as those of photographs. The scores of
    either half are a linear classifier's that learned from the other half: they have the errors of a real probe.
    """

    def __init__(self, guidance: Tensor, labels: Tensor, maps: Maps) -> None:
        self.guidance, self.labels, self.maps = guidance, labels, maps
        self.classes = int(labels[labels < VOID].max()) + 1
        halves = torch.arange(len(labels)).chunk(2)
        fitted = [self._classifier(half) for half in reversed(halves)]
        self.scores = {
            key: torch.cat([F.conv2d(of[half].float(), *one) for half, one in zip(halves, fitted, strict=True)])
            for key, of in maps.items()
        }

    def _classifier(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (K, C, 1, 1) and bias (K) of logistic regression from cells to the shares of their pixels."""
        low = self.maps["l224"][chosen].float()
        shares = F.adaptive_avg_pool2d(_one_hot(self.labels[chosen], self.classes), low.shape[2])
        weight = torch.zeros(self.classes, low.shape[1], 1, 1, requires_grad=True)
        bias = torch.zeros(self.classes, requires_grad=True)
        optimizer, draw = torch.optim.AdamW((weight, bias), 2e-3), torch.Generator().manual_seed(0)
        for _ in range(600):
            some = torch.randint(len(low), (8,), generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(F.conv2d(low[some], weight, bias), shares[some]).backward()
            optimizer.step()
        return weight.detach(), bias.detach()


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, H, W) as (B, K, H, W); none of the classes where it is void."""
    return F.one_hot(labels.long().clamp_max(classes), classes + 1)[..., :-1].movedim(-1, 1).float()


def _turned(maps: Tensor, chosen: list[tuple[int, int]]) -> Tensor:
    return torch.stack([turn(maps[i], t) for i, t in chosen])


def _normalized(pixels: Tensor, side: int) -> Tensor:
    return normalize_imagenet(resize(pixels.float() / 255, (side, side)))


def _regions(image: Tensor, key: int) -> Tensor:
    """Ten soft regions (10, G, G) of an image (3, G, G): labels, nearly; each of zero mean."""
    side, generator = image.shape[2], torch.Generator().manual_seed(key)
    scales = [_bilinear(F.adaptive_avg_pool2d(image[None], side // pixels), side)[0] for pixels in (2, 4, 8)]
    seen = torch.cat((image, *scales))
    layer = torch.randn(10, len(seen), generator=generator) / 2
    hidden = torch.einsum("hc,cyx->hyx", layer, seen) + torch.randn(10, 1, 1, generator=generator)
    regions = (8 * hidden).softmax(0)
    return regions - regions.mean((1, 2), keepdim=True)


def _guidance_side(out: int, late: bool, draw: random.Random) -> int:
    """Multiples of the result's side, which is 28, 32 or 56."""
    larger = draw.random() < ({28: 0.6, 32: 0.7, 56: 0.8}[out] if late else {28: 0.0, 32: 0.0, 56: 0.4}[out])
    return ({28: 112, 32: 96, 56: 112} if larger else {28: 56, 32: 64, 56: 56})[out]


def _bilinear(low: Tensor, side: int) -> Tensor:
    return F.interpolate(low, (side, side), mode="bilinear")


def _distance(maps: Tensor, truth: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(maps, truth, dim=1)).mean()


class Muon:
    """Muon for the matrices of 64 columns and more, with steps as large as AdamW's, and AdamW for the others."""

    def __init__(self, model: nn.Module) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._matrices = {n: p for n, p in named.items() if p.dim() > 1 and p.shape[1] >= 64 and "rope" not in n}
        self._momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self.parameters = list(named.values())
        others = [p for name, p in named.items() if name not in self._matrices]
        self._others = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=1e-5)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change all parameters by their gradients."""
        for group in self._others.param_groups:
            group["lr"] = rate
        self._others.step()
        for name, parameter in self._matrices.items():
            assert parameter.grad is not None
            momentum = self._momentum[name].mul_(0.95).add_(parameter.grad)
            ahead = parameter.grad.add(momentum, alpha=0.95).flatten(1)
            # Queries and keys are two matrices; no result depends on the rows for values.
            parts = ahead[: 2 * ahead.shape[1]].chunk(2) if "in_proj" in name else (ahead,)
            change = torch.cat([_orthogonal(part) * 0.2 * math.sqrt(max(part.shape)) for part in parts])
            parameter.flatten(1)[: len(change)].sub_(change, alpha=rate)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Its singular values brought near 1 by five Newton-Schulz iterations (Jordan, 2024)."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if len(matrix) <= matrix.shape[1] else x.T


def train(model: AnyUp, samples: Samples, seconds: float, most_steps: int | None = None) -> dict[str, Tensor]:
    """The average of the weights after so many seconds of the processor, or that many steps; prints each 100 steps."""
    model.train()
    model.cross_decode.cross_attn.attention.out_proj.requires_grad_(False)
    model.key_features_encoder[0].requires_grad_(False)
    optimizer, upsample = Muon(model), Forward(model)
    current = model.state_dict()
    average = {name: tensor.clone() for name, tensor in current.items()}
    step, begin, shares = 0, time.process_time(), list[float]()
    while (done := (time.process_time() - begin) / seconds) < 1 and step != most_steps:
        name, share = samples.loss(upsample, random.Random(step), done > LATE)
        model.zero_grad()
        (share * WEIGHTS.get(name, 1.0)).backward()
        nn.utils.clip_grad_norm_(optimizer.parameters, CLIP, error_if_nonfinite=True)
        step += 1
        optimizer.step(RATE * min(1, step / WARMUP) * (1 + math.cos(math.pi * done)) / 2)
        kept = min(AVERAGE, step / (step + 9))
        torch._foreach_lerp_(list(average.values()), list(current.values()), 1 - kept)
        shares += [] if name in WEIGHTS else [share.item()]
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}: {sum(shares) / len(shares):.4f} of bilinear's 1 - cosine", flush=True)
            shares.clear()
    return average


def main() -> None:
    """Write the trained weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="to start from: a name or file, as for `anyup upsample --weights`")
    parser.add_argument("photographs", help="a folder; every tenth by name is held out, as in `anyup train`")
    parser.add_argument("features", type=Path, help="file of the encoders' features")
    parser.add_argument("--labelled", action="append", default=[], metavar="FOLDER", help="frames with classes; again")
    parser.add_argument("--minutes", type=float, default=75, help="of processor time (default: 75)")
    parser.add_argument("--views", type=int, default=2, help="of a photograph (default: 2)")
    parser.add_argument("-o", "--output", required=True, help="the weights to write, as .safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = {name.rsplit(" ", 1)[0] for name in SHARES if " " in name}
    if not arguments.features.is_file():
        torch.save(make_features(arguments.photographs, names, arguments.views), arguments.features)
    guidance, maps = torch.load(arguments.features)
    labelled = [make_labelled(folder) for folder in arguments.labelled]
    model = anyup.load(arguments.weights)
    model.load_state_dict(train(model, Samples(guidance, maps, labelled), 60 * arguments.minutes))
    anyup.save(model, arguments.output)


if __name__ == "__main__":
    main()
