"""How cached keys and values are stored: as they come, or in eight bits with one scale a token and head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["full", "int8", "fp8"]
KINDS: tuple[Kind, ...] = ("full", "int8", "fp8")

#: largest magnitude of the eight-bit type, and that type
_EIGHT_BITS = {"int8": (127.0, torch.int8), "fp8": (448.0, torch.float8_e4m3fn)}


class Store:
    """A preallocated buffer of (1, heads, capacity, dim) tokens.

    Args:
        kind: "full" keeps `dtype`; "int8" and "fp8" (e4m3) halve (bf16) or quarter (fp32) it: x ~ code * scale with
            scale = max |x| over the token's channels of a head / largest code.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(
        self, kind: Kind, heads: int, capacity: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown cache storage {kind!r}; allowed: {', '.join(KINDS)}")
        self.kind = kind
        self.dtype = dtype
        self.scale: Tensor | None = None
        if kind == "full":
            self.data = torch.zeros(1, heads, capacity, dim, dtype=dtype, device=device)
        else:
            self.data = torch.zeros(1, heads, capacity, dim, dtype=torch.uint8, device=device)
            self.data = self.data.view(_EIGHT_BITS[kind][1])
            self.scale = torch.zeros(1, heads, capacity, 1, dtype=torch.float32, device=device)

    def write(self, start: int, x: Tensor) -> None:
        """Put tokens (1, heads, n, dim) at `start`."""
        target = self.data[:, :, start : start + x.shape[2]]
        if self.scale is None:
            target.copy_(x)
            return
        largest, code = _EIGHT_BITS[self.kind]
        scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / largest
        codes = x.float() / scale
        target.copy_((codes.round() if self.kind == "int8" else codes).to(code))
        self.scale[:, :, start : start + x.shape[2]] = scale

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens (1, heads, stop - start, dim); a view where nothing has to be decoded."""
        data = self.data[:, :, start:stop]
        if self.scale is None:
            return data
        return (data.float() * self.scale[:, :, start:stop]).to(self.dtype)

    def keep(self, index: Tensor) -> None:
        """Move the tokens `index` (ascending) to the front, in this order."""
        count = index.shape[0]
        # As bytes: eight-bit floats have no index_select on every device.
        raw = self.data if self.scale is None else self.data.view(torch.uint8)
        raw[:, :, :count] = raw.index_select(2, index)
        if self.scale is not None:
            self.scale[:, :, :count] = self.scale.index_select(2, index)

    def tensors(self, count: int) -> dict[str, Tensor]:
        """The first `count` tokens, for a checkpoint."""
        found = {"data": self.data[:, :, :count]}
        if self.scale is not None:
            found = {"data": self.data.view(torch.uint8)[:, :, :count], "scale": self.scale[:, :, :count]}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Undo `tensors`."""
        raw = self.data if self.scale is None else self.data.view(torch.uint8)
        raw[:, :, : tensors["data"].shape[2]] = tensors["data"]
        if self.scale is not None:
            self.scale[:, :, : tensors["scale"].shape[2]] = tensors["scale"]

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)
