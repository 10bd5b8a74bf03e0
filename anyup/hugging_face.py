"""Hugging Face's hub, and the layout that its `PyTorchModelHubMixin` gives a folder or a repository.

`config.json` holds the constructor's arguments, `model.safetensors` the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyup.installing import pip_install

SCHEME = "hf://"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DOWNLOAD_OPTIONS = ("cache_dir", "endpoint", "etag_timeout", "force_download", "local_files_only", "proxies", "token")
"""The arguments of `huggingface_hub.hf_hub_download` that a caller may pass."""


def is_stored(folder: Path) -> bool:
    """Whether a folder holds both files."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def read_config(folder: Path) -> dict[str, Any]:
    """The constructor's arguments that a folder stores, as `AnyUp.config` has them; raises ValueError for others.

    The hub's own class stores every argument of the constructor.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r}: expected the constructor's arguments, got a {type(config).__name__}")
    config.pop("backend", None)  # the backend is the choice of whoever loads the weights
    if config.pop("use_natten", None):
        config["window"] = "cell"
    return {name: value for name, value in config.items() if value is not None}


def download(address: str, **options: Any) -> Path:
    """The folder in the hub's cache with both files of "hf://owner/name" or "hf://owner/name@revision".

    Args:
        address: of the repository.
        **options: among `DOWNLOAD_OPTIONS`.

    Raises:
        OSError: the repository is not cached and cannot be downloaded.
        ImportError: huggingface_hub is not installed.
    """
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    hub = _hub(address)
    try:
        paths = [
            Path(hub.hf_hub_download(repository, name, revision=revision or None, **options))
            for name in (CONFIG, WEIGHTS)
        ]
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(reason[0]) from error
    return paths[0].parent


def upload(folder: str, repository: str, *, message: str, private: bool | None, token: str | bool | None) -> str:
    """Upload a folder's files to a repository, which is created if it does not exist; return the commit's URL.

    Raises what huggingface_hub raises, and ImportError where it is not installed.
    """
    api = _hub(f"{SCHEME}{repository}").HfApi(token=token)
    made = api.create_repo(repository, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=made, folder_path=folder, commit_message=message))


def _hub(address: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"{address!r} needs huggingface_hub: {pip_install('huggingface_hub')}") from error
    return huggingface_hub
