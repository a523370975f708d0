"""One attention call as plain numbers: what a backend needs to say whether it can run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Problem:
    """Sizes and kinds of one call; lengths are in tokens.

    Attributes:
        device_type: "cpu", "cuda", ...
        batch, heads, kv_heads: heads of q, and of k and v.
        q_len, kv_len: tokens.
        head_dim, v_dim: features of q and k, and of v.
        block: (query, key) block of the mask in tokens; None for a dense call.
        has_partial: the mask holds partial blocks.
        modifier: None, "frame_decay" or "key_bias".
        needs_backward: gradients will be asked for.
        compiling: the call is being traced by torch.compile (a backend then runs inside an opaque operator).
        needs_lse: the caller reads lse.
        has_key_lengths: padded keys are masked per sample.
    """

    device_type: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    block: tuple[int, int] | None
    has_partial: bool
    modifier: str | None
    needs_backward: bool
    compiling: bool = False
    needs_lse: bool = False
    has_key_lengths: bool = False

    def describe(self) -> str:
        """The inputs as the aligned lines of an error message."""
        kind = f"{dtype_name(self.dtype)}  {self.device_type}"
        mask = "none (dense)" if self.block is None else f"block {self.block[0]}×{self.block[1]}"
        if self.has_partial:
            mask += ", with partial blocks"
        lines = [
            f"query  [{self.batch}, {self.heads}, {self.q_len}, {self.head_dim}]  {kind}",
            f"key    [{self.batch}, {self.kv_heads}, {self.kv_len}, {self.head_dim}]",
            f"value  [{self.batch}, {self.kv_heads}, {self.kv_len}, {self.v_dim}]",
            f"mask   {mask}",
        ]
        asked = [
            f"modifier {self.modifier}" if self.modifier else "",
            "key lengths" if self.has_key_lengths else "",
            "lse" if self.needs_lse else "",
            "gradients" if self.needs_backward else "",
        ]
        if any(asked):
            lines.append("with   " + ", ".join(filter(None, asked)))
        return "\n".join("    " + line for line in lines)
