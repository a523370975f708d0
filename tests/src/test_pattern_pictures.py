"""Every pattern file draws itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsereel import patterns
from sparsereel.grid import TokenGrid
from sparsereel.patterns.draw import draw, main

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n"


def test_a_pattern_file_runs_as_a_program(tmp_path):
    picture = tmp_path / "radial.png"
    module = [sys.executable, "-m", "sparsereel.patterns.radial"]
    result = subprocess.run(
        [*module, "--grid", "4", "4", "4", "--text", "8", "-o", picture], capture_output=True, text=True, check=True
    )
    assert picture.read_bytes().startswith(PNG)
    assert result.stdout == f"radial on TokenGrid(video 4x4x4 + text 8): wrote {picture}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("name", patterns.names())
def test_every_pattern_can_be_drawn(name, tmp_path):
    required = {"neighborhood": {"window": 3}, "sliding_tile": {"window": 1, "tile": [2, 2, 2]}}
    required |= {"blocked": {"window": 2}}
    required |= {"diagonal": {"width": 5}, "multi_diagonal": {"width": 3}, "vertical_stripe": {"columns": [0, 9]}}
    required |= {"sink_tokens": {"places": [[0, 0.5, 0.5]]}}
    picture = tmp_path / "picture.png"
    pattern = patterns.make(name, **required.get(name, {}))
    main(pattern, argv=["--grid", "3", "4", "4", "--block", "8", "16", "--order", "tile", "-o", str(picture)])
    assert picture.read_bytes().startswith(PNG)


def test_titles_tell_both_densities():
    figure = draw(patterns.Spatial(0), TokenGrid(2, 4, 4), block=(32, 8))
    left, right = (axes.get_title() for axes in figure.axes)
    assert left == "tokens: 50.0% of pairs allowed (blue)"
    assert right == "blocks of 32 x 8: density 100.0%, token density 50.0%"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grid", "50", "20", "20"], "a picture holds at most 4096 tokens, the grid has 20000"),
        (["-o", "/none/picture.png"], "/none/picture.png"),
        (["--grid", "0", "2", "2"], "segment frames must be a whole number of at least 1, got 0"),
        (["--block", "5", "5"], "block must be (query, key) tokens, each a multiple of 8"),
    ],
)
def test_bad_input_ends_with_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        main(patterns.Radial(), argv=argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
