"""One layer's cache against a brute force that keeps every key it was ever given."""

from __future__ import annotations

import math

import pytest
import torch

from sparsereel.extend.rope import plain_frequencies
from sparsereel.stream.cache import CachePolicy, HeadCache, HeadGroup, KVCache
from sparsereel.stream.eviction import Fifo, Participation, participation_keep
from sparsereel.stream.positions import POLICIES, position_policy
from sparsereel.stream.roles import HeadRoles, single_heads
from sparsereel.stream.rotary import rotate_time, time_angles
from sparsereel_kernels import BlockMask, sparse_attention

HEADS, DIM, TIME, TOKENS, CHUNK = 2, 12, 4, 3, 2
THETA = plain_frequencies(TIME, 100.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(window, sink, positions="absolute", evicting=None, storage="full", draft=CHUNK, heads=None):
    group = HeadGroup(heads, sink, window)
    return CachePolicy(((group,),), draft, THETA, evicting or Fifo(), position_policy(positions), storage)


def cache_of(*args, **kwargs) -> HeadCache:
    policy = policy_of(*args, **kwargs)
    return HeadCache(policy.groups[0][0], policy, HEADS, DIM, TOKENS, torch.float32, torch.device("cpu"))


def draw(generator, frames):
    return (torch.randn(1, HEADS, frames * TOKENS, DIM, generator=generator) for _ in range(3))


def turned(x, position):
    """Time rotation of one token (H, D) as complex numbers."""
    z = torch.view_as_complex(x[..., :TIME].double().reshape(*x.shape[:-1], TIME // 2, 2))
    z = z * torch.exp(1j * THETA * position)
    return torch.cat([torch.view_as_real(z).flatten(-2), x[..., TIME:].double()], -1)


class BruteForce:
    """Every token ever committed with its frame; what is resident is a list of indices."""

    def __init__(self, window, sink, positions, evicting):
        self.window, self.sink, self.positions, self.evicting = window, sink, positions, evicting
        self.k, self.v, self.frame, self.picked = [], [], [], []
        self.resident: list[int] = []
        self.queries: dict[int, torch.Tensor] = {}
        self.realigned = None

    def attend(self, q, k, v, start, fresh):
        frames = q.shape[2] // TOKENS
        draft = [(start + i // TOKENS, k[0, :, i], v[0, :, i]) for i in range(k.shape[2])]
        for i in range(frames):
            self.queries[start + i] = q[0, :, i * TOKENS : (i + 1) * TOKENS]
        if fresh and len(self.resident) + len(draft) > self.window * TOKENS:
            self.evict(draft, start, frames)
        at, own = self.placed(self.resident, start)
        keys = [turned(self.k[i], p) for i, p in zip(self.resident, at, strict=True)]
        keys += [turned(key, own + frame - start) for frame, key, _ in draft]
        values = torch.stack([self.v[i] for i in self.resident] + [value for _, _, value in draft], 1).double()
        keys = torch.stack(keys, 1)
        rows = []
        for i in range(q.shape[2]):
            logits = torch.einsum("hd,hnd->hn", turned(q[0, :, i], own + i // TOKENS), keys) / math.sqrt(DIM)
            rows.append(torch.einsum("hn,hnd->hd", logits.softmax(-1), values))
        return torch.stack(rows, 1)[None].float()

    def placed(self, resident, start):
        """Positions of resident tokens, and of the draft's first frame."""
        frames = [self.frame[i] for i in resident]
        sinks = sorted({f for f in frames if f < self.sink})
        if self.positions == "index":
            return [n // TOKENS for n in range(len(frames))], len(frames) // TOKENS
        first = {"sink-before-window": None, "sink-realigned": self.realigned}.get(self.positions, 0)
        if self.positions == "sink-before-window":
            others = [f for f in frames if f >= self.sink]
            first = (min(others) if others else start) - len(sinks)
        if first is None:
            first = 0
        return [first + sinks.index(f) if f < self.sink else f for f in frames], start

    def evict(self, draft, start, frames):
        if self.evicting is None:
            room = (self.window - frames) * TOKENS
            sink = [i for i in self.resident if self.frame[i] < self.sink]
            others = [i for i in self.resident if self.frame[i] >= self.sink]
            self.resident = sink + others[len(others) - (room - len(sink)) :]
            return
        rule = self.evicting
        recent_from = start + frames - rule.recent
        voters = [f for f in sorted(self.queries) if f >= recent_from]
        middle = [i for i in self.resident if self.sink <= self.frame[i] < recent_from]
        at, own = self.placed(self.resident, start)
        where = dict(zip(self.resident, at, strict=True))
        scores = {}
        for i in middle:
            key = turned(self.k[i], where[i] - own)
            votes = [(turned(self.queries[f][:, n], f - start) * key).sum() for f in voters for n in range(TOKENS)]
            scores[i] = float(sum(votes))
        wanted = (rule.budget - rule.recent - self.sink) * TOKENS
        allowed = [i for i in middle if not rule.max_reuse or self.picked[i] < rule.max_reuse]
        best = sorted(sorted(allowed, key=lambda i: -scores[i])[:wanted])
        for i in best:
            self.picked[i] += 1
        sink = [i for i in self.resident if self.frame[i] < self.sink]
        self.resident = sink + best + [i for i in self.resident if self.frame[i] >= recent_from]
        self.realigned = start - rule.budget

    def commit(self, k, v, start, frames):
        for i in range(frames * TOKENS):
            self.resident.append(len(self.k))
            self.k.append(k[0, :, i])
            self.v.append(v[0, :, i])
            self.frame.append(start + i // TOKENS)
            self.picked.append(0)


RULES = {"fifo": None, "participation": Participation(6, 3, max_reuse=2), "no cap": Participation(6, 3, max_reuse=0)}


@pytest.mark.parametrize("positions", list(POLICIES))
@pytest.mark.parametrize("rule", list(RULES))
def test_equals_brute_force(positions, rule):
    """Twelve chunks, each denoised twice and then written clean, through a window of eight frames."""
    cache = cache_of(8, 2, positions, RULES[rule])
    brute = BruteForce(8, 2, positions, RULES[rule])
    generator = torch.Generator().manual_seed(3)
    for chunk in range(12):
        start = chunk * CHUNK
        for step in range(3):
            q, k, v = draw(generator, CHUNK)
            expected = brute.attend(q, k, v, start, fresh=step == 0)
            torch.testing.assert_close(cache.attend(q, k, v, start), expected, atol=1e-5, rtol=1e-5)
        cache.commit(CHUNK)
        brute.commit(k, v, start, CHUNK)
        assert cache.frame_ids[: cache.filled].tolist() == [brute.frame[i] for i in brute.resident]


@pytest.mark.parametrize("positions", list(POLICIES))
def test_shifting_all_frames_changes_no_bit(positions):
    """Only differences matter, however far the video has come. (The first frames name the sink.)"""

    def roll(first):
        cache = cache_of(6, 2, positions)
        generator = torch.Generator().manual_seed(3)
        out = []
        for chunk in range(6):
            out.append(cache.attend(*draw(generator, CHUNK), first + chunk * CHUNK))
            cache.commit(CHUNK)
        return torch.cat(out, 2)

    assert torch.equal(roll(0), roll(1_000_000))


def test_a_step_may_run_again():
    cache = cache_of(6, 2)
    generator = torch.Generator().manual_seed(3)
    for chunk in range(5):
        q, k, v = draw(generator, CHUNK)
        first = cache.attend(q, k, v, chunk * CHUNK)
        filled = cache.filled
        assert torch.equal(cache.attend(q, k, v, chunk * CHUNK), first)
        assert cache.filled == filled
        cache.commit(CHUNK)


def test_deep_forcing_compresses_every_second_chunk():
    """S=10, N=16, R=4 of 21 frames in chunks of 3: the published sizes, and the cadence that follows from them."""
    cache = cache_of(21, 10, "sink-realigned", Participation(16, 4), draft=3)
    generator = torch.Generator().manual_seed(3)
    resident = []
    for chunk in range(12):
        cache.attend(*draw(generator, 3), chunk * 3)
        resident.append(cache.filled // TOKENS + 3)
        cache.commit(3)
    assert resident == [3, 6, 9, 12, 15, 18, 21, 16, 19, 16, 19, 16]
    assert cache.realigned == 33 - 16


def test_participation_keeps_in_order_and_honours_the_cap():
    scores = torch.tensor([1.0, 9.0, 3.0, 8.0, 2.0])
    reuse = torch.tensor([0, 7, 0, 1, 0], dtype=torch.int32)
    assert participation_keep(scores, reuse, 2, 7, never_chosen=3).tolist() == [2, 3]
    assert participation_keep(scores, reuse, 2, 0, never_chosen=3).tolist() == [1, 3]
    assert participation_keep(scores, reuse, 2, 7, never_chosen=1).tolist() == [3]


def test_rotation_composes():
    x = torch.randn(5, DIM, dtype=torch.float64)
    a, b, both = _angles()
    torch.testing.assert_close(rotate_time(rotate_time(x, *a), *b), rotate_time(x, *both), atol=1e-10, rtol=0)


def _angles():
    n = torch.arange(5, dtype=torch.float64)
    found = []
    for positions in (n, 3 * n + 7, 4 * n + 7):
        angle = torch.outer(positions, THETA)
        found.append((angle.cos(), angle.sin()))
    return found


def test_angles_do_not_end():
    cos, sin = time_angles(torch.tensor([1_000_000]), THETA)
    exact = 1_000_000 * THETA
    torch.testing.assert_close(cos[0].double(), exact.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0].double(), exact.sin(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("storage", "close"), [("int8", 0.02), ("fp8", 0.08)])
def test_eight_bits_are_close_and_small(storage, close):
    def roll(kind):
        policy = policy_of(6, 2, storage=kind)
        cache = KVCache(policy, HEADS, DIM, TOKENS)
        generator = torch.Generator().manual_seed(3)
        for chunk in range(5):
            cache.start = chunk * CHUNK
            out = cache.attend(0, *draw(generator, CHUNK))
            cache.commit(CHUNK)
        return out, sum(group.keys.data.element_size() for group in cache)

    exact, full = roll("full")
    near, small = roll(storage)
    assert 0 < (exact - near).abs().max() < close
    assert small * 4 == full


def test_streaming_heads_see_sink_and_recent_only():
    """Heads of two roles in one layer, each against a cache of its own."""
    whole = HeadGroup(None, 2, 8)
    groups = HeadRoles({0: (1,)}, recent=4).groups(0, HEADS, whole)
    assert groups == (HeadGroup((0,), 2, 8), HeadGroup((1,), 2, 6))
    mixed = KVCache(CachePolicy((groups,), CHUNK, THETA), HEADS, DIM, TOKENS)
    alone = [KVCache(policy_of(window, 2), HEADS, DIM, TOKENS) for window in (8, 6)]
    generator = torch.Generator().manual_seed(3)
    for chunk in range(7):
        q, k, v = draw(generator, CHUNK)
        for cache in (mixed, *alone):
            cache.start = chunk * CHUNK
        out = mixed.attend(0, q, k, v)
        for head, cache in enumerate(alone):
            torch.testing.assert_close(out[:, head], cache.attend(0, q, k, v)[:, head], atol=1e-6, rtol=0)
        for cache in (mixed, *alone):
            cache.commit(CHUNK)
    assert mixed.bytes < alone[0].bytes


def test_short_heads_equal_block_lists_over_the_whole_cache():
    """What a group of short heads computes is per-head lists of visible blocks over one cache for all heads."""
    sink, window, recent, tokens = 2, 8, 4, 8
    groups = HeadRoles({0: (1,)}, recent).groups(0, HEADS, HeadGroup(None, sink, window))
    mixed = KVCache(CachePolicy((groups,), CHUNK, THETA), HEADS, DIM, tokens)
    policy = policy_of(window, sink)
    whole = HeadCache(policy.groups[0][0], policy, HEADS, DIM, tokens, torch.float32, torch.device("cpu"))
    seen = {}
    whole.observer = lambda q, k, v: seen.update(q=q, k=k, v=v)
    generator = torch.Generator().manual_seed(3)
    for chunk in range(8):
        q, k, v = (torch.randn(1, HEADS, CHUNK * tokens, DIM, generator=generator) for _ in range(3))
        mixed.start = chunk * CHUNK
        found = mixed.attend(0, q, k, v)
        whole.attend(q, k, v, chunk * CHUNK)
        frames = torch.cat([whole.frame_ids[: whole.filled], torch.arange(CHUNK * tokens) // tokens + chunk * CHUNK])
        far = (frames >= sink) & (frames < (chunk + 1) * CHUNK - recent)
        visible = torch.ones(1, HEADS, CHUNK * tokens, len(frames), dtype=torch.bool)
        visible[:, 1, :, far] = False
        lists = BlockMask.from_dense(visible, (CHUNK * tokens, tokens))
        expected = sparse_attention(seen["q"], seen["k"], seen["v"], lists, backend="torch")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        mixed.commit(CHUNK)
        whole.commit(CHUNK)
    assert lists.head(1).density < lists.head(0).density == 1


def test_every_head_may_evict_by_itself():
    """A cache of single-head groups does for each head what a brute force with that head alone does."""
    rule = RULES["participation"]
    groups = single_heads((HeadGroup(None, 2, 8),), HEADS)
    policy = CachePolicy((groups,), CHUNK, THETA, rule, position_policy("sink-realigned"))
    cache = KVCache(policy, HEADS, DIM, TOKENS)
    brutes = [BruteForce(8, 2, "sink-realigned", rule) for _ in range(HEADS)]
    generator = torch.Generator().manual_seed(3)
    for chunk in range(10):
        cache.start = chunk * CHUNK
        for step in range(2):
            q, k, v = draw(generator, CHUNK)
            found = cache.attend(0, q, k, v)
            for head, brute in enumerate(brutes):
                one = slice(head, head + 1)
                expected = brute.attend(q[:, one], k[:, one], v[:, one], cache.start, fresh=step == 0)
                torch.testing.assert_close(found[:, one], expected, atol=1e-5, rtol=1e-5)
        cache.commit(CHUNK)
        for head, brute in enumerate(brutes):
            brute.commit(k[:, head : head + 1], v[:, head : head + 1], cache.start, CHUNK)
    first, second = (group.frame_ids[: group.filled].tolist() for group in cache)
    assert len(first) == len(second)
    assert brutes[0].resident != brutes[1].resident  # they chose differently


def test_roles_name_existing_heads():
    with pytest.raises(ValueError, match="layer 0 has 2 heads, so there is no head 5"):
        HeadRoles({0: (5,)}, recent=4).groups(0, HEADS, HeadGroup(None, 2, 8))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"window": 3, "sink": 2}, "must be at least 4"),
        ({"window": 8, "sink": 2, "evicting": Participation(4, 1)}, "fewer than the 2 of a chunk"),
        ({"window": 8, "sink": 4, "evicting": Participation(6, 3)}, "sink \\+ recent <= budget"),
        ({"window": 8, "sink": 2, "storage": "int4"}, "allowed: full, int8, fp8"),
        ({"window": 8, "sink": 2, "positions": "nowhere"}, "allowed: absolute, index"),
    ],
)
def test_impossible_policies_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        cache_of(**arguments)
