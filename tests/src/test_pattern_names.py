"""Patterns by name, their arguments, and how they compare and print."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings

from sparsereel import patterns
from sparsereel.patterns import AllOf, AnyOf, Neighborhood, Radial, Sink, Skip, SlidingTile, Spatial, Temporal
from sparsereel.patterns.testing import compositions, leaves


def test_names_are_those_of_the_catalogue():
    assert set(patterns.names()) == {
        "full", "skip", "neighborhood", "sliding_tile", "radial", "spatial", "temporal", "sink", "causal", "diagonal",
        "multi_diagonal", "vertical_stripe", "blocked", "sharded", "random_global", "sink_tokens",
    }  # fmt: skip


def test_make():
    assert patterns.make("radial", decay=0.5) == Radial(0.5)
    assert patterns.make("sliding-tile", window=3) == SlidingTile((3, 3, 3))
    assert patterns.make("neighborhood", window=[3, 5, 5]) == Neighborhood((3, 5, 5))


@settings(max_examples=100, deadline=None)
@given(leaves())
def test_arguments_give_the_pattern_back(pattern):
    again = patterns.make(pattern.name, **pattern.arguments())
    assert again == pattern
    assert hash(again) == hash(pattern)


@settings(max_examples=50, deadline=None)
@given(compositions())
def test_patterns_pickle_and_print(pattern):
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert str(pattern)


def test_one_token_and_the_whole_axis_are_different_patterns():
    assert Neighborhood(1) != Neighborhood(1.0)
    assert Temporal(1) != Temporal(1.0)
    assert Radial(decay=1) == Radial(decay=1.0)
    assert Neighborhood(3) == Neighborhood((3, 3, 3)) == Neighborhood([3, 3, 3])


def test_short_forms():
    assert str(Radial()) == "radial"
    assert str(Radial(decay=0.5)) == "radial(decay=0.5)"
    assert str(Temporal(2) | Sink()) == "any(temporal(width=2), sink)"
    assert str(patterns.KeepSinks(Spatial())) == "spatial + first frame"


def test_compositions_flatten():
    a, b, c = Spatial(), Temporal(), Sink()
    assert (a | b) | c == a | (b | c) == AnyOf((a, b, c))
    assert (a & b) & c == AllOf((a, b, c))
    assert a | b != a & b


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.make("radiall"), "unknown pattern 'radiall'; the patterns are full, skip, neighborhood"),
        (lambda: patterns.make("radial", decey=1), "radial has no argument 'decey'; its arguments are: decay=1.0"),
        (lambda: patterns.make("full", a=1), "full has no argument 'a'; its arguments are: none"),
        (lambda: patterns.make("neighborhood"), "neighborhood needs the argument 'window'; its arguments are: window"),
        (lambda: patterns.make("neighborhood", window=-3), r"window \(frames\) must be a whole number of at least 1"),
        (lambda: Neighborhood(0), r"window \(frames\) must be a whole number of at least 1 or a fraction"),
        (lambda: Neighborhood(1.5), "as a fraction of the grid must be above 0 and at most 1, got 1.5"),
        (lambda: Neighborhood("3"), "got '3'"),
        (lambda: Neighborhood(True), "got True"),
        (lambda: Neighborhood((3, 5)), r"window must be one value or three \(frames, height, width\)"),
        (lambda: Neighborhood(3, stride=4), "stride must not exceed the window, got stride 4 with window 3"),
        (lambda: Neighborhood(3, stride=0), r"stride \(frames\) must be a whole number of at least 1, got 0"),
        (lambda: Neighborhood(3, stride=2, causal=True), "a causal axis needs stride 1, got stride 2"),
        (lambda: Neighborhood(3, causal=1), r"causal \(frames\) must be true or false, got 1"),
        (lambda: SlidingTile(2), r"window \(frames\) must be an odd number of tiles, got 2"),
        (lambda: SlidingTile(-1), r"window \(frames\) must be a whole number of at least 1"),
        (lambda: SlidingTile(3, tile=(0, 8, 8)), r"tile \(frames\) must be a whole number of at least 1, got 0"),
        (lambda: Radial(decay=0), "decay must be a finite number above 0, got 0"),
        (lambda: Radial(decay=float("nan")), "decay must be a finite number above 0, got nan"),
        (lambda: Radial(sink_frames=-1), "sink_frames must be a whole number of at least 0, got -1"),
        (lambda: Radial(flavour="mit"), "flavour must be one of paper, released, got 'mit'"),
        (lambda: Spatial(-1), "frames must be a whole number of at least 0, got -1"),
        (lambda: Temporal(-1), "width must be a whole number of at least 0"),
        (lambda: Sink(0), "frames must be a whole number of at least 1, got 0"),
        (lambda: patterns.Causal(0), "block_frames must be a whole number of at least 1, got 0"),
        (lambda: patterns.Diagonal(-1), "width must be a whole number of at least 0"),
        (lambda: patterns.MultiDiagonal(1, period=0), "period must be a whole number of at least 1, got 0"),
        (lambda: patterns.VerticalStripe(()), "columns must name at least one column"),
        (lambda: patterns.VerticalStripe((-1,)), "a column must be a whole number of at least 0"),
        (lambda: patterns.VerticalStripe(((3, 3),)), "with start < stop"),
        (lambda: patterns.VerticalStripe(((0, 0.5),)), "both whole numbers or both fractions"),
        (lambda: patterns.VerticalStripe(((1, 2, 3),)), r"a stripe must be \(start, stop\)"),
        (lambda: Skip() | Sink(), "skip cannot be part of any"),
        (lambda: Sink() & Skip(), "skip cannot be part of all"),
        (lambda: AnyOf(()), "any needs at least one pattern"),
        (lambda: AnyOf(("radial",)), "any combines patterns, got 'radial'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stripes_outside_the_video_are_refused_at_use():
    from sparsereel.grid import TokenGrid

    with pytest.raises(ValueError, match=r"no column of \(99,\) is inside a video of 8 tokens"):
        patterns.VerticalStripe((99,)).block_mask(TokenGrid(2, 2, 2))
