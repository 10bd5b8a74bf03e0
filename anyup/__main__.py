"""`python -m anyup`: the command `anyup`."""

from __future__ import annotations

import sys

from anyup.cli import main

if __name__ == "__main__":
    sys.exit(main())
