"""The one loop that runs any method's table: rows of a schedule over a window of latents, with or without caches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from sparsereel.extend.rope import YaRN
from sparsereel.stream import eviction, positions, schedules
from sparsereel.stream.attending import self_attention, time_frequencies
from sparsereel.stream.cache import CachePolicy, HeadGroup, KVCache
from sparsereel.stream.denoiser import Denoiser
from sparsereel.stream.latents import LatentWindow
from sparsereel.stream.levels import Levels
from sparsereel.stream.methods import Plan
from sparsereel.stream.noise import NoiseSource
from sparsereel.stream.roles import HeadRoles, single_heads
from sparsereel.stream.storage import Kind


class Engine:
    """Denoises one endless line of latent frames.

    Args:
        frames: latent frames to make; None = no end.
        trained: latent frames that the model was trained on.
        refresh_sink: on a prompt switch the sink is recomputed, too.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        levels: Levels,
        plan: Plan,
        noise: NoiseSource,
        frames: int | None,
        trained: int,
        *,
        storage: Kind = "full",
        refresh_sink: bool = False,
        roles: HeadRoles | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.levels = levels
        self.plan = plan
        self.frames = frames
        self.trained = trained
        self.refresh_sink = refresh_sink
        self.rows_done = 0
        self.finished = 0  # latent frames that are clean and given out
        self.queue = plan.method.schedule == "diagonal"
        first = plan.window - levels.steps - plan.window if self.queue else 0
        device = denoiser.model.device
        self.latents = LatentWindow(noise, self._capacity(), device, first)
        self._rows = self._schedule()
        if plan.method.cached:
            policy = self._cache_policy(storage, roles)
            denoiser.caches = [self._cache(policy, noise.shape) for _ in range(denoiser.branches)]

    # -------------------------------------------------------------- set-up

    def _schedule(self) -> Iterator[schedules.Row]:
        plan, steps = self.plan, self.levels.steps
        if plan.method.schedule == "lockstep":
            return schedules.lockstep(steps, plan.window, plan.overlap, frames=self.frames)
        if self.queue:
            return schedules.diagonal(steps, plan.window, lookahead=plan.lookahead, frames=self.frames)
        window = None if plan.method.cached else plan.window
        return schedules.staircase(steps, plan.chunk, plan.lag or steps, frames=self.frames, window=window)

    def _capacity(self) -> int:
        plan = self.plan
        if self.queue:
            return self.levels.steps + plan.window
        # Cached: the window may have to be computed anew at a prompt switch.
        return plan.window + plan.draft

    def _cache_policy(self, storage: Kind, roles: HeadRoles | None) -> CachePolicy:
        plan = self.plan
        model = self.denoiser.model
        frequencies = time_frequencies(model)
        if plan.method.interpolates:
            # The longest distance that a query meets is the window.
            policy = YaRN(temper=False)
            frequencies = policy.frequencies(
                2 * frequencies.shape[0], 1e4, self.trained, max(plan.window, self.trained)
            )
        evicting: eviction.Eviction = eviction.Fifo()
        if plan.budget is not None and plan.recent is not None:
            evicting = eviction.Participation(plan.budget, plan.recent, plan.max_reuse)
        layers = self_attention(model)
        whole = HeadGroup(None, plan.sink, plan.window)
        if roles is not None and max(roles.streaming, default=0) >= len(layers):
            raise ValueError(f"the model has {len(layers)} layers, so there is no layer {max(roles.streaming)}")
        groups = [(whole,) if roles is None else roles.groups(i, m.heads, whole) for i, m in enumerate(layers)]
        if plan.per_head:
            groups = [single_heads(found, m.heads) for found, m in zip(groups, layers, strict=True)]
        where = positions.position_policy(plan.method.positions)
        return CachePolicy(tuple(groups), plan.draft, frequencies, evicting, where, storage)

    def _cache(self, policy: CachePolicy, shape: tuple[int, ...]) -> KVCache:
        model = self.denoiser.model
        _, rows, columns = model.config.patch_size
        tokens = (shape[1] // rows) * (shape[2] // columns)
        config = model.config
        return KVCache(policy, config.num_attention_heads, config.attention_head_dim, tokens, model.dtype, model.device)

    # -------------------------------------------------------------- the loop

    def next_row(self) -> schedules.Row | None:
        """The pass that comes next; None at the end."""
        return next(self._rows, None)

    def skip(self, rows: int) -> None:
        """Go on after so many rows, whose work is done."""
        next(islice(self._rows, rows, rows), None)
        self.rows_done = rows

    def run(self, row: schedules.Row) -> Tensor | None:
        """One pass; the clean latents (C, F, h, w) that it finished, or None."""
        if self.queue and self.rows_done == 0:
            self._fill_queue()
        self.latents.extend(row.stop)
        shown, told = self._context(row)
        velocity = self.denoiser.velocity(shown, told, row.start)
        for first, last in _runs(row.update):
            done = row.done[first:last]
            x = self.latents.read(row.start + first, row.start + last)
            stepped = self.levels.advance(x, velocity[:, first:last], done, row.start + first, self.latents.noise)
            self.latents.write(row.start + first, stepped)
        self.rows_done += 1
        if row.final is None:
            return None
        clean = self.latents.read(*row.final)
        if self.denoiser.caches and row.final[1] != self.frames:
            self.denoiser.commit(clean, 0.0, row.final[0])
        self.finished = row.final[1]
        return clean.clone()

    def _context(self, row: schedules.Row) -> tuple[Tensor, list[float]]:
        """What the model sees, and the timestep that it is told for each frame."""
        latents = self.latents.read(row.start, row.stop)
        times = self.levels.timesteps
        steps = self.levels.steps
        clean = [i for i, done in enumerate(row.done) if done == steps]
        told = [float(times[done]) for done in row.done]
        if not clean:
            return latents, told
        if self.queue:
            # Frames that have left the queue are as clean as its head is about to be.
            told = [float(times[min(done, steps - 1)]) for done in row.done]
        elif self.plan.method.prefix == "noised":
            level = min(row.done)
            noise = self.latents.noise.frames(row.start, row.start + len(clean))
            latents = latents.clone()
            latents[:, clean] = self.levels.noised(latents[:, clean], [level] * len(clean), noise)
            told = [float(times[level])] * len(told)
        return latents, told

    def _fill_queue(self) -> None:
        """A FIFO queue starts from one ordinary clip, each of its frames noised to its place; the first frame stands in
        for those before the clip."""
        plan, levels = self.plan, self.levels
        noise, steps = self.latents.noise, levels.steps
        clip = LatentWindow(noise, plan.window, self.latents.data.device)
        clip.extend(plan.window)
        for step in range(steps):
            x = clip.read(0, plan.window)
            velocity = self.denoiser.velocity(x, [float(levels.timesteps[step])] * plan.window, 0)
            clip.write(0, levels.advance(x, velocity, [step] * plan.window, 0, noise))
        head = plan.window - steps
        self.latents.extend(plan.window)
        for frame in range(self.latents.base, plan.window):
            one = clip.read(max(0, frame), max(0, frame) + 1)
            done = min(steps, steps - 1 - (frame - head))
            self.latents.write(frame, levels.noised(one, [done], noise.frames(frame, frame + 1)))

    # -------------------------------------------------------------- prompts

    def set_prompt(self, prompt: str) -> None:
        """The prompt from the next pass on; a filled cache is computed anew with it (LongLive's KV re-cache)."""
        self.denoiser.set_prompt(prompt)
        if self.denoiser.caches and self.finished and self.plan.method.recache:
            self._recache()

    def _recache(self) -> None:
        keep_sink = not self.refresh_sink
        plan = self.plan
        for cache in self.denoiser.caches:
            cache.clear(keep_sink)
        first = plan.sink if keep_sink else 0
        room = plan.window - (plan.sink if keep_sink else 0) - plan.draft
        start = max(first, self.finished - room)
        # Whole chunks: the model has never seen another beginning.
        start = min(self.finished, -(-start // plan.chunk) * plan.chunk)
        for begin in range(start, self.finished, plan.chunk):
            clean = self.latents.read(begin, min(begin + plan.chunk, self.finished))
            self.denoiser.commit(clean, 0.0, begin)

    # -------------------------------------------------------------- checkpoints

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs, after any row."""
        tensors = {"latents": self.latents.data}
        numbers: dict[str, Any] = {
            "rows": self.rows_done,
            "finished": self.finished,
            "base": self.latents.base,
            "stop": self.latents.stop,
            "caches": [],
        }
        for branch, cache in enumerate(self.denoiser.caches):
            found, more = cache.state()
            tensors |= {f"cache{branch}.{name}": x for name, x in found.items()}
            numbers["caches"].append(more)
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Undo `state` on a fresh engine of the same settings."""
        self.latents.data.copy_(tensors["latents"])
        self.latents.base, self.latents.stop = numbers["base"], numbers["stop"]
        self.finished = numbers["finished"]
        self.skip(numbers["rows"])
        for branch, cache in enumerate(self.denoiser.caches):
            prefix = f"cache{branch}."
            found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            cache.load(found, numbers["caches"][branch])

    @property
    def cache_bytes(self) -> int:
        """Memory of all caches."""
        return sum(cache.bytes for cache in self.denoiser.caches)


def _runs(update: tuple[bool, ...]) -> Iterator[tuple[int, int]]:
    """Ranges (first, one past the last) of frames that take a step."""
    start = None
    for i, on in enumerate((*update, False)):
        if on and start is None:
            start = i
        elif not on and start is not None:
            yield start, i
            start = None


def pixel_frames(latent_frames: int, ratio: int) -> int:
    """Frames that a causal VAE makes of so many latent frames."""
    return 1 + ratio * (latent_frames - 1) if latent_frames else 0


def latent_frames(frames: int, ratio: int) -> int:
    """Latent frames needed for so many frames."""
    return -(-(frames - 1) // ratio) + 1
