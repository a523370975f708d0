"""How much memory a forward pass holds at its peak, counted on the meta device: every tensor, nothing computed."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsereel.extend.sizes import Triple

#: prompt tokens where the pipeline's call does not say
TEXT = 512


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made while it is on and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before, such as weights, of which operations return views, counts nothing.
        self._meet_all((args, kwargs), counted=False)
        out = func(*args, **(kwargs or {}))
        self._meet_all(out, counted=True)
        return out

    def _meet_all(self, found: Any, *, counted: bool) -> None:
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._meet(storage, storage.nbytes() if counted else 0)

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        number = storage._cdata
        if number in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(number, None)

        self._known[number] = weakref.ref(storage, gone)


class _NoScores(TorchFunctionMode):
    """Attention whose result has its size, without the S x S logits that no kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, _, value = (kwargs.get(n, args[i] if i < len(args) else None) for i, n in enumerate(_QKV))
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


_QKV = ("query", "key", "value")


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that `run` holds at its peak beyond what it was given."""
    with torch.no_grad(), _NoScores(), Live() as live:
        run()
    return live.peak


def traced_activations(model: nn.Module, pipe: Any, tokens: Triple, patch: Triple, dtype: torch.dtype) -> int | None:
    """Peak bytes of one forward of `model`'s architecture over so many tokens, batch 1; None where it cannot be traced.

    A copy without weights is made from the configuration and run on the meta device.
    """
    try:
        with torch.device("meta"):
            twin = type(model).from_config(model.config)  # type: ignore[attr-defined]
        nn.Module.to(twin, dtype).eval()
        for part, module in twin.named_modules():
            if set(part.split(".")) & set(getattr(twin, "_keep_in_fp32_modules", None) or ()):
                module.float()
        arguments = _inputs(twin, pipe, tokens, patch, dtype)
        return None if arguments is None else peak_of(lambda: twin(**arguments, return_dict=False))
    except Exception:  # any model may read values, which the meta device has not
        return None


def _inputs(model: Any, pipe: Any, tokens: Triple, patch: Triple, dtype: torch.dtype) -> dict[str, Tensor] | None:
    config = model.config
    cells = [n * p for n, p in zip(tokens, patch, strict=True)]
    parameters = inspect.signature(type(pipe).__call__).parameters
    length = getattr(parameters.get("max_sequence_length"), "default", TEXT)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    name = type(model).__name__
    if name == "WanTransformer3DModel":
        found = {"hidden_states": empty(1, config.in_channels, *cells), "timestep": empty(1, kind=torch.float32)}
        found["encoder_hidden_states"] = empty(1, length, config.text_dim)
        if config.image_dim:
            found["encoder_hidden_states_image"] = empty(1, 257, config.image_dim)
        return found
    if name == "UNet2DConditionModel":
        found = {"sample": empty(2, config.in_channels, *cells[1:]), "timestep": empty(2, kind=torch.float32)}
        width = config.cross_attention_dim
        found["encoder_hidden_states"] = empty(2, 77, width if isinstance(width, int) else width[0])
        if config.addition_embed_type == "text_time":
            ids = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - ids
            found["added_cond_kwargs"] = {"text_embeds": empty(2, pooled), "time_ids": empty(2, 6)}  # type: ignore[assignment]
        return found
    return None
