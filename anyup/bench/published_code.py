"""The published implementation from somebody's checkout of wimmerth/anyup, beside ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyup import AnyUp
from anyup.bench import cases
from anyup.bench.cases import Sizes

DENSE = "published_code"
NEIGHBOURHOOD = "published_code/natten"
CASES = (DENSE, NEIGHBOURHOOD)
"""What a checkout can be asked for: its masked attention, and its variant by NATTEN, whose windows are others."""

_PACKAGE = "anyup"
_SHARED = ("input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "window_ratio", "num_heads", "lfu_dim")


class PublishedCode:
    """The class `AnyUp` of a checkout.

    Args:
        checkout: the folder that holds its package `anyup`.

    Attributes:
        folder: that folder, resolved.

    Raises ValueError, before anything of it runs, where the folder is no such checkout, and ImportError where its
    code does not import here.
    """

    def __init__(self, checkout: str | Path) -> None:
        folder = Path(checkout).resolve()
        if not (folder / _PACKAGE / "model.py").is_file():
            raise ValueError(f"published: expected a checkout of wimmerth/anyup (with anyup/model.py), got {checkout}")
        if folder == Path(__file__).resolve().parents[2]:
            raise ValueError(f"published: expected a checkout of wimmerth/anyup, {checkout} is this package itself")
        with _in_place_of_ours(folder):
            module = importlib.import_module(f"{_PACKAGE}.model")
            found = getattr(module, "AnyUp", None)
        if not isinstance(found, type):
            raise ValueError(f"published: expected a class AnyUp in {folder / _PACKAGE / 'model.py'}, found none")
        self.folder = folder
        self._class: Any = found
        self._make_attention: Callable[..., nn.Module] | None = getattr(module, "setup_cross_attention_block", None)

    def with_weights_of(self, model: AnyUp, *, natten: bool = False) -> nn.Module:
        """A published model with the arguments and weights of one of ours, in eval mode, its device and its dtype.

        Raises NotImplementedError where its variant by NATTEN cannot be had.
        """
        made: nn.Module = self._class(**{name: model.config[name] for name in _SHARED})
        made.load_state_dict(model.state_dict())
        if natten:
            made.cross_decode = self._by_natten(made.cross_decode, model)
        return made.to(model.rope.freqs).eval()

    def build(self, case: str, sizes: Sizes) -> cases.Call:
        """The forward of one of `CASES`, as `anyup.bench.cases.build` builds ours.

        Raises NotImplementedError as `with_weights_of` does, ValueError for an unknown case.
        """
        if case not in CASES:
            raise ValueError(f"case: expected one of {', '.join(CASES)}, got {case!r}")
        natten = case == NEIGHBOURHOOD
        model = self.with_weights_of(cases.model(sizes.dtype, sizes.device), natten=natten)
        image, features = sizes.inputs()
        # The variant counts its chunks in rows of the features.
        chunk = None if natten else sizes.chunk

        def run() -> Tensor:
            out: Tensor = model(image, features, q_chunk_size=chunk)
            return out

        return torch.inference_mode()(run)

    def _by_natten(self, dense: Any, model: AnyUp) -> nn.Module:
        """The variant takes its weights from the dense block: its own have other names."""
        if self._make_attention is None:
            raise NotImplementedError("this checkout has no variant by NATTEN")
        arguments = {name: model.config[name] for name in ("qk_dim", "num_heads", "window_ratio")}
        made = self._make_attention(use_natten=True, use_params_from=dense, **arguments)
        if type(made) is type(dense):
            raise NotImplementedError("the checkout cannot import natten and falls back to its masked attention")
        return made


def has_natten() -> bool:
    """Whether the published code's second variant can run."""
    return find_spec("natten") is not None


@contextmanager
def _in_place_of_ours(folder: Path) -> Iterator[None]:
    """Import packages called `anyup` from this folder, and put ours back afterwards."""

    def taken() -> dict[str, Any]:
        return {n: m for n, m in sys.modules.items() if n == _PACKAGE or n.startswith(_PACKAGE + ".")}

    ours = taken()
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(ours)
