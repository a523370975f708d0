"""Hypothesis strategies for grids and patterns, shared by tests. Needs hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sparsereel import patterns
from sparsereel.grid import Segment, TokenGrid
from sparsereel.patterns import Pattern

SHARES = st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])


def grids(frames: int = 7, side: int = 7) -> st.SearchStrategy[TokenGrid]:
    """Small grids: images and videos, text before, after or both, reference frames."""
    video = st.builds(
        lambda f, h, w: Segment("video" if f > 1 else "image", f, h, w),
        st.integers(1, frames),
        st.integers(1, side),
        st.integers(1, side),
    )
    others = st.lists(
        st.builds(lambda kind, n: Segment(kind, length=n), st.sampled_from(["text", "condition"]), st.integers(1, 20)),
        max_size=2,
    )
    return st.builds(lambda before, v, after: TokenGrid.of((*before, v, *after)), others, video, others)


def _axes(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(values, values, values)


def _neighborhoods() -> st.SearchStrategy[Pattern]:
    windows = _axes(st.integers(1, 9) | SHARES)

    def build(window: Any, stride: Any, dilation: Any, causal: Any) -> Pattern:
        strides = [min(s, w) if isinstance(w, int) else s for s, w in zip(stride, window, strict=True)]
        strides = [1 if past else s for s, past in zip(strides, causal, strict=True)]
        return patterns.Neighborhood(window, tuple(strides), dilation, causal)

    return st.builds(build, windows, _axes(st.integers(1, 4)), _axes(st.integers(1, 3)), _axes(st.booleans()))


def leaves() -> st.SearchStrategy[Pattern]:
    """Every single pattern but skip."""
    reach = st.integers(0, 40) | SHARES
    columns = st.lists(st.integers(0, 30) | st.sampled_from([0.0, 0.4, (0, 3), (0.2, 0.6)]), max_size=3)
    return st.one_of(
        st.builds(patterns.Full),
        _neighborhoods(),
        st.builds(patterns.SlidingTile, _axes(st.sampled_from([1, 3, 5]) | SHARES), _axes(st.integers(1, 5))),
        st.builds(
            patterns.Radial,
            st.sampled_from([0.1, 0.3, 1.0, 2.5]),
            st.integers(0, 2),
            st.sampled_from(["paper", "released"]),
        ),
        st.builds(patterns.Spatial, st.integers(0, 3)),
        st.builds(patterns.Temporal, st.integers(0, 3) | SHARES),
        st.builds(patterns.Sink, st.integers(1, 3)),
        st.builds(patterns.Causal, st.integers(1, 3)),
        st.builds(patterns.Diagonal, reach),
        st.builds(patterns.MultiDiagonal, reach, st.none() | st.integers(1, 20)),
        st.builds(
            patterns.Blocked,
            _axes(st.integers(1, 5) | SHARES),
            st.sampled_from(["never", "odd_layers", "always"]),
        ),
        st.builds(patterns.Sharded, *(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))),
        st.builds(
            patterns.RandomGlobal, SHARES | st.just(0.0), st.integers(0, 2), st.integers(1, 9), st.integers(0, 3)
        ),
        st.builds(
            patterns.SinkTokens,
            st.lists(_axes(st.integers(0, 8) | st.sampled_from([0.0, 0.4, 0.9])), min_size=1, max_size=3).map(tuple),
        ),
        # The first column is in every grid.
        st.builds(lambda more: patterns.VerticalStripe((0, *more)), columns),
    )


def compositions() -> st.SearchStrategy[Pattern]:
    """Patterns and what `&`, `|` and kept sinks make of them."""
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(patterns.KeepSinks, inner),
            st.builds(lambda x: patterns.KeepSinks(x, places=((0, 0.5, 0.2),)), inner),
        ),
        max_leaves=4,
    )
