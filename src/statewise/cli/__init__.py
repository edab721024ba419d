"""The command line. Nothing here imports torch before a verb needs it."""

from statewise.cli.app import main

__all__ = ["main"]
