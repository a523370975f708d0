"""Tables of passes against simulators that are written after the papers' own procedures."""

from __future__ import annotations

from itertools import islice

import pytest

from sparsereel.stream.schedules import diagonal, lockstep, staircase


def states(rows, frames, steps):
    """Replay a table frame by frame: checks what every table must hold and returns each frame's history."""
    done = dict.fromkeys(range(frames), 0)
    history = {frame: [] for frame in range(frames)}
    shown = []
    for number, row in enumerate(rows):
        for frame, before, updates in zip(range(row.start, row.stop), row.done, row.update, strict=True):
            assert done[frame] == before
            if updates:
                history[frame].append((number, before))
                done[frame] += 1
        if row.final:
            assert all(done[frame] == steps for frame in range(*row.final))
            shown += range(*row.final)
    assert shown == list(range(frames))
    assert all([before for _, before in history[frame]] == list(range(steps)) for frame in range(frames))
    return history


def skyreels(steps, blocks, lag):
    """The released recursion: the first unfinished block, or one whose predecessor has reached its last step, advances;
    any other is `lag` behind its predecessor. Yields the counters after each pass."""
    counters = [0] * blocks
    while min(counters) < steps:
        new = []
        for i, before in enumerate(counters):
            if i == 0 or counters[i - 1] >= steps:
                new.append(min(steps, before + 1))
            else:
                new.append(max(0, min(steps, new[i - 1] - lag)))
        counters = new
        yield list(counters)


@pytest.mark.parametrize(("steps", "lag"), [(1, 1), (2, 1), (2, 2), (5, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("frames", [1, 6, 7, 11])
def test_staircase_equals_the_diffusion_forcing_recursion(steps, frames, lag):
    chunk = 3
    blocks = -(-frames // chunk)
    rows = list(staircase(steps, chunk, lag, frames=frames))
    states(rows, frames, steps)
    expected = list(skyreels(steps, blocks, lag))
    assert len(rows) == len(expected) == steps + (blocks - 1) * lag
    for row, counters in zip(rows, expected, strict=True):
        for frame, before, updates in zip(range(row.start, row.stop), row.done, row.update, strict=True):
            assert before + updates == counters[frame // chunk]
        # Not seen: finished before, or not begun.
        unseen = [counters[f // chunk] for f in range(frames) if not row.start <= f < row.stop]
        assert all(count in (0, steps) for count in unseen)


def test_a_tail_that_is_no_whole_chunk_is_not_lost():
    rows = list(staircase(4, 3, 2, frames=8, window=6))
    assert rows[-1].final == (6, 8)


@pytest.mark.parametrize("chunks", [1, 3, 5, 9])
def test_rolling_is_a_window_of_rising_noise(chunks):
    """Rolling Forcing: chunks + steps - 1 passes; in the full window chunk c from the left has steps - 1 - c done."""
    steps, chunk = 5, 3
    rows = list(staircase(steps, chunk, 1, frames=chunks * chunk))
    assert len(rows) == chunks + steps - 1
    states(rows, chunks * chunk, steps)
    for number, row in enumerate(rows):
        window = range(max(0, number - steps + 1), min(number, chunks - 1) + 1)
        assert (row.start, row.stop) == (window[0] * chunk, (window[-1] + 1) * chunk)
        assert list(row.done) == [number - c for c in window for _ in range(chunk)]
        assert list(row.done) == sorted(row.done, reverse=True)


def test_a_lag_of_all_steps_is_one_chunk_after_another():
    rows = list(staircase(4, 3, 4, frames=9))
    assert [(row.start, row.done) for row in rows] == [(c * 3, (n,) * 3) for c in range(3) for n in range(4)]


def test_the_window_shows_clean_frames_before_the_unfinished():
    rows = list(staircase(4, 1, 2, frames=12, window=5))
    states(rows, 12, 4)
    assert all(row.stop - row.start <= 5 for row in rows)
    assert all(row.stop - row.start == 5 for row in rows if row.stop >= 5)


def test_too_small_a_lag_is_refused_with_the_smallest_possible():
    with pytest.raises(ValueError, match="lag must be at least 4"):
        next(staircase(8, 3, 1, frames=9, window=6))
    next(staircase(8, 3, 4, frames=9, window=6))


@pytest.mark.parametrize(("frames", "window", "overlap"), [(4, 4, 1), (3, 5, 2), (11, 5, 2), (20, 6, 5), (12, 4, 0)])
def test_lockstep_tiles_the_video(frames, window, overlap):
    rows = list(lockstep(3, window, overlap, frames=frames))
    states(rows, frames, 3)
    clean = 0
    for row in rows:
        assert row.stop - row.start == min(window, frames)
        fresh = [frame for frame, new in zip(range(row.start, row.stop), row.update, strict=True) if new]
        assert fresh == list(range(clean, row.stop))
        assert row.start == 0 or clean - row.start >= overlap
        clean = row.final[1] if row.final else clean


def fifo(steps, window, lookahead, rounds):
    """The queue itself: places 0 (head) to steps - 1 (noise), each round updates every place and shifts."""
    queue = list(range(window - steps, window))
    taken = {frame: steps - 1 - place for place, frame in enumerate(queue)}
    for _ in range(rounds):
        new = -(-window // 2) if lookahead else window
        passes = []
        for begin in range(0, steps, new):
            end = min(begin + new, steps)
            passes.append(([queue[0] + place for place in range(end - window, end)], queue[begin:end]))
        yield [(seen, updated, dict(taken)) for seen, updated in reversed(passes)], queue[0]
        for frame in queue:
            taken[frame] += 1
        queue = [*queue[1:], queue[-1] + 1]
        taken[queue[-1]] = 0


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize(("steps", "window"), [(8, 4), (12, 4), (10, 5), (4, 4), (18, 9)])
def test_diagonal_equals_the_queue(steps, window, lookahead):
    rows = diagonal(steps, window, lookahead=lookahead, frames=None)
    updates: dict[int, list[int]] = {}
    for passes, head in fifo(steps, window, lookahead, 3 * steps):
        everything = []
        for seen, updated, taken in passes:
            row = next(rows)
            assert list(range(row.start, row.stop)) == seen
            assert len(seen) == window
            for frame, done, updates_it in zip(seen, row.done, row.update, strict=True):
                assert updates_it == (frame in updated)
                assert done == taken.get(frame, steps)
                if updates_it:
                    updates.setdefault(frame, []).append(done)
            everything += updated
            assert row.final in (None, (head, head + 1))
        assert sorted(everything) == list(range(head, head + steps))
        assert (row.final is not None) == (head >= 0)
    for frame in range(window, 2 * steps):
        assert updates[frame] == list(range(steps))


def test_diagonal_gives_out_each_frame_once():
    rows = list(diagonal(8, 4, lookahead=True, frames=5))
    assert [row.final for row in rows if row.final] == [(i, i + 1) for i in range(5)]
    # 5 wanted + 8 - 4 to warm up, four passes each.
    assert len(rows) == (5 + 8 - 4) * 4


def test_fifo_needs_a_multiple_of_the_window():
    with pytest.raises(ValueError, match="the nearest is 18"):
        next(diagonal(20, 9, frames=None))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: staircase(4, 3, 4, frames=n),
        lambda n: staircase(4, 3, 1, frames=n),
        lambda n: staircase(4, 1, 2, frames=n, window=4),
        lambda n: lockstep(3, 5, 2, frames=n),
        lambda n: diagonal(6, 3, frames=n),
    ],
)
def test_endless_tables_begin_like_long_ones(make):
    assert list(islice(make(None), 60)) == list(islice(make(1000), 60))
