"""Encoders of other packages as `Encoder`: each adapter wraps a module that is already built.

Building one from its name imports the package then, and no earlier; an ImportError says what to install.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from math import isqrt
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anyup.installing import pip_install

from .encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder, Layer, tokens_to_map

_T = TypeVar("_T")

_PROBE_SIZE = 224


def _require(package: str) -> ModuleType:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # a torchvision beside another torch than its own raises RuntimeError
        raise ImportError(
            f"encoders '{package}/...' need the package {package}, which does not import here ({error}): "
            f"{pip_install(package)}"
        ) from error


def _triple(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Three floats from a configuration's list; the default where it says nothing."""
    if values is None or len(values) != 3:
        return default
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _square(patch: Any) -> int | None:
    """Patch size as one integer, from an integer or a pair of equal ones."""
    if patch is None or isinstance(patch, int):
        return patch
    rows, columns = patch
    if rows != columns:
        raise ValueError(f"patch size: expected a square patch, got {rows} x {columns}")
    return int(rows)


def _on_empty_image(encoder: Encoder, size: int, run: Callable[[Tensor], _T]) -> _T:
    """What a function of the network makes of an empty square image; nothing of the network changes."""
    like = next(encoder.parameters())
    training = encoder.training
    encoder.eval()  # or the empty image would enter the running statistics of BatchNorm
    try:
        with torch.no_grad():
            return run(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))
    finally:
        encoder.train(training)


def _channels_and_stride(features: Tensor, size: int) -> tuple[int, int]:
    """Of a map (1, C, h, w) of a square image."""
    return features.shape[1], round(size / features.shape[2])


def _is_channels_last(features: Tensor) -> bool:
    """Whether a map of a square image is (B, h, w, C), as of a Swin's layers: otherwise its last sides are equal."""
    return features.shape[2] != features.shape[3]


def _channels_first(features: Tensor) -> Tensor:
    """A map of a square image, either way, as (B, C, h, w)."""
    return features.permute(0, 3, 1, 2) if _is_channels_last(features) else features


class TimmEncoder(Encoder):
    """A timm model: its last feature map, under the final norm where the model has one.

    ``layer`` chooses among the intermediate maps that timm offers for the model (blocks of a ViT, stages of a
    CNN), counted from 0; None is the last. Needs a model with ``forward_intermediates`` (timm 1.0 or newer).
    """

    def __init__(self, module: nn.Module, *, layer: int | None = None, name: str = "timm") -> None:
        table: Any = getattr(module, "feature_info", None)
        if table is None or not hasattr(module, "forward_intermediates"):
            raise ValueError(f"module: {type(module).__name__} has no forward_intermediates; timm 1.0 models have it")
        table = getattr(table, "info", table)
        if layer is not None and not 0 <= layer < len(table):
            raise ValueError(f"layer: expected one of the maps 0 to {len(table) - 1}, got {layer}")
        row = table[-1 if layer is None else layer]
        config: Any = getattr(module, "pretrained_cfg", None) or {}
        embed = getattr(module, "patch_embed", None)
        super().__init__(
            name,
            channels=int(row["num_chs"]),
            stride=int(row["reduction"]),
            patch_size=_square(getattr(embed, "patch_size", None)),
            mean=_triple(config.get("mean"), IMAGENET_MEAN),
            std=_triple(config.get("std"), IMAGENET_STD),
            layers=[(int(row["num_chs"]), int(row["reduction"])) for row in table],
        )
        self.module = module
        self.layer = layer

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        result: Tensor = self._last_map(image)
        return result.contiguous()

    def tokens(self, image: Tensor) -> Tensor:
        """See `Encoder.tokens`; register tokens are dropped."""
        # Networks without a class token have no such attribute, or None; those with one put it before all others.
        if getattr(self.module, "cls_token", None) is None:
            return super().tokens(image)
        patches, prefix = self._last_map(image, return_prefix_tokens=True)
        return torch.cat([prefix[:, :1], patches.flatten(2).mT], dim=1)

    def _last_map(self, image: Tensor, **options: Any) -> Any:
        run: Any = self.module.forward_intermediates
        indices = 1 if self.layer is None else [self.layer]  # an integer counts maps from the end
        return run(image, indices=indices, norm=True, output_fmt="NCHW", intermediates_only=True, **options)[-1]


class TransformersEncoder(Encoder):
    """A vision model of Hugging Face transformers: ``last_hidden_state`` as a map.

    Patch tokens are laid out on the image's grid (class and register tokens dropped); a model that returns a
    map (ResNet, ConvNeXt) is taken as it is. Of a model of images and texts (CLIP, SigLIP) the part for images
    runs, and a masked autoencoder hides nothing. ``layer`` chooses among the model's ``hidden_states``, counted
    from 0 (the embedding, in most models): blocks of a ViT, stages of a Swin or ConvNeXt, without a final norm.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        layer: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        name: str = "transformers",
    ) -> None:
        parts = (getattr(module, part, None) for part in ("vision_model", "vision_tower"))
        module = next((part for part in parts if isinstance(part, nn.Module)), module)
        config: Any = getattr(module, "config", None)
        width = getattr(config, "hidden_size", None)
        patch = _square(getattr(config, "patch_size", None)) if width else None
        super().__init__(name, channels=width or 0, stride=patch or 0, patch_size=patch, mean=mean, std=std)
        self.module = module
        # ViT and DeiT refuse other sizes than the trained one unless told; Dinov2 needs no telling.
        accepts = inspect.signature(module.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepts else {}
        self._shuffles = "noise" in accepts and hasattr(config, "mask_ratio")
        if self._shuffles:
            config.mask_ratio = 0.0
        self.layer = layer
        if layer is not None or hasattr(config, "depths"):
            self.options["output_hidden_states"] = True
        if patch is None or "output_hidden_states" in self.options:
            features = _on_empty_image(self, _PROBE_SIZE, self.features)
            self.channels, self.stride = _channels_and_stride(features, _PROBE_SIZE)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        hidden, output = self._hidden(image)
        return self._as_map(hidden, output, image)

    def tokens(self, image: Tensor) -> Tensor:
        """See `Encoder.tokens`; register tokens are dropped."""
        hidden, output = self._hidden(image)
        patches = self._as_map(hidden, output, image).flatten(2).mT
        if hidden.ndim != 3 or hidden.shape[1] == patches.shape[1]:
            return super().tokens(image)
        return torch.cat([hidden[:, :1], patches], dim=1)

    def list_layers(self) -> list[Layer]:
        """The hidden states, as the model gives them for an empty square image."""

        def run(image: Tensor) -> list[Tensor]:
            output = self._run(image, **{**self.options, "output_hidden_states": True})
            return [self._as_map(state, output, image) for state in _hidden_states(output)]

        states = _on_empty_image(self, _PROBE_SIZE, run)
        return [Layer(str(i), *_channels_and_stride(state, _PROBE_SIZE)) for i, state in enumerate(states)]

    def _hidden(self, image: Tensor) -> tuple[Tensor, Any]:
        """The chosen hidden state, of tokens or a map, and all that the model gives."""
        output = self._run(image, **self.options)
        if self.layer is None:
            return output.last_hidden_state, output
        states = _hidden_states(output)
        if not 0 <= self.layer < len(states):
            raise ValueError(f"layer: {self.name} has the hidden states 0 to {len(states) - 1}, got {self.layer}")
        return states[self.layer], output

    def _run(self, image: Tensor, **options: Any) -> Any:
        if self._shuffles and self.patch_size:  # by the order of this noise, masked or not
            rows, columns = (length // self.patch_size for length in image.shape[-2:])
            options["noise"] = torch.arange(rows * columns, device=image.device).expand(len(image), -1)
        return self.module(pixel_values=image, **options)

    def _as_map(self, hidden: Tensor, output: Any, image: Tensor) -> Tensor:
        if hidden.ndim == 4:
            return hidden
        if maps := getattr(output, "reshaped_hidden_states", None):
            rows, columns = maps[-1].shape[2:]
        elif self.patch_size is not None:
            rows, columns = (length // self.patch_size for length in image.shape[-2:])
        else:
            raise ValueError(f"{self.name}: gives tokens, but its configuration names no patch size and width")
        return tokens_to_map(hidden, (rows, columns), self.name)


def _hidden_states(output: Any) -> Sequence[Tensor]:
    """As maps (B, C, h, w) where the model's stages have tokens and it lays them out itself."""
    states: Sequence[Tensor] = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
    return states


class TorchvisionEncoder(Encoder):
    """Output of one submodule of a torchvision model, by its dotted name: ``layer4``, ``features.13``.

    The layer gives a map (B, C, h, w) or (B, h, w, C), or tokens (B, N, C) of a square image. Layers behind it run
    too, for a model can only be run as a whole.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        name: str = "torchvision",
    ) -> None:
        names = [path for path, _ in module.named_modules() if path]
        if layer not in names:
            shown = [path for path in names if path.count(".") <= layer.count(".")]
            raise ValueError(f"layer: {name} has no layer {layer!r}; it has {', '.join(shown[:40])}")
        patch = _square(getattr(module, "patch_size", None))
        super().__init__(name, channels=0, stride=0, patch_size=patch, mean=mean, std=std)
        self.module = module
        self.layer = layer
        self._probe_size = int(getattr(module, "image_size", _PROBE_SIZE))
        self._channels_last = False
        features = _on_empty_image(self, self._probe_size, self.features)
        self._channels_last = _is_channels_last(features)
        self.channels, self.stride = _channels_and_stride(_channels_first(features), self._probe_size)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        output = self._outputs(image, [self.layer]).get(self.layer)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer: {self.name} gives {shape}; expected a map (B, C, h, w) or tokens (B, N, C)")
        features = self._as_map(output, image)
        return features.permute(0, 3, 1, 2) if self._channels_last else features

    def list_layers(self) -> list[Layer]:
        """The outer layers (names with one dot at most) that give more than one cell of an empty square image."""
        names = [path for path, _ in self.module.named_modules() if path and path.count(".") < 2]

        def run(image: Tensor) -> dict[str, Tensor]:
            outputs = self._outputs(image, names)
            tensors = {name: out for name, out in outputs.items() if isinstance(out, Tensor) and out.ndim in (3, 4)}
            return {name: self._as_map(out, image) for name, out in tensors.items()}

        size = self._probe_size
        found = _on_empty_image(self, size, run)
        maps = {name: _channels_first(output) for name, output in found.items()}
        return [Layer(name, *_channels_and_stride(m, size)) for name, m in maps.items() if m[0, 0].numel() > 1]

    def _outputs(self, image: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """What these layers give, those alone that run; of one that runs several times, the last."""
        caught: dict[str, Any] = {}
        handles = []
        for name in names:
            note = functools.partial(lambda name, module, inputs, output: caught.update({name: output}), name)
            handles.append(self.module.get_submodule(name).register_forward_hook(note))
        try:
            self.module(image)
        finally:
            for handle in handles:
                handle.remove()
        return caught

    def _as_map(self, output: Tensor, image: Tensor) -> Tensor:
        if output.ndim == 4:
            return output
        side = image.shape[-2] // self.patch_size if self.patch_size else isqrt(output.shape[1])
        return tokens_to_map(output, (side, side), self.name)


def timm_encoder(model: str, *, pretrained: bool = True, layer: int | None = None, **arguments: Any) -> TimmEncoder:
    """Build ``timm/<model>``, a ViT for any image size; further arguments go to ``timm.create_model``."""
    timm = _require("timm")
    arguments = {"pretrained": pretrained, "num_classes": 0, **arguments}
    try:
        module = timm.create_model(model, **{"dynamic_img_size": True, **arguments})
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        module = timm.create_model(model, **arguments)  # a network without a position embedding
    return TimmEncoder(module, layer=layer, name=f"timm/{model}" + ("" if layer is None else f":{layer}"))


def transformers_encoder(
    model: str, *, pretrained: bool = True, layer: int | None = None, **arguments: Any
) -> TransformersEncoder:
    """Build ``transformers/<model>``, by hub name or folder; arguments go to ``AutoModel.from_pretrained``.

    Not ``pretrained``, it has random weights, and the configuration alone is read. The normalisation is that of
    the model's ``preprocessor_config.json``, ImageNet's where it has none.
    """
    transformers = _require("transformers")
    if pretrained:
        module = transformers.AutoModel.from_pretrained(model, **arguments)
    else:
        module = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(model, **arguments))
    config = _preprocessor_config(model)
    return TransformersEncoder(
        module,
        layer=layer,
        mean=_triple(config.get("image_mean"), IMAGENET_MEAN),
        std=_triple(config.get("image_std"), IMAGENET_STD),
        name=f"transformers/{model}" + ("" if layer is None else f":{layer}"),
    )


def _preprocessor_config(model: str) -> dict[str, Any]:
    """The model's preprocessor settings, read as a file: building a processor needs torchvision or PIL."""
    cached_file = importlib.import_module("transformers.utils").cached_file
    path = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        config: dict[str, Any] = json.load(file)
    return config


def torchvision_encoder(
    model: str, layer: str | None, *, weights: Any = "DEFAULT", **arguments: Any
) -> TorchvisionEncoder:
    """Build ``torchvision/<model>:<layer>``; ``weights`` as ``torchvision.models.get_model`` takes them.

    Without a layer it is the first one: for who wants to list them.
    """
    models = _require("torchvision").models
    module = models.get_model(model, weights=weights, **arguments)
    layer = layer or next(path for path, _ in module.named_modules() if path)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if weights is not None:
        chosen = models.get_model_weights(model)[weights] if isinstance(weights, str) else weights
        preset = chosen.transforms()
        mean, std = _triple(getattr(preset, "mean", None), mean), _triple(getattr(preset, "std", None), std)
    return TorchvisionEncoder(module, layer, mean=mean, std=std, name=f"torchvision/{model}:{layer}")
