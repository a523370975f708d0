"""Stop a stream and go on with the same bits: one safetensors file with everything, JSON in its header.

Its size is that of the window (keys, values, latents, the VAE's features), however long the video is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsereel.files import replacing

_KEY = "sparsereel.stream"
_VERSION = 1


def write_checkpoint(path: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write in one move.

    Raises:
        ValueError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = json.dumps({"version": _VERSION, **numbers})
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata={_KEY: header})
        except SafetensorError as error:
            raise ValueError(f"could not write the checkpoint {path}: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo `write_checkpoint`.

    Raises:
        ValueError: no such file, damaged, or not of a stream.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path} to resume from")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error
    numbers = None if header is None else json.loads(header)
    if not numbers or numbers.get("version") != _VERSION:
        raise ValueError(f"{path} is not a checkpoint of a stream that this version reads")
    return tensors, numbers


def check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuse to go on with other settings.

    Raises:
        ValueError: the first setting that differs is named.
    """
    plain = json.loads(json.dumps(wanted))
    for name in {**found, **plain}:
        if found.get(name) != plain.get(name):
            raise ValueError(
                f"the checkpoint {path} was made with {name}={found.get(name)!r}, and now it is {plain.get(name)!r}: "
                "resume with the same settings"
            )
