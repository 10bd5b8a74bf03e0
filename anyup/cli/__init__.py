"""The command `anyup`."""

from anyup.cli.command import main

__all__ = ["main"]
