"""Give trained weights a sense of place as fine as a cell, so that more training can start from it.

    python tools/add_place_channels.py anyup_mini data.photographs=photographs -o placed.safetensors

Rotary phases that are trained from their initial values keep frequencies of at most one turn an image: no sum of such
waves tells a pixel's own cell from the next. Here the channels that matter least make room for waves of 15 and 7 turns,
which are those of `anyup.training.initial`. They pass the encoders as they are, and each head adds their inner product
to its logits. Which channels matter least is measured: by the squared derivative of the reconstruction's loss with
respect to how much of a channel's variation over the image remains. What a head computed with all of its channels, it
computes with the fewer that are left as the best approximation of that rank, over the queries and keys measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import anyup
from anyup.layers import Encoder
from anyup.model import AnyUp
from anyup.ops.feature_distance import feature_distance
from anyup.photographs import find_photographs
from anyup.reporting import Reporter
from anyup.training import config, samples
from anyup.training.distributed import Engine
from anyup.training.preparation import prepare
from anyup.training.samples import Batch
from anyup.training.trainer import make_upsampler

FREQUENCIES = (15.0, 7.0)
"""Turns of the waves along the image: `anyup.training.initial.FREQUENCIES` but for the slow one, which weights have."""

LOGITS = (1.06, 1.5)
"""What each wave adds to the logit of the pixel's own place, along each axis, where the strength is 1."""

Tap = Callable[[str, Tensor], Tensor]


def forward(model: AnyUp, batch: Batch, tap: Tap) -> Tensor:
    """The upsampled features, by plain torch; `tap` sees the maps between the stages, and may change them."""
    size, grid = (batch.side, batch.side), batch.low.shape[2:]
    e = _encode(model.image_encoder, batch.guidance)
    rows, columns = (torch.linspace(0, 1, side) for side in e.shape[2:])
    angle = rows[:, None, None] * model.rope.freqs[0] + columns[:, None] * model.rope.freqs[1]
    first, second = e.chunk(2, 1)
    angle = angle.permute(2, 0, 1)
    e = tap("encoded", e * angle.cos() + torch.cat((-second, first), 1) * angle.sin())
    q = F.adaptive_avg_pool2d(tap("query", _encode(model.query_encoder, e)), size)
    k = F.adaptive_avg_pool2d(tap("key", _encode(model.key_encoder, e)), grid)
    k = torch.cat((k, model.key_features_encoder(F.normalize(batch.low, dim=1))), 1)
    k = tap("aggregated", _encode(model.aggregation, k))
    block = model.cross_decode
    q = tap("convolved", F.conv2d(q, block.conv2d.weight, padding=1))
    attention = block.cross_attn
    q = tap("normed query", attention.norm_q(q.permute(0, 2, 3, 1)))
    k = tap("normed key", attention.norm_k(k.permute(0, 2, 3, 1)))
    weight, bias = (x.chunk(3) for x in (attention.attention.in_proj_weight, attention.attention.in_proj_bias))
    queries, keys = (block.split_heads(F.linear(x, w, b)) for x, w, b in zip((q, k), weight, bias, strict=False))
    return block.attend(queries, keys, batch.low, None)


def _encode(encoder: Encoder, x: Tensor) -> Tensor:
    weight = encoder[0].weight
    half = weight.shape[2] // 2
    x = F.conv2d(F.pad(x, (half,) * 4, mode="reflect"), weight)
    for block in (encoder[1], encoder[2]):
        norm1, _, conv1, norm2, _, conv2 = block.block
        x = x + F.conv2d(F.silu(norm2(F.conv2d(F.silu(norm1(x)), conv1.weight))), conv2.weight)
    return x


STREAMS = ("query", "key", "aggregated", "convolved")
"""The maps after `encoded` whose channels are replaced."""


@torch.enable_grad()
def importance(model: AnyUp, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of each channel (D,) of `encoded` and the streams."""
    total = {name: torch.zeros(model.qk_dim) for name in ("encoded", *STREAMS)}
    for batch in batches:
        kept = {name: torch.ones(model.qk_dim, requires_grad=True) for name in total}

        def fade(name: str, x: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            if name not in kept:
                return x
            mean = x.mean((0, 2, 3), keepdim=True)
            return mean + (x - mean) * kept[name][:, None, None]

        cosine, _ = feature_distance(forward(model, batch, fade), batch.targets, batch.places)
        loss = cosine.mean()
        for name, slope in zip(kept, torch.autograd.grad(loss.log(), list(kept.values())), strict=True):
            total[name] += slope.square()
    return total


@torch.no_grad()
def moments(model: AnyUp, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean squares (D,) of the streams; second moments of the normed queries with a one appended, (D + 1, D + 1), of
    the normed keys about their mean, which no softmax sees, (D, D), and the keys' mean squares, "key squares" (D,).
    """
    total: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        total[name] = total.get(name, torch.zeros(())) + x / len(batches)

    def look(name: str, x: Tensor) -> Tensor:
        if name in STREAMS:
            add(name, x.square().mean((0, 2, 3)))
        elif name.startswith("normed"):
            rows = x.flatten(0, 2).double()
            if name == "normed query":
                rows = torch.cat((rows, torch.ones(len(rows), 1)), 1)
            else:
                add("key squares", rows.square().mean(0))
                rows = rows - rows.mean(0)
            add(name, rows.T @ rows / len(rows))
        return x

    for batch in batches:
        forward(model, batch, look)
    return total


def add_place_channels(model: AnyUp, batches: Sequence[Batch], strength: float) -> None:
    """Replace the least important channels of a model by waves of place, as the module says.

    Raises ValueError where the strength is not above 0, or a head has no room for the waves.
    """
    replace(model, importance(model, batches), moments(model, batches), strength)


@torch.no_grad()
def replace(model: AnyUp, measured: dict[str, Tensor], squares: dict[str, Tensor], strength: float) -> None:
    """The same by what is measured: the channels' importance, and the moments."""
    count, quarter, get = 4 * len(FREQUENCIES), model.qk_dim // 4, model.get_parameter
    heads = model.cross_decode.num_heads
    if strength <= 0 or model.qk_dim // heads <= count:
        raise ValueError(
            f"expected a strength above 0 and heads of more than {count} channels, got {strength} and {heads} heads of "
            f"{model.qk_dim // heads}"
        )
    first = measured["encoded"].view(4, quarter).sum(0).argsort()[: len(FREQUENCIES)]
    encoded = first[:, None] + quarter * torch.arange(4)  # a row of channels for each wave
    chosen = {name: measured[name].argsort()[:count] for name in STREAMS}
    _start_waves(model, encoded)
    size = {name: (2 * squares[name][chosen[name]].mean()).sqrt() for name in STREAMS}  # a wave's mean square is 1/2
    for encoder, name in (("query_encoder", "query"), ("key_encoder", "key")):
        _pass(get(f"{encoder}.0.weight"), encoded.flatten(), chosen[name], size[name])
        _leave_alone(model, encoder, chosen[name])
    _pass(get("aggregation.0.weight"), chosen["key"], chosen["aggregated"], size["aggregated"] / size["key"])
    _leave_alone(model, "aggregation", chosen["aggregated"])
    _pass(get("cross_decode.conv2d.weight"), chosen["query"], chosen["convolved"], size["convolved"] / size["query"])
    _project(model, chosen["convolved"], chosen["aggregated"], squares, strength)


def _start_waves(model: AnyUp, encoded: Tensor) -> None:
    """The image encoder gives ones in the first and last channel of each row of `encoded`, zeros in the other two,
    which the rotation turns into cosines and sines of row and column."""
    get, every = model.get_parameter, encoded.flatten()
    get("image_encoder.0.weight")[every] = 0
    _leave_alone(model, "image_encoder", every)
    last, gain = get("image_encoder.2.block.5.weight"), get("image_encoder.2.block.3.weight")
    least = int((last[:, :, 0, 0].norm(dim=0) * gain.abs()).argmin())  # a hidden channel, to be a one
    gain[least], get("image_encoder.2.block.3.bias")[least] = 0, 1
    last[:, least] = 0
    last[encoded[:, [0, 3]], least] = 1 / F.silu(torch.tensor(1.0))
    frequencies = 2 * math.pi * torch.tensor(FREQUENCIES)[:, None]
    model.rope.freqs[:, every] = 0
    model.rope.freqs[0, encoded[:, :2]] = frequencies
    model.rope.freqs[1, encoded[:, 2:]] = frequencies


def _leave_alone(model: AnyUp, encoder: str, channels: Tensor) -> None:
    """The blocks of an encoder neither read nor change these channels."""
    for block in (1, 2):
        model.get_parameter(f"{encoder}.{block}.block.2.weight")[:, channels] = 0
        model.get_parameter(f"{encoder}.{block}.block.5.weight")[channels] = 0


def _pass(weight: Tensor, read: Tensor, written: Tensor, size: Tensor) -> None:
    """A convolution whose channels `written` are `size` times its channels `read`, which no other one reads."""
    centre = weight.shape[2] // 2
    weight[:, read], weight[written] = 0, 0
    weight[written, read, centre, centre] = size


def _project(model: AnyUp, query: Tensor, key: Tensor, squares: dict[str, Tensor], strength: float) -> None:
    """Each head's logits: the best approximation of what they were by the other channels, and the waves."""
    dim, heads = model.qk_dim, model.cross_decode.num_heads
    width, rank = dim // heads, dim // heads - len(query)
    attention = model.cross_decode.cross_attn
    attention.norm_q.weight[query] = attention.norm_q.weight.mean()
    attention.norm_k.weight[key] = attention.norm_k.weight.mean()
    of_queries, of_keys = squares["normed query"], squares["normed key"]
    others_q = torch.ones(dim + 1, dtype=torch.bool).index_fill(0, query, False)
    others_k = torch.ones(dim, dtype=torch.bool).index_fill(0, key, False)
    root_q, root_k = (
        torch.linalg.cholesky(x[kept][:, kept] + 1e-6 * torch.eye(int(kept.sum())))
        for x, kept in ((of_queries, others_q), (of_keys, others_k))
    )
    size = 2 * (of_queries.diagonal()[query].mean() * squares["key squares"][key].mean()).sqrt()
    waves = torch.tensor(LOGITS).repeat_interleave(4) * strength * math.sqrt(width) / size
    weight, bias = attention.attention.in_proj_weight, attention.attention.in_proj_bias
    for head in range(heads):
        q, k = (slice(start + head * width, start + (head + 1) * width) for start in (0, dim))
        was = torch.cat((weight[q], bias[q, None]), 1).double()
        was[:, dim] += was[:, query] @ of_queries[dim, query]  # what the replaced channels gave on average
        u, s, v = torch.linalg.svd(root_q.T @ was[:, others_q].T @ weight[k].double()[:, others_k] @ root_k)
        s = s[:rank].sqrt()
        new_q, new_k = torch.zeros(width, dim + 1), torch.zeros(width, dim)
        new_q[:rank, others_q] = torch.linalg.solve(root_q.T, u[:, :rank] * s).T.float()
        new_k[:rank, others_k] = torch.linalg.solve(root_k.T, v[:rank].T * s).T.float()
        new_q[torch.arange(rank, width), query] = new_k[torch.arange(rank, width), key] = waves.sqrt().float()
        weight[q], bias[q], weight[k], bias[k] = new_q[:, :dim], new_q[:, dim], new_k, 0


def main() -> None:
    """Write the weights with place channels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a name or file, as for `anyup upsample --weights`")
    parser.add_argument("settings", nargs="+", help="of a training; data.photographs is needed")
    parser.add_argument("--config", default="mini", help="as for `anyup train` (default: mini)")
    parser.add_argument("--strength", type=float, default=0.5, help="of the waves, above 0")
    parser.add_argument("--batches", type=int, default=20, help="of the training, to measure on (default: 20)")
    parser.add_argument("-o", "--output", required=True, help="the weights to write, as .safetensors")
    arguments = parser.parse_args()
    settings = config.read(arguments.config, [*arguments.settings, f"model.weights={arguments.weights}"])
    model = make_upsampler(settings).eval()
    prepared = prepare(settings, find_photographs(settings.data.photographs), Engine(torch.device("cpu")), Reporter())
    batches = []
    for number in range(arguments.batches):
        step = samples.plan(settings, prepared.source, len(prepared.paths), number, number * settings.optimizer.batch)
        batches.append(samples.assemble(step, step.samples, prepared.source, prepared.paths, settings.seed))
    add_place_channels(model, batches, arguments.strength)
    anyup.save(model, arguments.output)


if __name__ == "__main__":
    main()
