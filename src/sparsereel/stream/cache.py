"""The rolling cache of keys and values: one class, four policies (sink, eviction, position, write).

Keys are stored with rows and columns rotated but **not time**. Which positions the cached frames take, and by which
frequencies, is decided when they are read, so a change of policy or frequency never meets keys rotated by another one.
All memory is allocated at the beginning; nothing in the loop asks the device for a value.

A cache belongs to one guidance branch. A *draft* is the run of frames being denoised: every forward pass overwrites its
keys and values behind the committed ones. `commit` after a pass over the clean frames makes them part of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsereel.stream import eviction, positions
from sparsereel.stream.rotary import rotate_time, time_angles
from sparsereel.stream.storage import Kind, Store


@dataclass(frozen=True)
class HeadGroup:
    """Heads of a layer that share a policy.

    Attributes:
        heads: their numbers; None = all of the layer.
        sink: frames kept for ever.
        window: frames that may be attended to, sink and draft included.
    """

    heads: tuple[int, ...] | None
    sink: int
    window: int


@dataclass(frozen=True)
class CachePolicy:
    """What a cache does.

    Attributes:
        groups: one list of head groups a layer.
        draft: largest number of frames denoised at once.
        eviction, positions: policies.
        storage: "full", "int8" or "fp8".
        frequencies: (t_dim / 2,) float64, radians a frame.

    Raises:
        ValueError: a window that cannot hold sink and draft, or cannot serve the eviction policy.
    """

    groups: tuple[tuple[HeadGroup, ...], ...]
    draft: int
    frequencies: Tensor
    eviction: eviction.Eviction = field(default_factory=eviction.Fifo)
    positions: positions.PositionPolicy = field(default_factory=positions.PositionPolicy)
    storage: Kind = "full"

    def __post_init__(self) -> None:
        for group in (group for layer in self.groups for group in layer):
            if group.window < group.sink + self.draft:
                raise ValueError(
                    f"a window of {group.window} latent frames cannot hold {group.sink} of the sink and the "
                    f"{self.draft} being denoised; it must be at least {group.sink + self.draft}"
                )
            self._check_participation(group)

    def _check_participation(self, group: HeadGroup) -> None:
        policy = self.eviction
        if not isinstance(policy, eviction.Participation):
            return
        if policy.recent < self.draft:
            raise ValueError(
                f"participation keeps recent={policy.recent} frames, fewer than the {self.draft} of a chunk"
            )
        if not group.sink + policy.recent <= policy.budget <= group.window:
            raise ValueError(
                f"participation needs sink + recent <= budget <= window frames, got {group.sink} + {policy.recent}, "
                f"{policy.budget}, {group.window}"
            )


class HeadCache:
    """Keys and values of one head group of one layer.

    Args:
        frame_tokens: tokens a latent frame.
    """

    def __init__(
        self,
        group: HeadGroup,
        policy: CachePolicy,
        heads: int,
        head_dim: int,
        frame_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        self.group = group
        self.policy = policy
        self.frame_tokens = frame_tokens
        self.index = None if group.heads is None else torch.tensor(group.heads, device=device)
        count = heads if group.heads is None else len(group.heads)
        self.compresses = isinstance(policy.eviction, eviction.Participation)
        # A new chunk lies beside the full window until the middle is compressed.
        capacity = (group.window + (policy.draft if self.compresses else 0)) * frame_tokens
        self.keys = Store(policy.storage, count, capacity, head_dim, dtype, device)
        self.values = Store(policy.storage, count, capacity, head_dim, dtype, device)
        self.frame_ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.reuse = torch.zeros(capacity, dtype=torch.int32, device=device)
        # Keys as rotated for the current draft: positions do not change between its steps. Where storage is to be
        # small, layers share one such buffer and rotate anew at every pass.
        self.shares = scratch is not None and policy.storage != "full"
        shared = {} if scratch is None or not self.shares else scratch
        if (count, capacity) not in shared:
            shared[count, capacity] = torch.zeros(1, count, capacity, head_dim, dtype=dtype, device=device)
        self.rotated = shared[count, capacity]
        self.query_sums = torch.zeros(max(1, self._voters), count, head_dim, dtype=torch.float32, device=device)
        self.query_frames: list[int] = []
        self.filled = 0  # committed tokens
        self.survivors = 0  # of the last compression
        self.realigned: int | None = None
        self.drafted: tuple[int, int] | None = None
        #: is shown q, k, v of every call as they meet; see role_meter.py
        self.observer: Callable[[Tensor, Tensor, Tensor], None] | None = None

    @property
    def _voters(self) -> int:
        found = self.policy.eviction
        return found.recent if isinstance(found, eviction.Participation) else 0

    @property
    def sink_tokens(self) -> int:
        """Committed tokens of the sink."""
        return min(self.filled, self.group.sink * self.frame_tokens)

    # -------------------------------------------------------------- attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Attention of a draft that begins at frame `start` over the context and itself.

        Args:
            q, k, v: (1, heads of the group, draft tokens, D); time not rotated.

        Returns:
            (1, heads, draft tokens, D).
        """
        tokens = k.shape[2]
        frames = tokens // self.frame_tokens
        fresh = self.drafted != (start, frames)
        if fresh:
            self.drafted = (start, frames)
            if not self.compresses:
                self._make_room(tokens)
        self._write(k, v, start)
        if self.compresses:
            self._observe(q, start)
            if fresh and self.filled + tokens > self.group.window * self.frame_tokens:
                self._compress(start, tokens)
        relative = self._relative_positions(start)
        theta = self.policy.frequencies
        own = torch.arange(frames, device=k.device).repeat_interleave(self.frame_tokens)
        cos, sin = time_angles(own, theta)
        end = self.filled + tokens
        if (fresh or self.shares) and self.filled:
            old = time_angles(relative, theta)
            rotate_time(self.keys.read(0, self.filled), *old, out=self.rotated[:, :, : self.filled])
        rotate_time(self.keys.read(self.filled, end), cos, sin, out=self.rotated[:, :, self.filled : end])
        turned, keys, values = rotate_time(q, cos, sin), self.rotated[:, :, :end], self.values.read(0, end)
        if self.observer is not None:
            self.observer(turned, keys, values)
        return F.scaled_dot_product_attention(turned, keys, values)

    def _write(self, k: Tensor, v: Tensor, start: int) -> None:
        end = self.filled + k.shape[2]
        self.keys.write(self.filled, k)
        self.values.write(self.filled, v)
        line = torch.arange(k.shape[2], device=k.device) // self.frame_tokens
        self.frame_ids[self.filled : end] = line + start
        self.reuse[self.filled : end] = 0

    def _relative_positions(self, start: int) -> Tensor:
        """Positions of the committed tokens, counted from the draft's first frame.

        Being so counted, the same angles recur for ever, bit for bit.
        """
        section = positions.Section(
            self.frame_ids[: self.filled], self.sink_tokens, self.frame_tokens, start, self.realigned
        )
        return self.policy.positions.keys(section) - self.policy.positions.queries(section)

    # -------------------------------------------------------------- eviction

    def _make_room(self, tokens: int) -> None:
        room = self.group.window * self.frame_tokens - tokens
        if self.filled > room:
            index = eviction.fifo_keep(self.filled, self.sink_tokens, room, self.frame_ids.device)
            self._keep(index)
            self.filled = room

    def _keep(self, index: Tensor) -> None:
        self.keys.keep(index)
        self.values.keep(index)
        count = index.shape[0]
        self.frame_ids[:count] = self.frame_ids[index]
        self.reuse[:count] = self.reuse[index]

    def _observe(self, q: Tensor, start: int) -> None:
        """Remember the sum of each frame's queries; a later pass over the same frame replaces it.

        Tokens of a frame turn by the same angle in time, so their sum does.
        """
        sums = q[0].float().unflatten(1, (-1, self.frame_tokens)).sum(2).transpose(0, 1)
        for number, total in enumerate(sums):
            self.query_sums[(start + number) % self._voters] = total
        newest = start + len(sums)
        first = min(self.query_frames[0] if self.query_frames else start, start)
        self.query_frames = list(range(max(first, newest - self._voters), newest))

    def _compress(self, start: int, tokens: int) -> None:
        policy = self.policy.eviction
        assert isinstance(policy, eviction.Participation)
        end, sink = self.filled + tokens, self.sink_tokens
        recent = policy.recent * self.frame_tokens
        middle = slice(sink, end - recent)
        wanted = (policy.budget - policy.recent) * self.frame_tokens - sink
        relative = self._relative_positions(start)
        cos, sin = time_angles(relative[middle], self.policy.frequencies)
        keys = rotate_time(self.keys.read(middle.start, middle.stop), cos, sin)[0]
        scores = eviction.participation_scores(self._votes(start), keys)
        fresh = middle.stop - middle.start - self.survivors
        chosen = eviction.participation_keep(scores, self.reuse[middle], wanted, policy.max_reuse, fresh) + sink
        self.reuse[chosen] += 1
        everything = torch.arange(end, device=chosen.device)
        self._keep(torch.cat([everything[:sink], chosen, everything[end - recent :]]))
        self.survivors = chosen.shape[0]
        self.filled = sink + self.survivors + recent - tokens
        self.realigned = start - policy.budget

    def _votes(self, start: int) -> Tensor:
        """The sum of the recent queries, each rotated to its place in time counted from the draft."""
        frames = torch.tensor(self.query_frames, device=self.query_sums.device)
        cos, sin = time_angles(frames - start, self.policy.frequencies)
        ring = self.query_sums[frames % self._voters].transpose(0, 1)  # (heads, voters, D)
        return rotate_time(ring, cos, sin).sum(1)

    # -------------------------------------------------------------- life

    def commit(self, frames: int) -> None:
        """The first frames of the draft, as last written, become context."""
        self.filled += frames * self.frame_tokens
        self.drafted = None

    def clear(self, keep_sink: bool) -> None:
        """Forget everything, or everything but the sink."""
        self.filled = self.sink_tokens if keep_sink else 0
        self.survivors = 0
        self.query_frames = []
        self.drafted = None
        if not keep_sink:
            self.realigned = None

    @property
    def bytes(self) -> int:
        """Memory of this group's own buffers."""
        return self.keys.bytes + self.values.bytes + (0 if self.shares else self.rotated.nbytes)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """What a checkpoint needs; only between drafts."""
        tensors = {"frame_ids": self.frame_ids[: self.filled], "reuse": self.reuse[: self.filled]}
        for name, store in (("keys", self.keys), ("values", self.values)):
            tensors |= {f"{name}.{part}": tensor for part, tensor in store.tensors(self.filled).items()}
        if self.compresses:
            tensors["query_sums"] = self.query_sums
        numbers = {name: getattr(self, name) for name in ("filled", "survivors", "realigned", "query_frames")}
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        """Undo `state`."""
        for name, value in numbers.items():
            setattr(self, name, value)
        self.frame_ids[: self.filled] = tensors["frame_ids"]
        self.reuse[: self.filled] = tensors["reuse"]
        for name, store in (("keys", self.keys), ("values", self.values)):
            store.load({part: tensors[f"{name}.{part}"] for part in store.tensors(0)})
        if self.compresses:
            self.query_sums.copy_(tensors["query_sums"])
        self.drafted = None


class KVCache:
    """All layers of one guidance branch.

    Args:
        heads, head_dim: of every layer.
        frame_tokens: tokens a latent frame.
    """

    def __init__(
        self,
        policy: CachePolicy,
        heads: int,
        head_dim: int,
        frame_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        where = torch.device(device)
        self.policy = policy
        self.scratch: dict[tuple[int, int], Tensor] = {}
        self.layers = [
            [HeadCache(group, policy, heads, head_dim, frame_tokens, dtype, where, self.scratch) for group in groups]
            for groups in policy.groups
        ]
        #: first frame of the draft that the next forward pass is about
        self.start = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer: (1, heads, draft tokens, D) each, time not rotated."""
        groups = self.layers[layer]
        if groups[0].index is None:
            return groups[0].attend(q, k, v, self.start)
        out = torch.empty_like(q)
        for group in groups:
            assert group.index is not None
            own_q, own_k, own_v = (x.index_select(1, group.index) for x in (q, k, v))
            out.index_copy_(1, group.index, group.attend(own_q, own_k, own_v, self.start))
        return out

    def commit(self, frames: int) -> None:
        """See `HeadCache.commit`."""
        for group in self:
            group.commit(frames)

    def clear(self, keep_sink: bool) -> None:
        """See `HeadCache.clear`."""
        for group in self:
            group.clear(keep_sink)

    def __iter__(self) -> Iterator[HeadCache]:
        return (group for groups in self.layers for group in groups)

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(group.bytes for group in self) + sum(buffer.nbytes for buffer in self.scratch.values())

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
        """What a checkpoint needs; only between drafts."""
        tensors: dict[str, Tensor] = {}
        numbers = []
        for number, group in enumerate(self):
            found, more = group.state()
            tensors |= {f"{number}.{name}": tensor for name, tensor in found.items()}
            numbers.append(more)
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: Sequence[dict[str, object]]) -> None:
        """Undo `state`."""
        for number, group in enumerate(self):
            prefix = f"{number}."
            found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            group.load(found, numbers[number])
