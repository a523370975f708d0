"""Exceptions of the kernels package."""

from __future__ import annotations


class BackendUnavailable(ValueError):
    """The backend that was named (or, for "auto", every backend) cannot run this call; the text lists the reasons."""
