"""docs/methods.md: the catalogue of methods, from the registries, their docstrings, masks, and measured results.

Called by `python benchmarks/methods.py --docs`. Pictures go to docs/images/methods/.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsereel import TokenGrid, compensation, patterns, selectors
from sparsereel.patterns import Pattern
from sparsereel.selectors import SelectionContext
from sparsereel.token_order import best_mask

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "images" / "methods"
SIDE = 96
#: minireel's native size, Wan at 480p and at 720p, 81 frames
LENGTHS = {"1,296": TokenGrid(9, 12, 12), "32,760": TokenGrid(21, 30, 52), "75,600": TokenGrid(21, 45, 80)}
DRAWN = TokenGrid(4, 6, 6)
LOST = "A clip that lost its digit has about 26.2 dB and judge 0.143 at native size: the background alone.\n"
TIMED = "`searched_time` wants a share of the dense seconds in attention; every other row wants a density.\n"
#: what stands in the catalogue for each pattern that needs arguments
ARGUMENTS: dict[str, dict[str, Any]] = {
    "neighborhood": {"window": (0.6, 0.6, 0.6)},
    "sliding_tile": {"window": (0.6, 0.5, 0.5)},
    "diagonal": {"width": 0.1},
    "multi_diagonal": {"width": 0.05},
    "vertical_stripe": {"columns": ((0.0, 0.1),)},
    "blocked": {"window": (0.5, 0.5, 0.5)},
    "sink_tokens": {"places": ((0, 0.5, 0.5),)},
}
#: what is drawn where the row's settings fill a grid of 144 tokens
DRAWN_WITH: dict[str, dict[str, Any]] = {
    "sliding_tile": {"window": (1, 3, 1), "tile": (2, 2, 2)},
    "radial": {"decay": 0.3},
    "sharded": {"run": 8},
    "random_global": {"run": 8},
    "svg2": {"threshold": 0.5, "min_density": 0.0},
    "hip": {"window": 64},
    "anchor": {"theta": 0.5, "group": 2},
}
#: methods whose authors train the model on them; here without that training
TRAINED = ("sharded", "vsa", "biformer", "dhsa", "linear")
#: for ablations, or of our own making
EXPERIMENTAL = ("random_global", "flash_bias", "causal", "blocked")
INTRODUCTION = """# Methods

Every pattern, selector and compensation, one row each. Pictures: queries downwards, keys across, dark where a pair is
visited; patterns on 4 frames of 6 x 6 tokens, selectors on smooth random q and k in blocks of 32 (some with settings
that show their shape on so few tokens). Density: share of key blocks visited with the settings of the row at three
lengths (minireel, Wan 480p and 720p with 81 frames), in the token order that the library would choose for Wan;
selectors have the density of their budget, or follow q and k.

Tiers: **verified** = held to its definition by tests and measured on trained attention (minireel); **conformance
only** = held to its definition, but its authors train the model for it and we do not; **experimental** = for
ablations, or with choices of our own. No method was run on a real checkpoint here.

What patterns and selectors mean in detail: [patterns](patterns.md), [selectors](selectors.md),
[compensation](compensation.md); settings that papers published: [published settings](presets.md).
"""


def write(native: dict[str, Any], large: dict[str, Any]) -> None:
    """The page and its pictures."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    heads = ["method", "paper", "what it does", "settings", "mask", *(f"at {n}" for n in LENGTHS), "tier"]
    rows = [*native["rows"].values(), *large["rows"].values()]
    seen = {row["method"] for row in rows} | {str(row["compensation"]).partition("(")[0] for row in rows}
    lines = [INTRODUCTION]
    for title, names, row in (
        ("Patterns", patterns.names(), pattern_row),
        ("Selectors", selectors.names(), selector_row),
        ("Compensation", compensation.names(), compensation_row),
    ):
        columns = heads if title != "Compensation" else [heads[i] for i in (0, 1, 2, 3, 8)]
        lines += [f"\n## {title}\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(row(name, seen))} |" for name in names]
    lines += measured("Measured at native size", native) + measured("Measured at large size (speed)", large)
    (DOCS / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {DOCS / 'methods.md'}")


def paper_of(cls: type[Any]) -> str:
    """Links to the papers that a docstring names."""
    found = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", cls.__doc__ or ""))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in list(found)[:2]) or "-"


def first_line(cls: type[Any]) -> str:
    """The first line of the file of a method, which says what it does."""
    text = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
    return text.rstrip(".").replace("|", "\\|")


def tier_of(name: str, seen: set[str]) -> str:
    """How far a method can be relied on; `seen` are those that were measured on minireel."""
    if name in EXPERIMENTAL:
        return "experimental"
    exact = name in ("full", "skip")
    return "verified" if name not in TRAINED and (exact or name in seen) else "conformance only"


def class_of(table: tuple[type[Any], ...], name: str) -> type[Any]:
    """The class of a method."""
    return next(cls for cls in table if cls.name == name)


def pattern_row(name: str, seen: set[str]) -> list[str]:
    """Cells of a pattern."""
    pattern = patterns.make(name, **ARGUMENTS.get(name, {}))
    cls = class_of(patterns.registry.CLASSES, name)
    drawn = patterns.make(name, **DRAWN_WITH.get(name, ARGUMENTS.get(name, {})))
    draw(~drawn.token_mask(DRAWN), name)
    densities = [f"{block_density(pattern, grid):.3f}" for grid in LENGTHS.values()]
    return [f"`{name}`", paper_of(cls), first_line(cls), f"`{pattern}`", picture(name), *densities, tier_of(name, seen)]


def block_density(pattern: Pattern, grid: TokenGrid) -> float:
    """Share of key blocks visited in the token order that visits the fewest."""
    mask = best_mask(pattern, grid)
    return 1.0 if mask is None else mask.density


def selector_row(name: str, seen: set[str]) -> list[str]:
    """Cells of a selector."""
    cls = class_of(selectors.registry.CLASSES, name)
    selector = selectors.make(name)
    grid = TokenGrid(4, 16, 16)
    shown = selectors.make(name, **DRAWN_WITH.get(name, {}))
    q, k = smooth(grid), smooth(grid)
    chosen = shown(q, k, SelectionContext(grid, (32, 32)))
    draw(chosen.mask.block_map()[0, 0] == -1, name)
    budget = getattr(selector, "density", None)
    densities = [f"{budget:.3f}" if budget is not None else "q, k"] * len(LENGTHS)
    return [
        f"`{name}`",
        paper_of(cls),
        first_line(cls),
        f"`{selector}`",
        picture(name),
        *densities,
        tier_of(name, seen),
    ]


def smooth(grid: TokenGrid) -> torch.Tensor:
    """fp32 [1, 1, S, 16] whose products fall off with distance."""
    generator = torch.Generator().manual_seed(1)
    position = torch.stack([axis.float() for axis in grid.coordinates()], -1)
    angles = position @ (0.35 * torch.randn(3, 8, generator=generator))
    noise = 0.4 * torch.randn(1, 1, grid.seq_len, 16, generator=torch.Generator().manual_seed(grid.seq_len))
    return 1.5 * torch.cat([angles.cos(), angles.sin()], -1)[None, None] + noise


def compensation_row(name: str, seen: set[str]) -> list[str]:
    """Cells of a compensation."""
    cls = class_of(compensation.CLASSES, name)
    return [f"`{name}`", paper_of(cls), first_line(cls), f"`{compensation.make(name)}`", tier_of(name, seen)]


def draw(empty: torch.Tensor, name: str) -> None:
    """A small PNG: dark where a pair is visited."""
    shades = torch.where(empty, 240, 40).to(torch.uint8).numpy()
    Image.fromarray(shades).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(PICTURES / f"{name}.png", optimize=True)


def picture(name: str) -> str:
    """Markdown of a picture."""
    return f"![{name}](images/methods/{name}.png)"


def against_searched(margins: dict[str, float]) -> list[str]:
    """Where searched plans stand at equal seconds in attention; nothing where there are none."""
    if not margins:
        return []
    below = sorted((value, name) for name, value in margins.items() if value <= 0)
    above = len(margins) - len(below)
    text = (
        f"The best searched plan of no more seconds in attention against every row that spends as many or more: "
        f"above {above} of {len(margins)}, by {statistics.median(margins.values()):.1f} dB in the middle."
    )
    if below:
        text += " Not above: " + ", ".join(f"{name} ({value:.1f} dB)" for value, name in below) + "."
    return [text + "\n"]


def measured(title: str, results: dict[str, Any]) -> list[str]:
    """The table of what was measured; nothing where there are no results."""
    if not results["rows"]:
        return []
    found = results.get("environment", {})
    text = f"{found.get('machine', '')}, {found.get('threads', '')} threads, torch {found.get('torch', '')}, fp32"
    lines = [f"\n## {title}\n", f"`python benchmarks/methods.py`; {text}. Dense clips:"]
    for label, dense in results["dense"].items():
        figures = f"{dense['seconds']:.1f} s a clip, judge {dense['judge']:.3f}, load {dense['load_average']:.1f}"
        lines.append(f"{label} steps: {figures}.")
    lines += [
        "Those are of the last run; `dense / this` sets each row beside the dense clips of its own run.",
        "With a load well above 2 other work shared the two cores: seconds are then high, ratios rough, PSNR exact.",
        "Blocks of 128 x 64 on 1,296 tokens are coarse: where a method cannot match the density, `density` says so.\n",
        *([] if "large" in title else [LOST, TIMED]),
        *against_searched(results.get("margins", {})),
        "| method | setting | wanted | density | PSNR dB | SSIM | judge | s | of it attention | dense / this | load |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = sorted(results["rows"].items(), key=lambda item: (item[1]["target"], item[0]))
    for key, row in order:
        figures = (
            f"{row['target']:g}",
            f"{row['density']:.3f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
            f"{row['judge']:.3f}",
            f"{row['seconds']:.1f}",
            f"{row['attention_seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['load_average']:.1f}",
        )
        lines.append(f"| {key} | `{row['setting']}` | {' | '.join(figures)} |")
    return lines
