"""What the published settings that come as presets cost, predicted, beside what their papers claim.

    python benchmarks/presets.py                    # prints the table and writes docs/presets.md (about two minutes)
    python benchmarks/presets.py --only wan/radial flux/gna --json -

For each preset the grid, steps and layers of its source are taken. `density` is the share of key blocks that a sparse
call visits: of the mask itself for patterns, in the token order that `sparsify` would choose; what the budget says
for selectors; a lower bound (marked >=) for those whose number of blocks follows from q and k. `FLOPs` is all
attention of the run over dense attention, dense steps and layers included, and `reduction` its inverse. Nothing is
timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsereel import TokenGrid, presets
from sparsereel.families import orders_tokens
from sparsereel.patterns import Full, Pattern
from sparsereel.plan_entries import Method
from sparsereel.selectors import Selector
from sparsereel.token_order import best_tile, mask_in_order

DOCS = Path(__file__).parents[1] / "docs" / "presets.md"
#: the argument that is a selector's density, and whether it is only the least
BUDGETS = {
    "block_topk": ("density", False),
    "block_topp": ("min_density", True),
    "spargeattn": ("density", False),
    "svg": ("density", False),
    "svg2": ("min_density", True),
    "vsa": ("density", False),
}
INTRODUCTION = """# Published settings

Presets with a family's name are settings that papers published for one model, loaded like any other:
`sparsereel.sparsify(pipe, "wan/radial")`. Each file names its paper, the size it was published for and where the
numbers come from; what differs from the original stands in its first lines. They are not tuned here, and no real
checkpoint was run: what they keep of the quality has to be measured on yours. For LTX-Video, Latte, Allegro and the
other families no published settings were found, so there are none.

`density` is the share of key blocks that a sparse call visits (block 128 x 64): of the mask for patterns, the budget
for selectors, a lower bound (>=) where the number of blocks depends on q and k. `FLOPs` is all attention of a run
over dense attention, with the dense steps and layers that the setting asks for; `reduction` is its inverse, a bound
for the speed-up of attention alone. Claims are the papers', on their GPUs, some with other techniques on top. Made by
`python benchmarks/presets.py`.

Densities are those in the order of tokens that `sparsify` chooses: tiles side by side where that saves blocks.
"""


def density_of(method: Method, grid: TokenGrid, family: str) -> tuple[float | None, bool]:
    """(share of blocks visited, whether that is only the least); None where it depends on q and k alone."""
    if isinstance(method, Full):
        return 1.0, False
    if isinstance(method, Pattern):
        tile = best_tile({method: 1}, grid, every_call=not orders_tokens(family))
        mask = mask_in_order((method,), grid, tile)
        return (1.0 if mask is None else mask.density), False
    assert isinstance(method, Selector)
    if method.name not in BUDGETS:
        return None, True
    argument, least = BUDGETS[method.name]
    sinks = 1 / grid.frames if method.keep_sinks and grid.frames > 1 else 0.0
    share = float(getattr(method, argument))
    return share + (1 - share) * sinks, least


def predict(name: str) -> dict[str, Any]:
    """One row of the table."""
    plan = presets.load(name)
    source = plan.source
    frames, height, width = source["grid"]
    grid = TokenGrid(frames, height, width, text=source.get("text", 0))
    steps, layers = source["steps"], source["layers"]
    resolved = plan.resolve("transformer", [f"layer.{n}" for n in range(layers)], [1] * layers)
    sparse_steps = [step for step in range(steps) if not plan.schedule.dense_at(step, steps)]
    known = {m: density_of(m, grid, str(plan.model.family)) for layer in resolved for m in layer.distinct()}
    shares = [known[layer.at(step, steps)[0]][0] for layer in resolved for step in sparse_steps]
    sparse = [share for method, (share, _) in known.items() if not isinstance(method, Full)]
    total = None
    if None not in shares:
        dense_calls = layers * (steps - len(sparse_steps))
        total = (sum(share for share in shares if share is not None) + dense_calls) / (layers * steps)
    return {
        "preset": name,
        "paper": source["paper"],
        "setting": source["setting"],
        "grid": [frames, height, width],
        "tokens": grid.seq_len,
        "dense_steps": steps - len(sparse_steps),
        "steps": steps,
        "dense_layers": sum(layer.uniform_full for layer in resolved),
        "layers": layers,
        "density": sparse[0] if sparse else 1.0,
        "least": any(least for _, least in known.values()),
        "flops": total,
        "claim": source["claim"],
    }


def row_of(row: dict[str, Any]) -> str:
    """One line of Markdown."""
    at_least = ">= " if row["least"] else ""
    if row["flops"] is None:
        density, flops, reduction = "from q and k", "-", "-"
    else:
        density, flops = f"{at_least}{row['density']:.3f}", f"{at_least}{row['flops']:.3f}"
        reduction = f"{'<= ' if row['least'] else ''}{1 / row['flops']:.2f}x"
    arxiv = row["paper"].rpartition("arXiv ")[2]
    paper = row["paper"].replace(f"arXiv {arxiv}", f"[{arxiv}](https://arxiv.org/abs/{arxiv})")
    dense = f"{row['dense_steps']} of {row['steps']}, {row['dense_layers']} of {row['layers']}"
    cells = (f"`{row['preset']}`", paper, row["setting"], f"{row['tokens']:,}", dense)
    return f"| {' | '.join(cells)} | {density} | {flops} | {reduction} | {row['claim']} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=presets.published(), default=None, help="presets (default all)")
    parser.add_argument("--json", default=None, help="also write JSON here, or - for standard output")
    options = parser.parse_args(arguments)
    quiet = options.json == "-"
    heads = ("preset", "paper", "for", "tokens", "dense steps, layers", "density", "FLOPs", "reduction", "claimed")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---:|---|---:|---:|---:|---|"]
    rows = []
    try:
        for name in options.only or presets.published():
            rows.append(predict(name))
            lines.append(row_of(rows[-1]))
            if not quiet:
                print(lines[-1], flush=True)
    except KeyboardInterrupt:
        return 130
    if options.only is None and not quiet:
        DOCS.write_text(f"{INTRODUCTION}\n" + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {DOCS}")
    if options.json is not None:
        text = json.dumps(rows, indent=1) + "\n"
        print(text, end="") if quiet else Path(options.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
