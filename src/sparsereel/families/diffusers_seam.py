"""Every private name of diffusers that sparsereel touches, in one place, with a self-test.

Two seams:

* *dispatch*: models whose processors call `dispatch_attention_fn`. One pseudo-member `sparsereel` of the enum
  `AttentionBackendName` is entered in diffusers' registry while anything is sparsified; a processor that names it as
  its `_attention_backend` gets its q, k, v (B, S, H, D, after rotary embedding) handed to `dispatched_attention`.
* *sdpa*: older processors that call `F.scaled_dot_product_attention` themselves. A `TorchFunctionMode`, active only
  inside such a processor's call, hands q, k, v (B, H, S, D) on.

Either way the layer's processor is replaced by a copy whose class is a subclass made on the fly: its `__call__` says
which layer is running, then runs the original code. The original processor is kept untouched and put back by `restore`.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sparsereel.sparse_layer import Call

logger = logging.getLogger("sparsereel")

BACKEND_VALUE = "sparsereel"
KNOWN_TO_WORK = "0.41 and 0.42"


class Layer(Protocol):
    """What a seam needs of a replaced layer."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Attention over (B, H, S, D)."""
        ...


class _Active(threading.local):
    """The replaced layer whose processor is running now, in this thread."""

    # Set here, not on the class: compiled code asks whether the instance has them.
    def __init__(self) -> None:
        self.layer: Any = None
        self.dense_backend: Any = None
        #: why this call is not to be touched
        self.refuse: str | None = None
        self.in_dense = False


ACTIVE = _Active()


# ------------------------------------------------------------------ dispatch seam


def dispatched_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Attention function behind the pseudo-backend. q, k, v: (B, S, H, D); returns (B, Sq, H, D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    layer, backend = ACTIVE.layer, ACTIVE.dense_backend

    def dense() -> torch.Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            backend=backend,
            parallel_config=_parallel_config,
        )

    if layer is None:
        # Somebody named the backend without a replaced processor: nothing is known about the call.
        return dense()
    call = Call(
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        refuse=ACTIVE.refuse or _skipped_scores(),
        dense=lambda: dense().transpose(1, 2),
        free_choice=backend is None and _default_is_native(),
    )
    if _parallel_config is not None:
        shared = _attend_spread(layer, query, key, value, call, _parallel_config, backend)
        if isinstance(shared, torch.Tensor):
            return shared
        call = replace(call, refuse=call.refuse or shared)
    out = layer.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), call)
    return out.transpose(1, 2)


def _attend_spread(
    layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, config: Any, backend: Any
) -> torch.Tensor | str | None:
    """Attention of a layer whose tokens are spread over processes; the reason where diffusers has to do it, None where
    they are not spread."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    from sparsereel.parallel import injected

    spread = config.context_parallel_config
    if spread is None or spread.ring_degree * spread.ulysses_degree == 1:
        return None
    if spread.ring_degree > 1 and spread.ulysses_degree > 1:
        return "ulysses and ring at once are not understood"
    if call.refuse is not None:
        return call.refuse
    mode = "ring" if spread.ring_degree > 1 else "ulysses"
    mesh = spread._ring_mesh if mode == "ring" else spread._ulysses_mesh
    exchange = injected.Exchange(mode, mesh.get_group(), even=not (spread.ulysses_anything or spread.ring_anything))

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        def dense() -> torch.Tensor:
            return dispatch_attention_fn(q, k, v, scale=call.scale, backend=backend).transpose(1, 2)

        return replace(call, dense=dense)

    return injected.attend(layer, q, k, v, exchange, call, whole)


def is_spread(model: Any) -> bool:
    """Whether context parallelism is enabled on a model."""
    config = getattr(model, "_parallel_config", None)
    return config is not None and config.context_parallel_config is not None


def _default_is_native() -> bool:
    """Whether diffusers' own default backend is torch's attention, not one that the user chose globally."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if torch.compiler.is_compiling():
        return True
    return _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


_SKIPS_SCORES = "a guider replaces the attention scores in this pass"
_BLURS_QUERIES = "a guider blurs the queries in this pass"


def _skipped_scores() -> str | None:
    """Whether a perturbed-attention guider is active: it intercepts only `F.scaled_dot_product_attention`."""
    if torch.compiler.is_compiling():
        return None  # `_perturbation` sees the hook that enters the mode
    active = any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in _function_modes())
    return _SKIPS_SCORES if active else None


def _perturbation(attn: Any) -> str | None:
    """What a guider's hook on an attention layer does to it in this pass; None where there is none."""
    if any(getattr(hook, "skip_attention_scores", False) for hook in _hooks(attn)):
        return _SKIPS_SCORES
    return _BLURS_QUERIES if blurs_queries(attn) else None


def blurs_queries(attn: Any) -> bool:
    """Whether smoothed-energy guidance is on in a layer. It takes tokens for pixels in the model's own order."""
    projection = getattr(attn, "to_q", None)
    return any(type(hook).__name__ == "SmoothedEnergyGuidanceHook" for hook in _hooks(projection))


def _hooks(module: Any) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _function_modes() -> list[Any]:
    depth = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(depth)]


class _Registration:
    """The pseudo-backend's entries in diffusers' registries, present while at least one model uses them."""

    def __init__(self) -> None:
        self.users = 0
        self.entered = False
        self.member: Any = None

    def acquire(self) -> None:
        self.users += 1
        if not self.entered:
            self._enter()
            self.entered = True

    def release(self) -> None:
        self.forget()
        if self.users == 0 and self.entered:
            self._leave()
            self.entered = False

    def forget(self) -> None:
        """A user was garbage-collected. That may happen while `torch.compile` reads the registries, so the entries
        stay until the next release."""
        self.users -= 1

    def _enter(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        if self.member is None:
            member = str.__new__(AttentionBackendName, BACKEND_VALUE)
            member._name_, member._value_ = BACKEND_VALUE.upper(), BACKEND_VALUE
            # Copies and pickles of a member come back by value.
            self.member = member
        AttentionBackendName._member_map_[self.member._name_] = self.member
        AttentionBackendName._value2member_map_[BACKEND_VALUE] = self.member
        registry = _AttentionBackendRegistry
        registry.register(self.member, constraints=[], supports_context_parallel=True)(dispatched_attention)

    def _leave(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        AttentionBackendName._member_map_.pop(self.member._name_, None)
        AttentionBackendName._value2member_map_.pop(BACKEND_VALUE, None)
        _AttentionBackendRegistry._backends.pop(self.member, None)
        _AttentionBackendRegistry._constraints.pop(self.member, None)
        _AttentionBackendRegistry._supported_arg_names.pop(self.member, None)
        _AttentionBackendRegistry._supports_context_parallel.discard(BACKEND_VALUE)


REGISTRATION = _Registration()


# ------------------------------------------------------------------ sdpa seam


class _SdpaMode(TorchFunctionMode):
    """Hands `F.scaled_dot_product_attention` of the running processor to its layer; all else passes through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or ACTIVE.layer is None or ACTIVE.in_dense:
            return func(*args, **kwargs)
        return _sdpa_to_layer(func, *args, **kwargs)


def _sdpa_to_layer(
    func: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    def dense() -> torch.Tensor:
        ACTIVE.in_dense = True
        try:
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        finally:
            ACTIVE.in_dense = False

    call = Call(
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        refuse=ACTIVE.refuse or _skipped_scores(),
        dense=dense,
        free_choice=True,
    )
    return ACTIVE.layer.attend(query, key, value, call)


# ------------------------------------------------------------------ processors


def replace_processor(module: Any, layer: Layer, seam: str) -> Any:
    """Give `module` a copy of its processor that announces `layer`; returns the original processor."""
    original = module.processor
    module.processor = announcing(original, layer, seam)
    return original


def announcing(original: Any, layer: Layer, seam: str) -> Any:
    """A copy of a processor that announces `layer` whenever it is called."""
    clone = copy.copy(original)
    clone.__class__ = _subclass(type(original), seam)  # type: ignore[arg-type]
    _introduce_to_guiders(type(original), type(clone))
    clone.sparsereel_layer = layer
    clone.sparsereel_dense_backend = getattr(original, "_attention_backend", None)
    return clone


def put_back_processor(module: Any, original: Any, announcer: Any) -> None:
    """Undo `replace_processor`; what the user set meanwhile, such as an attention backend, is carried over.

    The announcer turns into a plain copy of the original: code that keeps processors to put them back later
    (`fuse_qkv_projections`, PAG pipelines) may still hold it.
    """
    backend = announcer.sparsereel_dense_backend
    del announcer.sparsereel_layer, announcer.sparsereel_dense_backend
    announcer.__class__ = type(original)
    if backend is not None or "_attention_backend" in vars(announcer):
        announcer._attention_backend = backend
    vars(original).update(vars(announcer))
    # Otherwise the user installed another processor since: theirs stays.
    if module.processor is announcer:
        module.processor = original


def is_replaced(processor: Any) -> bool:
    """Whether a processor is one of ours."""
    return hasattr(type(processor), "sparsereel_base")


def layer_of(processor: Any) -> Any:
    """The layer that a processor of ours announces; None for others."""
    return vars(processor).get("sparsereel_layer")


@functools.cache
def _subclass(base: type, seam: str) -> type:
    """A subclass of a processor class that announces its layer. Same name: some code compares class names.

    The wrapped signature matters: `Attention.forward` reads it and silently drops keyword arguments that it does not
    find there, such as `image_rotary_emb`.
    """
    original_call = base.__call__

    @functools.wraps(original_call)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        outer = ACTIVE.layer, ACTIVE.dense_backend, ACTIVE.refuse
        ACTIVE.layer, ACTIVE.dense_backend = self.sparsereel_layer, self.sparsereel_dense_backend
        ACTIVE.refuse = _perturbation(attn)
        try:
            if seam == "dispatch":
                return original_call(self, attn, *args, **kwargs)
            with _SdpaMode():
                return original_call(self, attn, *args, **kwargs)
        finally:
            ACTIVE.layer, ACTIVE.dense_backend, ACTIVE.refuse = outer

    members: dict[str, Any] = {"__call__": __call__, "sparsereel_base": base, "__module__": base.__module__}
    if seam == "dispatch":
        members["_attention_backend"] = property(_get_backend, _set_backend)
    return _Announcing(base.__name__, (base,), members)


class _Announcing(type):
    """Calling the class makes a plain processor: adapters make new ones of `processor.__class__`, without a layer."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.sparsereel_base(*args, **kwargs)  # type: ignore[attr-defined]


def _introduce_to_guiders(base: type, subclass: type) -> None:
    """Guiders that skip layers look a processor's class up and refuse those that they do not know."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:
        return
    AttentionProcessorRegistry.register(subclass, metadata)


def _get_backend(self: Any) -> Any:
    return REGISTRATION.member


def _set_backend(self: Any, backend: Any) -> None:
    # `model.set_attention_backend(...)` after `sparsify` chooses what dense calls run on; it does not undo sparsity.
    self.sparsereel_dense_backend = None if backend is REGISTRATION.member else backend


# ------------------------------------------------------------------ self-test


@functools.cache
def check_versions() -> None:
    """Try every private name once.

    Raises:
        ValueError: this version of diffusers moved something; the text says what and which versions work.
    """
    import diffusers

    try:
        from diffusers.models import attention_dispatch as module

        registry, names = module._AttentionBackendRegistry, module.AttentionBackendName
        for table in ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel"):
            getattr(registry, table)
        for table in ("_member_map_", "_value2member_map_"):
            getattr(names, table)
        REGISTRATION.acquire()
        try:
            q = torch.zeros(1, 2, 1, 8)
            if module.dispatch_attention_fn(q, q, q, backend=REGISTRATION.member).shape != q.shape:
                raise AttributeError("dispatch_attention_fn did not reach the registered function")
        finally:
            REGISTRATION.release()
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"diffusers {diffusers.__version__} does not have what sparsereel relies on ({error}); "
            f"versions known to work: {KNOWN_TO_WORK}"
        ) from error
