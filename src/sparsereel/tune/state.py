"""What a run needs to go on exactly: LoRA weights, AdamW's moments, the step; and weights as diffusers reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsereel.files import replacing

STATE = "state.safetensors"
WEIGHTS = "pytorch_lora_weights.safetensors"


def save_state(
    folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write the state in one move."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with replacing(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})


def load_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of an earlier run; None where there was none.

    Raises:
        ValueError: the file is damaged, or is something else.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            return found
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not the state of a run of tune: {error}") from error
    except Exception as error:  # safetensors' own class is no ValueError
        raise ValueError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def load_state(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Copy a saved state into weights and optimizer.

    Raises:
        ValueError: the state is of other weights.
    """
    path = folder / STATE
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if {f"weight/{name}" for name in trained} != {name for name in names if name.startswith("weight/")}:
            raise ValueError(f"{path} is the state of other layers; choose another output folder")
        for name, parameter in trained.items():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in names:
                    value = file.get_tensor(f"{key}/{name}")
                    state[key] = value if key == "step" else value.to(parameter.device)
            if state:
                optimizer.state[parameter] = state


def save_weights(pipe: Any, model: nn.Module, folder: Path, adapter: str) -> Path:
    """The LoRA as `pipe.load_lora_weights(folder)` reads it."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, adapter_name=adapter)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        type(pipe).save_lora_weights(place, transformer_lora_layers=layers)
        target = folder / WEIGHTS
        with replacing(target) as temporary:
            shutil.copyfile(Path(place) / WEIGHTS, temporary)
    return target
