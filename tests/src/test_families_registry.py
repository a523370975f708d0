"""The registry: every model of diffusers is covered or refused with a reason; parameters are named in the forward's
order; families of one's own; the table in the documents."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import sparsereel
from sparsereel import families
from sparsereel.families.table import table
from sparsereel.patterns import Spatial

DOCS = Path(__file__).parents[2] / "docs"


def exported() -> dict[str, type]:
    """Transformers and U-Nets that diffusers exports."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        is_model = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
        if is_model and cls.__module__.startswith(("diffusers.models.transformers.", "diffusers.models.unets.")):
            found[name] = cls
    return found


MODELS = exported()
COVERED = {name: family for family in families.FAMILIES for name in family.classes}


def test_every_model_is_covered_or_refused_with_a_reason():
    assert len(MODELS) > 80
    assert not set(MODELS) - set(COVERED) - set(families.REFUSED), "neither covered nor refused"
    assert not set(COVERED) & set(families.REFUSED)
    assert all(len(reason.split()) > 4 for reason in families.REFUSED.values())


def test_what_is_listed_exists():
    # Older versions of diffusers lack the newest models.
    if diffusers.__version__ >= "0.42":
        assert not (set(COVERED) | set(families.REFUSED)) - set(MODELS)


@pytest.mark.parametrize("name", sorted(set(COVERED) & set(MODELS)))
def test_parameters_are_the_forwards(name):
    """`layout` looks positional arguments up by these names."""
    forward = list(inspect.signature(MODELS[name].forward).parameters)[1:]
    family = COVERED[name]
    assert tuple(forward[: len(family.parameters)]) == family.parameters
    assert not family.processors - processors()


def processors() -> set[str]:
    """Names of everything in modules of models."""
    return {name for key, module in sys.modules.items() if key.startswith("diffusers.models.") for name in vars(module)}


def test_names_are_unique():
    names = [family.name for family in families.FAMILIES]
    assert len(set(names)) == len(names)
    assert len(COVERED) == sum(len(family.classes) for family in families.FAMILIES)


def test_refusals_say_why_and_where_to_read_on():
    model = diffusers.UNet1DModel(
        block_out_channels=(8,), down_block_types=("DownBlock1D",), up_block_types=("UpBlock1D",)
    )
    with pytest.raises(ValueError, match=r"UNet1DModel is refused: its tokens are not.*docs/new-family\.md"):
        sparsereel.sparsify(model, Spatial())
    with pytest.raises(ValueError, match=r"no model of a known family in Linear; known models: .*new-family\.md"):
        sparsereel.sparsify(torch.nn.Linear(2, 2), Spatial())


def test_the_table_in_the_documents_is_the_registry():
    assert (DOCS / "models.md").read_text(encoding="utf-8").endswith(table())


@pytest.fixture
def registry():
    before = list(families.FAMILIES)
    yield
    families.FAMILIES[:] = before


def test_the_example_of_a_new_family_runs(registry, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "new-family.md").read_text(encoding="utf-8"), re.S)
    scope: dict = {"__name__": "example"}
    exec(compile(code, "new-family.md", "exec"), scope)
    report = sparsereel.report(scope["model"])
    assert [(row.calls, row.dense_calls, row.replaced) for row in report] == [(1, 0, True)]
    assert report.token_density < 0.1
    assert "attn1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="named 'my_family' is registered already"):
        families.register(scope["MyFamily"]())
    with pytest.raises(ValueError, match="an instance of a Family"):
        families.register(scope["MyFamily"])
