"""Selectors by name, their arguments, and how they compare and print."""

from __future__ import annotations

import pickle

import pytest
import torch
import yaml

from sparsereel import selectors
from sparsereel.grid import TokenGrid
from sparsereel.selectors import BlockTopk, SelectionContext, Vsa, Xattention, from_mapping, make

EXAMPLES = [
    {"selector": "block_topk", "density": 0.1},
    {"selector": "block_topp", "threshold": 0.8, "min_density": 0.05},
    {"selector": "spargeattn", "flavour": "cdf", "threshold": 0.9, "similarity": 0.5, "include_crossing": True},
    {"selector": "xattention", "threshold": 0.8, "stride": 16, "refresh": 4},
    {"selector": "vertical_slash", "vertical": 0.2, "slash": 0.1, "samples": 32},
    {"selector": "svg", "density": 0.3, "reorder": False, "keep_sinks": True},
    {"selector": "svg2", "threshold": 0.8, "query_clusters": 100, "flavour": "blocks", "refresh": "once"},
    {"selector": "vsa", "density": 0.2, "cube": [2, 4, 4]},
    {"selector": "sparsed", "density": 0.5, "flavour": "released", "refresh": 10},
    {"selector": "adaspa", "density": 0.1, "by_head": False, "refresh": [0, 10, 30]},
    {"selector": "hip", "density": 0.2, "representative": "mean", "window": 0.1},
    {"selector": "biformer", "density": 0.3, "region": 512},
    {"selector": "anchor", "theta": 3.0, "group": 4},
    {"selector": "dhsa", "density": 0.2, "chunks": "fixed", "chunk": 32},
]


def test_names_are_those_of_the_catalogue():
    assert set(selectors.names()) == {
        "block_topk", "block_topp", "spargeattn", "xattention", "vertical_slash", "svg", "svg2", "vsa", "sparsed",
        "adaspa", "hip", "biformer", "anchor", "dhsa",
    }  # fmt: skip
    assert {example["selector"] for example in EXAMPLES} == set(selectors.names())


def test_class_names_are_the_camel_case_of_names():
    for name in selectors.names():
        assert type(make(name)).__name__ == "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize("mapping", EXAMPLES, ids=lambda m: m["selector"])
def test_yaml_gives_the_selector_back(mapping):
    selector = from_mapping(mapping)
    text = yaml.safe_dump(selector.to_mapping(), sort_keys=False)
    assert yaml.safe_load(text) == mapping
    again = from_mapping(yaml.safe_load(text))
    assert again == selector
    assert hash(again) == hash(selector)
    assert make(selector.name, **selector.arguments()) == selector
    assert pickle.loads(pickle.dumps(selector)) == selector


@pytest.mark.parametrize("name", selectors.names())
def test_defaults_need_no_arguments(name):
    assert make(name).to_mapping() == {"selector": name}
    assert str(make(name)) == name


def test_make_takes_hyphens_and_written_forms():
    assert make("block-topk", density=0.1) == BlockTopk(0.1)
    assert make("xattention", threshold=1) == Xattention(1.0)
    assert make("vsa", cube=4) == Vsa(cube=(4, 4, 4)) == Vsa(cube=[4, 4, 4])
    assert make("block_topk", refresh="every step") == make("block_topk", refresh="every-step") == BlockTopk()
    assert str(make("xattention", threshold=0.8, refresh=4)) == "xattention(threshold=0.8, refresh=4)"


def test_different_settings_are_different_selectors():
    assert BlockTopk(0.1) != BlockTopk(0.2)
    assert BlockTopk(0.1) != BlockTopk(0.1, refresh=2)
    assert BlockTopk(0.1) != BlockTopk(0.1, keep_sinks=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("xatention"), "unknown selector 'xatention'; the selectors are block_topk, block_topp, sparge"),
        (lambda: make("xattention", treshold=1), "selector xattention has no argument 'treshold'; its arguments are: "
                                                 "threshold=0.9, stride=8, refresh=1, keep_sinks=False"),
        (lambda: make("block_topk", density=0), "selector block_topk: density must be above 0 and at most 1, got 0"),
        (lambda: make("block_topk", density=20), "density must be above 0 and at most 1, got 20"),
        (lambda: make("block_topk", density=True), "density must be above 0 and at most 1, got True"),
        (lambda: make("block_topp", threshold="0.9"), "threshold must be above 0 and at most 1, got '0.9'"),
        (lambda: make("block_topp", min_density=-1), "min_density must be a number from 0 to 1, got -1"),
        (lambda: make("spargeattn", flavour="cfd"), "flavour must be one of top-k, cdf, got 'cfd'"),
        (lambda: make("spargeattn", similarity=2), "similarity must be a number from -1 to 1, got 2"),
        (lambda: make("spargeattn", smooth=1), "smooth must be true or false, got 1"),
        (lambda: make("xattention", stride=0), "stride must be a whole number of at least 1, got 0"),
        (lambda: make("vertical_slash", vertical=1.5), "vertical must be a number from 0 to 1, got 1.5"),
        (lambda: make("vertical_slash", samples=0), "samples must be a whole number of at least 1, got 0"),
        (lambda: make("svg", density=float("nan")), "density must be above 0 and at most 1, got nan"),
        (lambda: make("svg2", query_clusters=0), "query_clusters must be a whole number of at least 1, got 0"),
        (lambda: make("svg2", iterations=-1), "iterations must be a whole number of at least 0, got -1"),
        (lambda: make("vsa", cube=(4, 4)), r"cube must be one value or three \(frames, height, width\)"),
        (lambda: make("sparsed", flavour="x"), "flavour must be one of paper, released, got 'x'"),
        (lambda: make("adaspa", recall=2), "recall must be a number from 0 to 1, got 2"),
        (lambda: make("hip", representative="first"), "representative must be one of middle, mean, got 'first'"),
        (lambda: make("hip", window=-1), "window must be a whole number of at least 0 or a fraction"),
        (lambda: make("biformer", region=0), "region must be a whole number of at least 1, got 0"),
        (lambda: make("anchor", theta=-1), "theta must be a number from 0 to 1e"),
        (lambda: make("dhsa", chunks="learned"), "chunks must be one of similarity, fixed, got 'learned'"),
        (lambda: make("block_topk", refresh=0), 'refresh must be a number of steps, "every step", "once" or an'),
        (lambda: make("block_topk", refresh="sometimes"), "got 'sometimes'"),
        (lambda: make("block_topk", refresh=[3, 1]), r"got \(3, 1\)|got \[3, 1\]"),
        (lambda: make("block_topk", refresh=[0.5, 2]), "refresh must be"),
        (lambda: make("block_topk", refresh=[1.5]), "refresh must be"),
        (lambda: make("block_topk", refresh=[]), "refresh must be"),
        (lambda: make("block_topk", refresh=True), "refresh must be"),
        (lambda: make("block_topk", keep_sinks=1), "keep_sinks must be true or false, got 1"),
        (lambda: from_mapping({"density": 0.1}), "a selector needs its name, such as selector: block_topk"),
        (lambda: from_mapping({"selector": None}), "a selector needs its name"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_clear_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_calls_are_one_clear_sentence():
    grid = TokenGrid(2, 4, 4)
    q = torch.randn(2, 4, 32, 8)

    def call(q, k, selector=None, **options):
        return (selector or BlockTopk())(q, k, SelectionContext(grid, (16, 8), **options))

    with pytest.raises(ValueError, match=r"q and k must be \[B, H, S, D\], got \[4, 32, 8\]"):
        call(q[0], q)
    with pytest.raises(ValueError, match="Hkv must divide H"):
        call(q, q[:, :3])
    with pytest.raises(ValueError, match="the grid has 32 tokens, q has 31 and k has 32"):
        call(q[:, :, :31], q)
    with pytest.raises(ValueError, match="one length for each of 2 samples"):
        call(q, q, key_lengths=torch.tensor([32]))
    with pytest.raises(ValueError, match="the order has 64 tokens, the grid 32"):
        call(q, q, order=TokenGrid(4, 4, 4).tile_order())
    with pytest.raises(ValueError, match=r"the stride 3 must divide both sides of the block \(16, 8\)"):
        call(q, q, Xattention(stride=3))
    with pytest.raises(ValueError, match="block must be"):
        BlockTopk()(q, q, SelectionContext(grid, (16, 7)))
