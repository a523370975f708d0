"""Which prompt holds when, and what is refused."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel.stream.prompt_text import parse_switches
from sparsereel.stream.prompts import Prompts

pytestmark = pytest.mark.usefixtures("one_thread")


def test_switches_take_over_in_time():
    prompts = Prompts([(0, "a"), (1.5, "b"), (2, "c")], 10)
    assert [prompts.at(t) for t in (0, 0, 1, 1.5, 1.9, 2, 9)] == list("aaabbcc")


def test_several_switches_within_a_chunk_leave_the_last():
    assert Prompts([(0, "a"), (1, "b"), (2, "c")], None).at(5) == "c"


def test_a_generator_is_asked_as_late_as_possible():
    seen = []

    def source():
        for item in [(0, "a"), (3, "b"), (6, "c")]:
            seen.append(item[1])
            yield item

    prompts = Prompts(source(), None)
    assert prompts.at(0) == "a"
    assert seen == ["a", "b"]
    assert [prompts.at(4), prompts.at(7), prompts.at(99)] == ["b", "c", "c"]


def test_texts_without_times_are_asked_once_a_chunk():
    items = iter(["a", None, "b", ""])
    prompts = Prompts(items, None)
    assert [prompts.at(t) for t in (0, 0, 1, 1, 2, 3, 4)] == ["a", "a", "a", "a", "b", "b", "b"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "empty"),
        ([(1, "a")], "must begin at 0 s, got 1 s"),
        ([(0, "a"), (-1, "b")], "from 0 on, got -1"),
        ([(0, "a"), (float("nan"), "b")], "from 0 on, got nan"),
        ([(0, "a"), ("x", "b")], "from 0 on, got 'x'"),
        ([(0, "a"), (5, "b"), (5, "c")], "must rise, got 5 s after 5 s"),
        ([(0, "a"), (10, "b")], "past the end of the video \\(10 s\\)"),
        ([(0, " ")], "is empty"),
        ([(0, "a"), "b"], "pair \\(seconds, text\\), got 'b'"),
        (7, "got 7"),
    ],
)
def test_bad_switches_are_refused_at_once(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Prompts(given, 10)


def test_a_source_that_raises_is_one_sentence_and_nothing_is_lost(streams):
    def source():
        yield (0, streams.PROMPT)
        yield (0.5, streams.OTHER)
        raise RuntimeError("no more ideas")

    stream = sparsereel.stream(
        streams.pipe(), source(), causal=streams.CAUSAL, method="longlive", steps=1, frames=40, **streams.SIZE
    )
    chunks = []
    with pytest.raises(ValueError, match="the source of prompts failed: RuntimeError: no more ideas"):
        chunks.extend(iter(stream))
    # Collected one by one: what was made before the failure was given out.
    again = sparsereel.stream(
        streams.pipe(), source(), causal=streams.CAUSAL, method="longlive", steps=1, frames=40, **streams.SIZE
    )
    assert next(again).shape[0] == 5


def test_recaching_with_the_same_prompt_reproduces_the_window(streams):
    """Clean latents through the same model in the same order: the same keys and values."""
    stream = sparsereel.stream(
        streams.pipe(),
        streams.PROMPT,
        causal=streams.CAUSAL,
        method="longlive",
        window=8,
        sink=2,
        steps=2,
        output="latents",
        **streams.SIZE,
    )
    for _ in range(3):
        next(stream)
    groups = [group for cache in stream.engine.denoiser.caches for group in cache]
    before = [(group.filled, group.keys.read(0, group.filled).clone()) for group in groups]
    stream.engine.set_prompt(streams.PROMPT)
    for group, (filled, keys) in zip(groups, before, strict=True):
        assert group.filled == filled
        torch.testing.assert_close(group.keys.read(0, filled), keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_switch_renews_the_sink_only_if_asked(streams, refresh):
    half = 1.0
    stream = sparsereel.stream(
        streams.pipe(),
        [(0, streams.PROMPT), (half, streams.OTHER)],
        causal=streams.CAUSAL,
        method="longlive",
        refresh_sink=refresh,
        steps=1,
        output="latents",
        **streams.SIZE,
    )
    group = stream.engine.denoiser.caches[0].layers[1][0]
    sink = stream.engine.plan.sink * group.frame_tokens
    next(stream)
    next(stream)
    before = group.values.read(0, sink).clone()
    while stream.prompt == streams.PROMPT:
        next(stream)
    assert stream.prompt == streams.OTHER
    assert torch.equal(group.values.read(0, sink), before) is not refresh


def test_a_switch_at_the_beginning_changes_nothing(streams):
    def latents(prompt):
        made = sparsereel.stream(
            streams.pipe(),
            prompt,
            causal=streams.CAUSAL,
            method="longlive",
            steps=1,
            frames=9,
            output="latents",
            **streams.SIZE,
        )
        return torch.cat(list(made), 1)

    assert torch.equal(latents(streams.PROMPT), latents([(0, streams.PROMPT)]))


def test_written_switches(tmp_path):
    assert parse_switches("0:a red 3;10: a: b ;") == [(0.0, "a red 3"), (10.0, "a: b")]
    file = tmp_path / "p.yaml"
    file.write_text("- {time: 0, prompt: a}\n- {time: 2.5, prompt: b}\n")
    assert parse_switches(str(file)) == [(0.0, "a"), (2.5, "b")]
    file.write_text("0: a\n2: b\n")
    assert parse_switches(str(file)) == [(0.0, "a"), (2.0, "b")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a red 3", "SECONDS:TEXT, got 'a red 3'"),
        (";", "holds no prompt"),
        ("x:a", "number of seconds, got 'x'"),
        ("nowhere.yaml", "cannot read the prompt file nowhere.yaml"),
    ],
)
def test_badly_written_switches(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_switches(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a: [", "no YAML"), ("5", "must hold a list"), ("- {time: 0}", "has time and prompt"), ("- {}", "got nothing")],
)
def test_bad_prompt_files(tmp_path, text, sentence):
    file = tmp_path / "p.yml"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse_switches(str(file))
