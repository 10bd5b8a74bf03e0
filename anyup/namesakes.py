"""Another package called `anyup`, such as the published code, that comes before this one on `sys.path`.

Python holds one package for a name. Once this package is imported, an import of the other one, as in `torch.hub.load`
of its repository, silently gives this one. A comparison of the two would then compare this package with itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def refuse_a_namesake() -> None:
    """Raise ImportError where `import anyup` would find another package of this name first."""
    for entry in sys.path:
        folder = Path(entry) / _HERE.name
        if not (folder / "model.py").is_file():
            continue
        if folder.resolve() != _HERE and not (folder / "ops").is_dir():  # copies of this package have it
            raise ImportError(
                f"two packages are called {_HERE.name!r}: this one, in {_HERE}, was imported first, but "
                f"{folder.resolve()} comes first on sys.path, and its code would be given this one's classes; "
                "use each in a process of its own, or that one through anyup.bench.published_code.PublishedCode"
            )
        return
