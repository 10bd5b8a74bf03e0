"""The photographs in a folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def find_photographs(folder: str | os.PathLike[str]) -> list[Path]:
    """What `pictures_below` finds.

    Raises NotADirectoryError for what is no folder, ValueError for a folder without pictures.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"photographs: expected a folder, there is none at {str(root)!r}")
    found = pictures_below(root)
    if not found:
        raise ValueError(f"photographs: no pictures ({', '.join(SUFFIXES)}) in the folder {str(root)!r}")
    return found


def pictures_below(root: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, by suffix, sorted by path; hidden ones are left out.

    Linked folders are followed, and each folder is read once: under its own path rather than through a link. A folder
    that cannot be read is warned of.
    """

    def left_out(error: OSError) -> None:
        warnings.warn(f"left out: {error}", stacklevel=3)

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # the links met on the way join them
        for place, folders, names in os.walk(start, onerror=left_out):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
            found += [Path(place, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
