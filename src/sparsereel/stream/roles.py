"""Heads that look far back and heads that do not, and caches as large as each of them needs.

RazorAttention (arXiv 2407.15891), DuoAttention (arXiv 2410.10819) and their kin keep everything for a few *retrieval*
heads and only sink + recent tokens for the others, the *streaming* heads. Here "everything" is the stream's window.
Which heads are which is measured by role_meter.py and kept in a small YAML file:

    version: 1
    model: {layers: 6, heads: 8}
    recent: 4                       # latent frames besides the sink
    streaming: {0: [1, 2], 3: [0]}  # heads by layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsereel.files import replacing
from sparsereel.stream.cache import HeadGroup


@dataclass(frozen=True)
class HeadRoles:
    """Which heads are streaming heads.

    Args:
        streaming: head numbers by layer; layers that are missing have none.
        recent: latent frames that a streaming head sees besides the sink, the chunk being denoised included.

    Raises:
        ValueError: recent < 1, or negative numbers.
    """

    streaming: Mapping[int, tuple[int, ...]]
    recent: int

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"streaming heads need recent >= 1 latent frames, got {self.recent}")
        if any(number < 0 for layer, heads in self.streaming.items() for number in (layer, *heads)):
            raise ValueError("layer and head numbers of streaming heads must be 0 or more")

    def groups(self, layer: int, heads: int, whole: HeadGroup) -> tuple[HeadGroup, ...]:
        """The head groups of one layer with `heads` heads whose retrieval heads get `whole`.

        Raises:
            ValueError: a head that the layer does not have.
        """
        short = tuple(sorted(set(self.streaming.get(layer, ()))))
        if short and short[-1] >= heads:
            raise ValueError(f"layer {layer} has {heads} heads, so there is no head {short[-1]}")
        window = min(whole.window, whole.sink + self.recent)
        if not short or window == whole.window:
            return (whole,)
        far = tuple(head for head in range(heads) if head not in short)
        small = HeadGroup(short, whole.sink, window)
        return (small,) if not far else (HeadGroup(far, whole.sink, whole.window), small)


def single_heads(groups: tuple[HeadGroup, ...], heads: int) -> tuple[HeadGroup, ...]:
    """The same policies with a group a head: whatever chooses tokens then chooses for each head."""
    numbers = {head: group for group in groups for head in group.heads or range(heads)}
    return tuple(HeadGroup((head,), numbers[head].sink, numbers[head].window) for head in range(heads))


def write_roles(path: Path, roles: HeadRoles, layers: int, heads: int, measured: dict[str, Any]) -> None:
    """Write a roles file.

    Raises:
        ValueError: the file cannot be written.
    """
    import yaml

    data = {
        "version": 1,
        "model": {"layers": layers, "heads": heads},
        "recent": roles.recent,
        "streaming": {layer: list(found) for layer, found in sorted(roles.streaming.items())},
        "measured": measured,
    }
    try:
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(data, sort_keys=False, default_flow_style=None), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the roles file {path}: {error.strerror or error}") from error


def load_roles(path: str | Path, layers: int, heads: int) -> HeadRoles:
    """Read a roles file for a model of so many layers and heads.

    Raises:
        ValueError: the file cannot be read, has another form, or is of a model of other sizes.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the roles file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the roles file {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict) or data.get("version") != 1:
        raise ValueError(f"{path} is not a roles file of version 1")
    if data.get("model") != {"layers": layers, "heads": heads}:
        raise ValueError(
            f"{path} is of a model with {data.get('model')}, and this one has {layers} layers of {heads} heads"
        )
    recent, streaming = data.get("recent"), data.get("streaming")
    if not isinstance(recent, int) or isinstance(recent, bool) or not isinstance(streaming, dict):
        raise ValueError(f"{path} must hold recent: FRAMES and streaming: {{LAYER: [HEADS]}}")
    for layer, found in streaming.items():
        if not isinstance(found, list) or any(type(number) is not int for number in (layer, *found)):
            raise ValueError(f"{path}: streaming heads are whole numbers by layer, got {layer!r}: {found!r}")
        if not 0 <= layer < layers or any(not 0 <= head < heads for head in found):
            raise ValueError(f"{path} names heads {found} of layer {layer}, which a model of {layers} x {heads} lacks")
    return HeadRoles({layer: tuple(found) for layer, found in streaming.items()}, recent)
