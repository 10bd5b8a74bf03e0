"""Where stored weights are, what a file of them holds, and the model that they fit.

The shapes in a state dict give the model's widths, but neither the number of heads nor the window. ``save``
writes the constructor's arguments beside the weights and ``load`` reads them back.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from anyup import assets, hugging_face
from anyup.devices import usable_device
from anyup.finite import not_finite
from anyup.images import check_readable, complete_or_absent
from anyup.network import ModelBackend, Network
from anyup.ops.parallel import on_one_thread
from anyup.suggestions import did_you_mean
from anyup.tensor_files import TORCH_SUFFIXES, read_safetensors, read_torch, safetensors_package, unfit

Model = TypeVar("Model", bound=Network)

_logger = logging.getLogger(__name__)

_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
_CONFIG_KEY = "config"
_SAFETENSORS_CONFIG_KEY = "anyup_config"
# The keys under which a training checkpoint may hold its weights; the first that exists counts.
_STATE_DICT_KEYS = ("anyup", "state_dict")
# Seconds without a byte from the server. Without this limit a network that drops packets would block a call for long.
_DOWNLOAD_TIMEOUT = 20.0


class CheckpointNotFoundError(FileNotFoundError, ValueError):
    """Neither the name of a checkpoint nor an existing file."""


class DownloadError(OSError):
    """A published checkpoint is not in the cache and could not be downloaded."""


@dataclass(frozen=True)
class NamedCheckpoint:
    """A published checkpoint: where it comes from and what may be done with it."""

    url: str
    trained_on: str
    licence: str

    @property
    def path(self) -> Path:
        """The file in torch.hub's cache, whether or not it is there yet."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rsplit("/", 1)[-1]


_RELEASES = "https://github.com/wimmerth/anyup/releases/download"

#: The published checkpoints, which ``load`` downloads once.
NAMED: dict[str, NamedCheckpoint] = {
    "anyup": NamedCheckpoint(
        url=f"{_RELEASES}/checkpoint/anyup_paper.pth",
        trained_on="features of DINOv2 ViT-S/14",
        licence="CC-BY-4.0",
    ),
    "anyup_multi_backbone": NamedCheckpoint(
        url=f"{_RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
        trained_on="features of several backbones",
        licence="CC-BY-4.0",
    ),
}


@dataclass(frozen=True)
class PackagedCheckpoint:
    """A checkpoint of our own that comes with the package."""

    file: str
    trained_on: str
    licence: str

    @property
    def path(self) -> Path:
        """The file in the package."""
        return assets.path(self.file)


MINI = "anyup_mini"
"""The checkpoint that ``load`` takes by default; its card is ``anyup/assets/anyup_mini.md``."""

#: The checkpoints that need no download.
PACKAGED: dict[str, PackagedCheckpoint] = {
    MINI: PackagedCheckpoint(
        file="anyup_mini.safetensors",
        trained_on="209 photographs, 410 labelled frames and four encoders, for six hours on one core of a CPU",
        licence="Apache-2.0",
    ),
}


def _some(names: Sequence[str]) -> str:
    """The first five names, and "..." for the others."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


@on_one_thread()
def load(
    kind: type[Model],
    name_or_path: str | os.PathLike[str],
    device: str | torch.device,
    backend: ModelBackend,
    window: str | None = None,
    **model_arguments: Any,
) -> Model:
    """A model of this class with stored weights; see `anyup.load`, which has the other arguments."""
    arguments = {name: value for name, value in model_arguments.items() if value is not None}
    if arguments.get("use_natten"):
        if window not in (None, "cell"):
            raise ValueError(f'use_natten=True means window="cell", but window={window!r} was given beside it')
        window = "cell"
    arguments.pop("use_natten", None)
    if window is not None:
        arguments["window"] = window
    device = usable_device(device)

    path = _resolve(name_or_path)
    state_dict, stored = _read(path)
    if path.name == hugging_face.WEIGHTS and hugging_face.is_stored(path.parent):
        stored = hugging_face.read_config(path.parent)
    model = _build(kind, state_dict, stored, arguments, backend, path)
    model.load_state_dict(state_dict, strict=True)
    if bad := not_finite(model.state_dict()):
        raise ValueError(f"{str(path)!r} holds weights that are not finite: {bad}")
    return model.to(device).eval()


def save(model: Network, path: str | os.PathLike[str]) -> None:
    """Write the weights and the constructor's arguments; see `anyup.save`."""
    path = Path(path)
    suffix = _known_suffix(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}

    if suffix == ".safetensors":
        metadata = {"format": "pt", _SAFETENSORS_CONFIG_KEY: json.dumps(model.config)}
        # ``save_file`` would replace the file by a new one that only its owner may read.
        content = _safetensors_torch(path).save(tensors, metadata)
        with complete_or_absent(path) as partial:
            partial.write_bytes(content)
    else:
        with complete_or_absent(path) as partial:
            torch.save({"anyup": tensors, _CONFIG_KEY: dict(model.config)}, partial)


def load_pretrained(
    kind: type[Model],
    repository_or_folder: str | os.PathLike[str],
    device: str | torch.device,
    backend: ModelBackend,
    revision: str | None,
    arguments: Mapping[str, Any],
) -> Model:
    """See `AnyUp.from_pretrained`."""
    options = {name: value for name, value in arguments.items() if name in hugging_face.DOWNLOAD_OPTIONS}
    folder = Path(repository_or_folder)
    if not folder.is_dir():
        at = f"@{revision}" if revision else ""
        folder = _downloaded(f"{hugging_face.SCHEME}{repository_or_folder}{at}", **options)
    return load(kind, folder, device, backend, **{name: arguments[name] for name in arguments.keys() - options.keys()})


def save_pretrained(model: Network, folder: str | os.PathLike[str]) -> None:
    """See `AnyUp.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / hugging_face.WEIGHTS)
    with complete_or_absent(folder / hugging_face.CONFIG) as partial:
        partial.write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")


def _downloaded(address: str, **options: Any) -> Path:
    """Download the weights at an address of Hugging Face's hub; return their folder in the cache."""
    try:
        return hugging_face.download(address, **options)
    except OSError as error:
        raise DownloadError(
            f"the weights {address!r} are not cached and could not be downloaded: {error}\n"
            f"  expected: a repository of Hugging Face's hub, as {hugging_face.SCHEME}owner/name, with "
            f"{hugging_face.CONFIG} and {hugging_face.WEIGHTS}\n"
            f"  alternatives: anyup.load(FOLDER) with these two files, or anyup.load({MINI!r})"
        ) from error


def _resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file to read, downloading it where a name of ``NAMED`` is not cached yet."""
    if isinstance(name_or_path, str) and name_or_path in PACKAGED:
        return PACKAGED[name_or_path].path
    if isinstance(name_or_path, str) and name_or_path in NAMED:
        return _cached(name_or_path)
    if isinstance(name_or_path, str) and name_or_path.startswith(hugging_face.SCHEME):
        return _downloaded(name_or_path) / hugging_face.WEIGHTS
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path: expected a name or a path, got {type(name_or_path).__name__}")
    path = Path(name_or_path)
    names = ", ".join(repr(name) for name in (*PACKAGED, *NAMED))
    if path.is_dir():
        if hugging_face.is_stored(path):
            return path / hugging_face.WEIGHTS
        raise ValueError(
            f"name_or_path: expected one of the names {names}, a file, or a folder with {hugging_face.CONFIG} and "
            f"{hugging_face.WEIGHTS}, got the folder {str(path)!r}"
        )
    if not path.exists():
        raise CheckpointNotFoundError(
            f"name_or_path: expected one of the names {names} or a file ({', '.join(_SUFFIXES)}); "
            f"there is no file {str(path)!r} (looked for at {str(path.absolute())!r})"
            + did_you_mean(str(path), (*PACKAGED, *NAMED))
        )
    _known_suffix(path)
    return check_readable(path, f"name_or_path: {str(path)!r}")


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"path: expected a file name that ends in {', '.join(_SUFFIXES)}, got {str(path)!r}")
    return suffix


def _cached(name: str) -> Path:
    """Return the cached file of a named checkpoint, downloading it first where it is missing."""
    checkpoint = NAMED[name]
    path = checkpoint.path
    if path.is_file():
        return path
    _logger.info("downloading %s to %s", checkpoint.url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as partial:
            _download(checkpoint.url, partial)
            # Check the file: if the page of a proxy or a login stayed in the cache, every later call would fail on it.
            _read(partial)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(
            f"the checkpoint {name!r} is not cached and could not be downloaded: {error}\n"
            f"  address: {checkpoint.url}\n"
            f"  a file put by hand is found at: {path}\n"
            f"  alternatives: anyup.load({MINI!r}), which comes with the package; anyup.load(PATH) with a "
            f"checkpoint file kept elsewhere (TORCH_HOME moves the cache); untrained weights with anyup.AnyUp() "
            f"(torch.hub.load: pretrained=False)"
        ) from error
    return path


def _download(url: str, target: Path) -> None:
    """Download a URL to a file; raises OSError where the server does not answer or the transfer is incomplete."""
    request = Request(url, headers={"User-Agent": "anyup"})
    with urlopen(request, timeout=_DOWNLOAD_TIMEOUT) as response, open(target, "wb") as file:
        shutil.copyfileobj(response, file)
        announced = response.headers.get("Content-Length")
    if announced is not None and int(announced) != target.stat().st_size:
        raise OSError(f"the connection broke off after {target.stat().st_size} of {announced} bytes")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's state dict, on the CPU, and the constructor's arguments stored beside it, if any.

    Raises:
        ValueError: the file cannot be read, or holds no state dict.
    """
    content: Any
    stored: Any = {}
    if _known_suffix(path) == ".safetensors":
        _safetensors_torch(path)
        content, metadata = _from_file(path, read_safetensors)
        if _SAFETENSORS_CONFIG_KEY in metadata:
            try:
                stored = json.loads(metadata[_SAFETENSORS_CONFIG_KEY])
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r}: its stored arguments are not JSON ({error})") from error
    else:
        content = _from_file(path, read_torch)
        if isinstance(content, Mapping):
            for key in _STATE_DICT_KEYS:
                if isinstance(content.get(key), Mapping):
                    stored = content.get(_CONFIG_KEY, {})
                    content = content[key]
                    break
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"{str(path)!r}: expected a state dict, or a training checkpoint that holds one under "
            f"{' or '.join(repr(key) for key in _STATE_DICT_KEYS)}; the file holds {what}"
        )
    for name, tensor in content.items():
        if why := unfit(tensor) if isinstance(name, str) else "expected a name":
            raise ValueError(
                f"{str(path)!r}: expected a state dict, or a training checkpoint that holds one under "
                f"{' or '.join(repr(key) for key in _STATE_DICT_KEYS)}, with floating-point tensors only; "
                f"its entry {name!r}: {why}"
            )
    if not isinstance(stored, Mapping):
        raise ValueError(f"{str(path)!r}: expected the stored arguments as a dict, got {type(stored).__name__}")
    return dict(content), {name: value for name, value in stored.items() if value is not None}


def _from_file(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def _safetensors_torch(path: Path) -> Any:
    """The module ``safetensors.torch``; raises ImportError, naming the file, where it is not installed."""
    try:
        return safetensors_package().torch
    except ImportError as error:
        raise ImportError(f"{str(path)!r}: {error} (.pth files need nothing)") from error


def _inferred(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the widths that the shapes tell; a tensor that is missing or has other dimensions tells none."""
    widths: dict[str, int] = {}
    if (freqs := state_dict.get("rope.freqs")) is not None and freqs.ndim == 2:
        widths["qk_dim"] = freqs.shape[1]
    if (weight := state_dict.get("image_encoder.0.weight")) is not None and weight.ndim == 4:
        widths["input_dim"], widths["kernel_size"] = weight.shape[1], weight.shape[2]
    if (basis := state_dict.get("key_features_encoder.0.basis")) is not None and basis.ndim == 4:
        widths["lfu_dim"], widths["kernel_size_lfu"] = basis.shape[0], basis.shape[2]
    return widths


def _build(
    kind: type[Model],
    state_dict: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    arguments: Mapping[str, Any],
    backend: ModelBackend,
    path: Path,
) -> Model:
    """Return a new model that the state dict fits, or raise ValueError with everything that does not fit."""
    inferred = _inferred(state_dict)
    for origin, given in (("argument", arguments), ("stored argument", stored)):
        for name in inferred.keys() & given.keys():
            if given[name] != inferred[name]:
                raise ValueError(
                    f"{origin} {name}={given[name]!r} contradicts the weights in {str(path)!r}, whose shapes "
                    f"say {name}={inferred[name]}"
                )
    # The initial values are overwritten at once, so they must not advance the caller's generator. The parameters are on
    # the CPU whatever the default device is: on "meta", for example, they could not take the weights.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            model = kind(**{**inferred, **stored, **arguments}, backend=backend)
        except (ValueError, TypeError) as error:
            error_class = ValueError if isinstance(error, ValueError) else TypeError
            raise error_class(f"cannot make the model for {str(path)!r}: {error}") from error
    if unknown := stored.keys() - model.config.keys():
        raise ValueError(
            f"{str(path)!r} was stored with arguments that this version of anyup does not know: "
            f"{', '.join(sorted(unknown))}"
        )

    expected_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    faults = []
    if missing := [name for name in expected_shapes if name not in shapes]:
        faults.append(f"missing keys ({len(missing)}): {_some(missing)}")
    if unexpected := [name for name in shapes if name not in expected_shapes]:
        faults.append(f"unexpected keys ({len(unexpected)}): {_some(unexpected)}")
        prefix = unexpected[0].split(".")[0] + "."
        if all(name.removeprefix(prefix) in expected_shapes for name in unexpected):
            faults.append(f"they were saved from a module around it: take {prefix!r} off their names")
    if other := [
        f"{name}: expected {expected_shapes[name]}, got {shapes[name]}"
        for name in expected_shapes
        if name in shapes and shapes[name] != expected_shapes[name]
    ]:
        faults.append(f"other shapes ({len(other)}): {'; '.join(other)}")
    if faults:
        raise ValueError(f"{str(path)!r} does not hold an AnyUp's weights: " + "; ".join(faults))
    return model
