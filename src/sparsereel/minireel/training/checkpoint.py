"""Checkpoints without pickle: tensors in safetensors, everything else in JSON, replaced in one rename.

An interruption at any moment leaves either the old checkpoint or the new one, never half of each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts to one safetensors file (the facts are its metadata)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    # Several names may share memory (tied embeddings); safetensors stores each on its own.
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, new, metadata={"facts": json.dumps(facts)})
    os.replace(new, path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        ValueError: the file holds no facts, so `save` did not write it.
    """
    with safe_open(path, framework="pt") as file:
        facts = (file.metadata() or {}).get("facts")
        if facts is None:
            raise ValueError(f"{path} is no training checkpoint: its metadata lacks 'facts'.")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(facts)  # noqa: SIM118


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename every tensor to `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors named `prefix/...`, without the prefix."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def numbered(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A list as a dictionary, so that it can be saved."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


@torch.no_grad()
def copy_numbered(targets: Sequence[torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    """Copy what `numbered` made into tensors of the same shapes, in order."""
    for index, target in enumerate(targets):
        target.copy_(stored[str(index)])


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then swap: a reader, or an interruption, never meets half a folder."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
