"""The command `anyup info`: versions, devices, the backend of each operation and why not the others."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import torch

from anyup._version import __version__
from anyup.checkpoints import NAMED, PACKAGED
from anyup.devices import choose_device
from anyup.encoders import PACKAGED_WEIGHTS
from anyup.model import AnyUp
from anyup.ops.refusals import remembered
from anyup.progress import human_bytes

__all__ = ["report"]

# Import name, name of the distribution, purpose.
_OPTIONAL = (
    ("triton", "triton", "kernels for GPUs"),
    ("PIL", "pillow", "reading and writing pictures"),
    ("safetensors", "safetensors", ".safetensors files"),
    ("matplotlib", "matplotlib", "vis_attn=True, and the plots of bench"),
    ("zarr", "zarr", ".zarr files"),
    ("av", "av", "upsample the frames of a video"),
    ("h5py", "h5py", 'encoder "squeezenet1_1", --layout nyuv2'),
    ("scipy", "scipy", "--layout nyuv2"),
    ("accelerate", "accelerate", "train and upsample in several processes"),
    ("ray", "ray", "anyup.ray, a step of a pipeline of Ray Data: ray[data]"),
    ("tensorboard", "tensorboard", "the curves of a training"),
    ("timm", "timm", 'encoders "timm/<model>"'),
    ("transformers", "transformers", 'encoders "transformers/<model>"'),
    ("torchvision", "torchvision", 'encoders "torchvision/<model>:<layer>"'),
    ("onnx", "onnx", "export onnx"),
    ("onnxscript", "onnxscript", "export onnx"),
    ("onnxruntime", "onnxruntime", "export onnx"),
    ("huggingface_hub", "huggingface_hub", 'weights "hf://owner/name"'),
)

_IMAGE = (1, 3, 448, 448)
_FEATURES = (1, 384, 32, 32)


def report(device: str | None = None, backend: str | None = None) -> str:
    """The text of `anyup info`, with the backends for `backend` on `device` (None: every device that torch finds)."""
    places = _devices() if device is None else [choose_device(device)]
    sections = [
        ("versions", list(_versions())),
        ("devices", list(_device_lines())),
        *((f"backends on {place}, {_sizes()}", _backend_lines(place, backend)) for place in places),
        ("configs of the kernels", list(_config_lines())),
        ("refused by a device in this process", list(remembered()) or ["nothing"]),
        ("optional packages", list(_optional_lines())),
        ("weights of packaged encoders", list(_encoder_lines())),
        ("weights", list(_weights_lines())),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _versions() -> Iterator[str]:
    yield f"anyup         {__version__}"
    yield f"python        {platform.python_version()} ({platform.system()}, {platform.machine()})"
    yield f"torch         {torch.__version__}"
    for name in ("triton", "einops", "numpy"):
        yield f"{name:<13} {_version(name) or 'not installed'}"


def _version(distribution: str) -> str | None:
    """The installed version, read without importing the package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _device_lines() -> Iterator[str]:
    yield f"cpu           {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield (
                f"cuda:{index}        {properties.name}, {human_bytes(properties.total_memory)}, "
                f"compute capability {properties.major}.{properties.minor}"
            )
    else:
        built = torch.version.cuda or torch.version.hip
        yield f"cuda          none: {'torch sees no device' if built else 'this build of torch has no CUDA'}"
    yield f"mps           {'available' if torch.backends.mps.is_available() else 'none'}"


def _sizes() -> str:
    side, (channels, grid) = _IMAGE[-1], _FEATURES[1:3]
    return f"for a {side} x {side} photograph and features {channels} x {grid} x {grid}, float32"


def _backend_lines(place: torch.device, backend: str | None) -> list[str]:
    model = AnyUp(backend=backend).to(place)
    with torch.inference_mode():
        explanation = model.explain(torch.zeros(_IMAGE, device=place), torch.zeros(_FEATURES, device=place))
    return str(explanation).splitlines()


def _config_lines() -> Iterator[str]:
    from anyup.kernels import config_tables
    from anyup.ops.kernel_device import device_name

    folder = config_tables.user_folder()
    off = f"none is read ({config_tables.VARIABLE} is {config_tables.OFF})"
    yield f"folder of the user's tables: {folder or off}"
    if not torch.cuda.is_available():
        yield "the rule's: without a GPU no table is looked for"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = device_name(torch.device("cuda", index))
        tables = config_tables.in_force(name)
        yield f"cuda:{index} {name}: " + ("tables, then the rule" if tables.entries else "the rule's")
        yield from (f"  {line}" for line in tables.descriptions)


def _optional_lines() -> Iterator[str]:
    for module, distribution, purpose in _OPTIONAL:
        found = _version(distribution) if find_spec(module) else None
        yield f"{distribution:<15} {found or 'not found':<13} {purpose}"


def _encoder_lines() -> Iterator[str]:
    for name, weights in PACKAGED_WEIGHTS.items():
        yield f"{name:<19} {'installed' if weights.at_hand else weights.install_command}"


def _weights_lines() -> Iterator[str]:
    for name, packaged in PACKAGED.items():
        yield f"{name}: in the package; trained on {packaged.trained_on}; {packaged.licence}"
    for name, checkpoint in NAMED.items():
        state = "present" if checkpoint.path.is_file() else "not downloaded"
        yield f"{name}: {state}; trained on {checkpoint.trained_on}; {checkpoint.licence}"
        yield f"  {checkpoint.path}"
