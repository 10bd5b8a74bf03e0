"""What ``pyproject.toml`` cannot say: the top-level ``kernels/`` folder is shipped as ``anyup._kernels``.

Installed under its own name it would overwrite another package called ``kernels``; ``anyup/kernels.py`` makes
the shipped folder importable as ``anyup.kernels``.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["anyup", "anyup.*"])
package_dir = {}
if any((Path(__file__).resolve().parent / "kernels").glob("*.py")):
    packages.append("anyup._kernels")
    package_dir["anyup._kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    # What MANIFEST.in names for the sdist is not shipped by that; this list alone says what is.
    include_package_data=False,
    package_data={
        "anyup": ["py.typed"],
        "anyup.assets": ["*"],
        "anyup.gallery": ["page.css", "page.js"],
        "anyup.training": ["configs/*.toml"],
        "anyup._kernels": ["configs/*.json"],
    },
)
