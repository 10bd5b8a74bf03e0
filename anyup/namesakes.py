"""Another package called `anyup` in front of this one, the published code for one.

Python keeps one package of a name: whoever imports the other after this one, as `torch.hub.load` of its repository
does, is given this one without a word, and a comparison of the two compares this one with itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def refuse_a_namesake() -> None:
    """Raise ImportError where another package of this name is what `import anyup` would find first."""
    for entry in sys.path:
        folder = Path(entry) / _HERE.name
        if not (folder / "model.py").is_file():
            continue
        if folder.resolve() != _HERE and not (folder / "ops").is_dir():  # another copy of this package has that
            raise ImportError(
                f"two packages are called {_HERE.name!r}: this one, in {_HERE}, was imported first, but "
                f"{folder.resolve()} comes first on sys.path, and its code would be given this one's classes; "
                "use each in a process of its own, or that one through anyup.bench.published_code.PublishedCode"
            )
        return
