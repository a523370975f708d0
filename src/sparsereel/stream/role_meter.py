"""Which heads of a causal model look far back: measured on its own attention while it streams.

    found = measure_roles(pipe, ["a red 3 moving right on navy"], recent=4)
    found.save("roles.yaml")
    sparsereel.stream(pipe, "...", head_roles=found.roles)          # or: sparsereel stream "..." --roles roles.yaml

Two scores a head, both means over chunks in a full window, denoising steps and queries of the guided branch:

* `mass`: the share of attention that falls on frames which a streaming head would not see, those neither in the sink
  nor among the `recent`. It takes the place of RazorAttention's echo and induction probes (arXiv 2407.15891), which
  need repeated token ids and say nothing about latents; as there, heads are ranked over all layers together.
* `distance`: |o_h - mean over heads of o|, o_h being the head's output: Task-KV's measure of heads that stand apart
  (arXiv 2501.15113), among the heads of each layer alone, since outputs of different layers have different scales.

LycheeDecode (arXiv 2602.04541) learns the same division by training and is not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsereel.stream.cache import HeadCache, KVCache
from sparsereel.stream.roles import HeadRoles, write_roles

By = Literal["mass", "distance"]
SCORES: tuple[By, ...] = ("mass", "distance")
_QUERIES = 256  # a chunk's queries are many and alike: this many, evenly spread, are looked at


class RoleMeter:
    """Looks at every attention call of a cache and sums both scores.

    Args:
        heads: of every layer.
        recent: latent frames that a streaming head sees besides the sink, the chunk being denoised included.
    """

    def __init__(self, cache: KVCache, heads: int, recent: int) -> None:
        self.cache = cache
        self.recent = recent
        self.sums = {name: torch.zeros(len(cache.layers), heads, dtype=torch.float64) for name in SCORES}
        self.calls = torch.zeros(len(cache.layers), dtype=torch.float64)

    def __enter__(self) -> RoleMeter:
        for number, groups in enumerate(self.cache.layers):
            if len(groups) != 1 or groups[0].index is not None:
                raise ValueError("roles are measured on heads that all keep the whole window")
            groups[0].observer = self._observer(number, groups[0])
        return self

    def __exit__(self, *error: object) -> None:
        for group in self.cache:
            group.observer = None

    def _observer(self, layer: int, group: HeadCache) -> Any:
        def observe(q: Tensor, k: Tensor, v: Tensor) -> None:
            tokens = q.shape[2]
            # What is far shows in a full window only.
            if k.shape[2] + tokens <= group.group.window * group.frame_tokens:
                return
            far = slice(group.sink_tokens, max(group.sink_tokens, k.shape[2] - self.recent * group.frame_tokens))
            chosen = q[0, :, :: -(-tokens // _QUERIES)].float()
            logits = chosen @ k[0].float().transpose(1, 2) / math.sqrt(q.shape[3])
            weights = logits.softmax(-1)
            out = weights @ v[0].float()
            apart = (out - out.mean(0, keepdim=True)).norm(dim=-1)
            self.sums["mass"][layer] += weights[:, :, far].sum(-1).mean(1).double().cpu()
            self.sums["distance"][layer] += apart.mean(1).double().cpu()
            self.calls[layer] += 1

        return observe

    def scores(self, by: By) -> Tensor:
        """(layers, heads) float64.

        Raises:
            ValueError: no chunk was made in a full window.
        """
        if not bool((self.calls > 0).all()):
            raise ValueError("no chunk was made in a full window: measure a longer stream")
        return self.sums[by] / self.calls[:, None]


@dataclass(frozen=True)
class MeasuredRoles:
    """What `measure_roles` found.

    Attributes:
        roles: for `sparsereel.stream(..., head_roles=)`.
        scores: (layers, heads) by name.
        about: how it was measured.
    """

    roles: HeadRoles
    scores: dict[By, Tensor]
    about: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load_roles` and `sparsereel stream --roles` read."""
        rounded = {name: [[round(x, 5) for x in row] for row in table.tolist()] for name, table in self.scores.items()}
        layers, heads = self.scores["mass"].shape
        write_roles(Path(path), self.roles, layers, heads, {**self.about, "scores": rounded})


def choose_streaming(scores: Tensor, keep: float, *, within_layers: bool) -> dict[int, tuple[int, ...]]:
    """Streaming heads by layer: all but the best `keep` of (layers, heads) scores, over all layers or within each.

    The number of heads kept is rounded up, so that keep > 0 keeps one; equal scores keep the lower number.
    """
    layers, heads = scores.shape
    if within_layers:
        parts = [[(layer, head) for head in range(heads)] for layer in range(layers)]
    else:
        parts = [[(layer, head) for layer in range(layers) for head in range(heads)]]
    streaming: dict[int, list[int]] = {}
    for part in parts:
        ranked = sorted(part, key=lambda place: -float(scores[place]))
        for layer, head in ranked[math.ceil(keep * len(ranked)) :]:
            streaming.setdefault(layer, []).append(head)
    return {layer: tuple(sorted(found)) for layer, found in sorted(streaming.items())}


def measure_roles(
    pipe: Any,
    prompts: Sequence[str],
    *,
    recent: int | None = None,
    keep: float = 0.25,
    by: By = "mass",
    chunks: int = 4,
    **arguments: Any,
) -> MeasuredRoles:
    """Stream each prompt and divide the heads into retrieval and streaming heads.

    Args:
        pipe: a pipeline that `sparsereel.stream` caches.
        recent: latent frames that streaming heads will see besides the sink; None = half the window, at least a chunk.
        keep: share of heads that stay retrieval heads (RazorAttention's tool: 0.15).
        by: the score that decides.
        chunks: to make after the window has filled.
        arguments: of `sparsereel.stream`: method, window, sink, steps, guidance, height, seed ...

    Raises:
        ValueError: arguments out of range, or a method or model without a cache.
    """
    import sparsereel

    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be a share of the heads, 0 to 1, got {keep}")
    if by not in SCORES:
        raise ValueError(f"unknown score {by!r}; allowed: {', '.join(SCORES)}")
    if chunks < 1 or not prompts:
        raise ValueError("measuring roles needs at least one prompt and one chunk")
    given = {"method": "streaming-llm", **arguments}
    sums: dict[By, Tensor] = {}
    plan = None
    for number, prompt in enumerate(prompts):
        stream = sparsereel.stream(pipe, prompt, output="latents", **{"seed": number, **given})
        plan, caches = stream.engine.plan, stream.engine.denoiser.caches
        if not caches or plan.budget is not None:
            raise ValueError(
                f"roles are measured with a method that keeps a plain window, not with {plan.method.name!r}"
            )
        frames = recent if recent is not None else max(plan.draft, plan.window // 2)
        if not plan.draft <= frames < plan.window - plan.sink:
            raise ValueError(
                f"recent must be {plan.draft} (a chunk) to {plan.window - plan.sink - 1} latent frames, got {frames}"
            )
        with RoleMeter(caches[0], stream.engine.denoiser.model.config.num_attention_heads, frames) as meter:
            for _ in range(-(-plan.window // plan.chunk) + chunks):
                next(stream)
        sums = {name: (sums[name] + meter.scores(name)) if number else meter.scores(name) for name in SCORES}
    assert plan is not None
    scores = {name: table / len(prompts) for name, table in sums.items()}
    streaming = choose_streaming(scores[by], keep, within_layers=by == "distance")
    about = {"by": by, "keep": keep, "method": plan.method.name, "window": plan.window, "sink": plan.sink}
    return MeasuredRoles(HeadRoles(streaming, frames), scores, {**about, "prompts": list(prompts)})
