"""`python -m benchmarks.modelled_gpu`: the command of `codegen`."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from benchmarks.modelled_gpu import codegen

    codegen.main(arguments)


if __name__ == "__main__":
    # Interpreted kernels have no code. This must be said before triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    main()
