"""The child of convert.py: reads one file of weights and writes its tensors; a job comes in on stdin."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from typing import Any

import torch
from safetensors.torch import save_file

INSIDE = ("state_dict", "model_state_dict", "model_state", "model", "module")


def main() -> None:
    job = json.load(sys.stdin)
    try:
        found = tensors_of(read(job["source"], job["trust"]))
        chosen = {
            name[len(job["prefix"]) :]: value.detach().clone().contiguous()
            for name, value in found.items()
            if name.startswith(job["prefix"])
        }
        if not chosen:
            raise ValueError("it holds no tensors" + (f" under {job['prefix']!r}" if job["prefix"] else ""))
        save_file(chosen, job["target"])
        answer: dict[str, Any] = {"tensors": len(chosen)}
    except Exception as error:
        answer = {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
    print("\n" + json.dumps(answer))


def read(path: str, trust: bool) -> Any:
    if is_torchscript(path):
        if not trust:
            raise ValueError("it is a TorchScript program, and reading it runs it; say --trust if you trust its origin")
        return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            text = "it holds more than tensors, and reading it would run code; say --trust if you trust its origin"
            raise ValueError(text) from error
    return torch.load(path, map_location="cpu", weights_only=False)


def is_torchscript(path: str) -> bool:
    """A zip archive with a constants.pkl beside its data; a saved dictionary has none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tensors_of(value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not named tensors")
    for name in INSIDE:
        if name in value and not isinstance(value[name], torch.Tensor):
            return tensors_of(value[name])
    return {str(name): tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}


if __name__ == "__main__":
    main()
