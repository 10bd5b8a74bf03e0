"""What to type where a package is missing that only a part of this one takes.

The package itself is named, not an extra of ours: that works from a checkout, a wheel and torch.hub alike.
"""

from __future__ import annotations


def pip_install(package: str, *, dependencies: bool = True) -> str:
    """The command that installs a package, in a version if it is named as "package==version"."""
    return f"pip install {package}" if dependencies else f"pip install --no-deps {package}"
