"""Plans as YAML and JSON: what is read, what is written, what is refused and in which words."""

from __future__ import annotations

import contextlib
import json
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel import plan_file, presets, selectors
from sparsereel.patterns import Full, KeepSinks, Neighborhood, Pattern, Radial, Skip
from sparsereel.patterns.testing import leaves
from sparsereel.plan import AttentionPlan
from sparsereel.plan_parse import parse_plan

EXAMPLE = """\
version: 1
model: {family: wan, class: WanTransformer3DModel, layers: 30, heads: 12}
schedule: {dense_first: 0.1, dense_last: 0.0, min_tokens: 2048, max_density: 0.7}
keep_sinks: true
patterns:
  r1: {radial: {decay: 1.0}}
  nb: {neighborhood: {window: [3, 5, 5]}}
  both: {any: [r1, nb]}
components:
  transformer:
    layers:
      "0-1": full
      "2-29":
        default: r1
        heads: {"0,3,7-9": nb, "5": skip, "6": [{steps: "0.0-0.4", use: full}, {steps: "0.4-1.0", use: both}]}
calibration: {prompts: [a cat, a dog], error: 0.25, heads: {"0": [0.1, 0.2]}, date: 2025-01-31, seed: null}
"""


def parse(text):
    return parse_plan(*plan_file.parse_yaml(text, "p.yaml"))


# ---------------------------------------------------------------- round trips


def test_the_example_of_the_guide_means_what_it_says():
    plan = parse(EXAMPLE)
    layers = plan.resolve("transformer", [f"blocks.{i}.attn1" for i in range(30)], [12] * 30)
    assert layers[0].uniform_full
    early, late = layers[2].at(0, 20), layers[2].at(19, 20)
    nb, r1 = KeepSinks(Neighborhood((3, 5, 5))), KeepSinks(Radial())
    assert [early[h] for h in (0, 3, 7, 8, 9)] == [nb] * 5
    assert (early[1], early[5], early[6]) == (r1, Skip(), Full())
    assert late[6] == KeepSinks(Radial() | Neighborhood((3, 5, 5)))
    assert plan.calibration["date"] == "2025-01-31"


def test_the_example_round_trips():
    plan = parse(EXAMPLE)
    assert parse(plan.to_yaml()) == plan
    assert AttentionPlan.from_dict(plan.to_dict()) == plan
    assert AttentionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


NAMES = st.sampled_from(["a", "b", "my pattern", "é", "0", "yes", "null", "1.5", "x: y", "#"])
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
AMOUNTS = st.integers(0, 60) | st.sampled_from([0.0, 0.1, 1 / 3, 1e-05, 1.0])


def described(pattern: Pattern):
    arguments = {key: listed(value) for key, value in pattern.arguments().items()}
    return {pattern.name: arguments}


def listed(value):
    return [listed(v) for v in value] if isinstance(value, tuple) else value


@st.composite
def plain_plans(draw):
    """Plain data of valid plans, in every shape that plans may have."""
    single = st.builds(described, leaves())
    named, known = {}, []
    for name in draw(st.lists(NAMES, unique=True, max_size=3)):
        named[name] = draw(uses(single, known))
        known.append(name)
    use = uses(single, known)
    choices = use | st.builds(lambda a, b: [{"steps": "0.0-0.25", "use": a}, {"steps": "0.25-1", "use": b}], use, use)
    choices |= st.builds(lambda a, b: [{"steps": 3, "use": a}, {"steps": "4-90", "use": b}], use, use) | st.just("skip")
    heads = st.fixed_dictionaries({}, optional={"0,2-4": choices, "1": choices, "7": choices}) | st.fixed_dictionaries(
        {}, optional={"even": choices, "odd": choices}
    )
    layers = choices | st.fixed_dictionaries({"default": choices, "heads": heads})
    tables = st.fixed_dictionaries({}, optional={"0": layers, "1,3-5": layers, "*": layers, "blocks.*.attn": layers})
    data = {
        "version": 1,
        "patterns": named,
        "components": draw(st.dictionaries(st.sampled_from(["transformer", "unet", "*"]), tables, max_size=2)),
        "schedule": {
            "dense_first": draw(AMOUNTS),
            "dense_last": draw(AMOUNTS),
            "min_tokens": draw(st.integers(0, 9999)),
        },
        "keep_sinks": draw(st.booleans()),
        "model": draw(st.sampled_from([{}, {"family": "wan", "layers": 6}, {"class": "X", "heads": 8}])),
        "calibration": draw(st.dictionaries(NAMES, PLAIN, max_size=3)),
    }
    data["components"] = {name: {"layers": table} for name, table in data["components"].items()}
    return data


def uses(single, known):
    leaf = single | st.sampled_from(known) if known else single
    return leaf | st.builds(
        lambda kind, parts: {kind: parts}, st.sampled_from(["any", "all"]), st.lists(leaf, min_size=1, max_size=3)
    )


@settings(max_examples=150, deadline=None)
@given(plain_plans())
def test_plans_round_trip_without_loss(data):
    plan = AttentionPlan.from_dict(data)
    assert AttentionPlan.from_dict(plan.to_dict()) == plan
    assert parse(plan.to_yaml()) == plan
    assert parse_plan(*plan_file.parse_json(json.dumps(plan.to_dict()))) == plan
    assert parse(plan.to_yaml()).to_dict() == plan.to_dict()


@pytest.mark.parametrize("name", [*presets.names(), *presets.published()])
def test_presets_round_trip(name, tmp_path):
    plan = presets.load(name)
    for ending in ("yaml", "json"):
        path = tmp_path / f"plan.{ending}"
        plan.save(path)
        assert AttentionPlan.load(path) == plan


# ---------------------------------------------------------------- refusals

BAD = {
    "empty": ("", "p.yaml: a plan must be a mapping, got None"),
    "a list": ("- a", "p.yaml, line 1: a plan must be a mapping, got ['a']"),
    "no version": ("keep_sinks: true", "p.yaml, line 1: version must be 1, got none"),
    "new version": ("version: 7", "p.yaml, line 1, version: version must be 1, got 7"),
    "unknown key": (
        "version: 1\nlayers: {}",
        "p.yaml, line 2, layers: unknown key 'layers'; allowed are version, model,",
    ),
    "model key": ("version: 1\nmodel: {name: x}", "line 2, model.name: unknown key 'name'; allowed are family, class,"),
    "model layers": ("version: 1\nmodel: {layers: 0}", "line 2, model.layers: layers must be a whole number above 0"),
    "model family": ("version: 1\nmodel: {family: 3}", "line 2, model.family: family must be a name, got 3"),
    "schedule key": ("version: 1\nschedule: {dense: 1}", "unknown key 'dense'; allowed are dense_first, dense_last,"),
    "share": (
        "version: 1\nschedule:\n  dense_first: 1.5",
        "line 3, schedule.dense_first: dense_first must be a number of",
    ),
    "steps below 0": ("version: 1\nschedule: {dense_last: -1}", "a share in [0.0, 1.0], got -1"),
    "flag as steps": ("version: 1\nschedule: {dense_last: true}", "a share in [0.0, 1.0], got True"),
    "min_tokens": (
        "version: 1\nschedule: {min_tokens: 0.5}",
        "min_tokens must be a number of tokens, 0 or more, got 0.5",
    ),
    "max_density": ("version: 1\nschedule: {max_density: 0}", "max_density must be above 0 and at most 1, got 0"),
    "keep_sinks": ("version: 1\nkeep_sinks: 1", "line 2, keep_sinks: must be true or false, got 1"),
    "reserved name": (
        "version: 1\npatterns:\n  radial: {sink: {}}",
        "line 3, patterns.radial: 'radial' is the name of a",
    ),
    "name below": (
        "version: 1\npatterns: {a: b, b: sink}",
        "line 2, patterns.a: unknown pattern 'b'; the patterns are full",
    ),
    "itself": ("version: 1\npatterns: {a: {any: [a, sink]}}", "patterns.a.any.0: unknown pattern 'a'"),
    "argument": (
        "version: 1\npatterns:\n  a:\n    neighborhood:\n      windo: 3",
        "line 4, patterns.a.neighborhood: pattern neighborhood has no argument 'windo'; its arguments are: window,",
    ),
    "value": ("version: 1\npatterns: {a: {radial: {decay: -1}}}", "decay must be a finite number above 0, got -1"),
    "missing": ("version: 1\npatterns: {a: neighborhood}", "neighborhood needs the argument 'window'"),
    "two names": ("version: 1\npatterns: {a: {sink: {}, full: {}}}", "a pattern must have one name, got sink, full"),
    "arguments": ("version: 1\npatterns: {a: {sink: 3}}", "the arguments of sink must be a mapping, got 3"),
    "number": (
        "version: 1\npatterns: {a: 3}",
        "patterns.a: a pattern must be a name, {name: {arguments}}, {any: [...]}",
    ),
    "no parts": ("version: 1\npatterns: {a: {any: []}}", "any must be a list of at least one entry, got []"),
    "skip in any": ("version: 1\npatterns: {a: {any: [skip, sink]}}", "skip cannot be part of any"),
    "named skip": ("version: 1\npatterns: {s: skip, t: s, a: {all: [t, sink]}}", "skip cannot be part of all"),
    "selector": (
        "version: 1\npatterns:\n  xa: {selector: zattention, threshold: 0.9}",
        "line 3, patterns.xa: unknown selector 'zattention'; the selectors are block_topk, block_topp,",
    ),
    "anchor": ("version: 1\ncalibration: {a: &x {b: 1}, c: *x}", "anchors and aliases are not used in plans"),
    "tag": ("version: 1\nmodel: !!python/object:os.system {}", "python/object:os.system is not used in plans"),
    "false tag": ("version: !!bool 7", "p.yaml, line 1, version: '7' cannot be read as bool"),
    "long number": ("version: " + "1" * 5000, "p.yaml, line 1, version: '11111111111111111111' cannot be read as int"),
    "twice": ("version: 1\nkeep_sinks: true\nkeep_sinks: false", "line 3, keep_sinks: this key appears twice"),
    "key": ("version: 1\n? [a, b]\n: c", "a key must be text or a number"),
    "truncated": (EXAMPLE[:150], "p.yaml, line 3: not valid YAML"),
    "unbalanced": ("version: [1", "p.yaml, line 1: not valid YAML"),
    "two documents": ("version: 1\n---\nversion: 1", "not valid YAML"),
    "control": ("version: \x07", "p.yaml: holds the character 7, which YAML does not allow"),
    "deep": ("[" * 9000, "p.yaml: nested too deeply for a plan"),
    "not finite": ("version: 1\ncalibration: {a: [.nan]}", "calibration.a.0: numbers must be finite, got nan"),
}

LAYERS = {
    "component": ({"blocks": {}}, "unknown key 'blocks'; allowed are layers"),
    "no layers": ({}, "a component needs the key layers"),
    "range": ({"layers": {"3-1": "full"}}, "layers.3-1: the range '3-1' must run upwards and end at 9999 or below"),
    "huge": ({"layers": {"0-99999": "full"}}, "must run upwards and end at 9999 or below"),
    "no number": ({"layers": {"1,,2": "full"}}, "expected numbers and ranges such as \"0,3,7-9\", got '1,,2'"),
    "empty key": ({"layers": {"": "full"}}, "layers must be named by numbers such as 0-3 or by a glob"),
    "overlap": ({"layers": {"0-3": "full", "2": "full"}}, "layers.2: a layer is named twice: '0-3' and '2' overlap"),
    "own overlap": ({"layers": {"0-3,2": "full"}}, "number 2 is named twice in '0-3,2'"),
    "heads": ({"layers": {"0": {"heads": {"x": "full"}}}}, "heads must be numbers and ranges such as"),
    "heads twice": ({"layers": {"0": {"heads": {"0-2": "full", "2": "sink"}}}}, "heads.2: a head is named twice"),
    "parity": (
        {"layers": {"0": {"heads": {"odd": "full", "3": "sink"}}}},
        "a head is named twice: 'odd' and '3' overlap",
    ),
    "layer key": ({"layers": {"0": {"default": "full", "head": {}}}}, "unknown key 'head'; allowed are default, heads"),
    "steps": (
        {"layers": {"0": [{"steps": "a", "use": "full"}]}},
        'steps must be whole numbers such as "0-9" or shares',
    ),
    "steps down": ({"layers": {"0": [{"steps": "5-3", "use": "full"}]}}, "steps must run upwards"),
    "shares down": (
        {"layers": {"0": [{"steps": "0.5-0.5", "use": "full"}]}},
        "shares of steps must run upwards inside",
    ),
    "shares above": (
        {"layers": {"0": [{"steps": "0.5-1.5", "use": "full"}]}},
        "shares of steps must run upwards inside",
    ),
    "no use": ({"layers": {"0": [{"steps": "0-3"}]}}, "needs the keys steps and use"),
    "no stretches": ({"layers": {"0": []}}, "a list of step ranges must be a list of at least one entry, got []"),
    "steps twice": (
        {"layers": {"0": [{"steps": "0-3", "use": "full"}, {"steps": 3, "use": "sink"}]}},
        "steps '0-3' and '3' overlap",
    ),
    "shares twice": (
        {"layers": {"0": [{"steps": "0.5-1.0", "use": "full"}, {"steps": "0.0-0.6", "use": "sink"}]}},
        "steps '0.0-0.6' and '0.5-1.0' overlap",
    ),
    "mixed": (
        {"layers": {"0": [{"steps": "0-3", "use": "full"}, {"steps": "0.5-1.0", "use": "sink"}]}},
        "must use whole numbers or shares, not both",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_refused_in_one_sentence(name):
    text, message = BAD[name]
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LAYERS)
def test_bad_layers_are_refused_in_one_sentence(name):
    component, message = LAYERS[name]
    with pytest.raises(ValueError) as error:
        AttentionPlan.from_dict({"version": 1, "components": {"transformer": component}})
    assert message in str(error.value)
    assert str(error.value).startswith("plan, components.transformer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.yaml", b"version: \xff\xfe", "plan.yaml is not UTF-8 text (byte 9)"),
        ("plan.json", b'{"version": 1,', "plan.json, line 1: not valid JSON"),
        ("plan.json", b'{"version": 1, "version": 1}', "the key 'version' appears twice"),
        ("plan.json", b'{"version": NaN}', "NaN is not a number that a plan may hold"),
        ("plan.json", b'{\n"version": 1,\n"keep_sinks": 3}', "plan.json, line 3, keep_sinks: must be true or false"),
        ("plan.json", b'{\n\t"version": 3}', "plan.json, version: version must be 1, got 3"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        AttentionPlan.load(path)
    assert message in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no plan file"):
        AttentionPlan.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder, not a plan file"):
        AttentionPlan.load(tmp_path)


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert AttentionPlan.load(path) == AttentionPlan()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(EXAMPLE)), st.integers(0, len(EXAMPLE)))
def test_damaged_files_raise_only_value_errors(start, stop):
    text = EXAMPLE[:start] + EXAMPLE[stop:]
    with contextlib.suppress(ValueError):
        parse(text)


# ---------------------------------------------------------------- saving


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    AttentionPlan.uniform(Radial()).save(path)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        AttentionPlan.uniform(Skip()).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_saved_files_have_ordinary_permissions(tmp_path):
    path = tmp_path / "plan.yaml"
    AttentionPlan.uniform(Radial()).save(path)
    other = tmp_path / "other"
    other.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        AttentionPlan().save(tmp_path / "none" / "plan.yaml")


def test_patterns_of_your_own_cannot_be_saved():
    class Own(Pattern):
        name = "own"

    with pytest.raises(ValueError, match="has no name in plans; those that have are full, skip"):
        AttentionPlan.uniform(Own()).to_dict()


SELECTORS = """\
version: 1
keep_sinks: true
patterns:
  xa: {selector: xattention, threshold: 0.8, refresh: 4}
components:
  transformer:
    layers:
      "*": {default: xa, heads: {"0": {selector: block_topk, density: 0.1}, "1": {spatial: {frames: 2}}}}
"""


def test_selectors_in_plans_round_trip_and_keep_sinks(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(SELECTORS)
    plan = AttentionPlan.load(path)
    heads = plan.resolve("transformer", ["blocks.0.attn1"], [3])[0].at(0, 4)
    assert heads[0] == selectors.BlockTopk(density=0.1, keep_sinks=True)
    assert heads[2] == selectors.Xattention(threshold=0.8, refresh=4, keep_sinks=True)
    assert str(heads[1]).startswith("spatial")
    plan.save(tmp_path / "again.json")
    assert AttentionPlan.load(tmp_path / "again.json") == plan


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{selector: xattention, speed: 2}", "has no argument 'speed'"),
        ("{selector: 3}", "a selector needs its name"),
        ("{any: [{selector: block_topk}, {sink: {}}]}", "a selector cannot be part of any"),
        ("{selector: block_topk, density: 2}", "density"),
    ],
)
def test_bad_selectors_are_refused_where_they_stand(tmp_path, entry, message):
    path = tmp_path / "plan.yaml"
    path.write_text(f"version: 1\npatterns:\n  it: {entry}\n")
    with pytest.raises(ValueError, match="line 3") as error:
        AttentionPlan.load(path)
    assert message in str(error.value)
