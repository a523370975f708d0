"""The `sparsereel` command. Heavy imports wait until a command runs, so `--help` is quick."""

from __future__ import annotations

from sparsereel.cli.main import main

__all__ = ["main"]
