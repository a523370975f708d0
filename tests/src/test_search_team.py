"""Several processes that search together, and the memory that a search says it will take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import sparsereel
from sparsereel import minireel
from sparsereel.patterns import Skip, Spatial, Temporal
from sparsereel.team import Team

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
import sparsereel
from sparsereel import minireel
from sparsereel.patterns import Skip, Spatial, Temporal
from sparsereel.search import record
from sparsereel.team import Team
own, keep = [], record.save_sums
record.save_sums = lambda path, sums: (own.append(path.name), keep(path, sums))
result = sparsereel.search(
    minireel.load(), ["a red 3 on navy", "a green 7 on black", "a white 5 on navy"], budget=0.6, held_out=0, buckets=1,
    candidates=(Skip(), Spatial(0), Temporal(0.2)), frames=5, height=48, width=48, steps=3, folder=sys.argv[1],
    progress=False,
)
plan = {k: v for k, v in result.plan.to_dict().items() if k != "calibration"}
rank = Team.here().rank
with open(f"{sys.argv[1]}-{rank}.json", "w") as file:
    json.dump({"rank": rank, "own": own, "plan": plan, "error": result.predicted.error}, file)
"""


def test_two_processes_share_the_prompts_and_end_with_the_plan_of_one(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    runs = {}
    for name, command in (("two", [*launch, str(script)]), ("one", [sys.executable, str(script)])):
        done = subprocess.run(
            [*command, str(tmp_path / name)], env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{name}-*.json"))]
    (alone,) = runs["one"]
    assert len(alone["own"]) == 3
    assert sorted(len(run["own"]) for run in runs["two"]) == [1, 2]
    assert {run["rank"] for run in runs["two"]} == {0, 1}
    for run in runs["two"]:
        assert run["plan"] == alone["plan"]
        assert run["error"] == alone["error"]


def test_a_team_of_one_is_nothing_special(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team.here()
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    assert all(team.does(number) for number in range(5))
    team.meet()
    assert team.from_leader("value") == "value"
    assert [Team(1, 3).does(number) for number in range(5)] == [False, True, False, False, True]


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(Team, "here", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(ValueError, match="give folder"):
        sparsereel.search(minireel.load(), ["a red 3 on navy"], budget=0.5, held_out=0, progress=False)


def test_memory_is_foretold_and_kept(capsys, tmp_path: Path):
    from sparsereel.search import memory

    told: list[int] = []
    plain: Any = memory.sentence

    def sentence(pipe: Any, study: Any) -> str:
        told.append(memory.forward_bytes(pipe) + memory.recording_bytes(study))
        return str(plain(pipe, study))

    memory.sentence = sentence
    try:
        size = {"frames": 17, "height": 96, "width": 96, "steps": 3, "held_out": 0, "buckets": 1}
        pipe = minireel.load()
        candidates = (Skip(), Spatial(0), Temporal(0.2))
        sparsereel.search(pipe, ["a red 3 on navy"], budget=0.6, candidates=candidates, **size)
    finally:
        memory.sentence = plain
    assert "GiB of memory while recording" in capsys.readouterr().err
    # Nothing in this run but decoding for the forecast goes beyond it.
    assert memory.forward_bytes(pipe) < told[0] * 1.3
