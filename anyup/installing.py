"""The command to type where an optional package is missing.

The command names the package, not an extra of anyup: so it works for a checkout, a wheel and torch.hub.
"""

from __future__ import annotations


def pip_install(package: str, *, dependencies: bool = True) -> str:
    """The command that installs a package; `package` may be "name==version"."""
    return f"pip install {package}" if dependencies else f"pip install --no-deps {package}"
