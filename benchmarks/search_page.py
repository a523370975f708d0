"""The part of docs/search.md that search.py measured, made of its JSON."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

_MARKS = re.compile(r"(<!-- search: made by benchmarks/search.py -->\n).*?(<!-- end -->)", re.DOTALL)


def put(path: Path, facts: dict[str, Any]) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if not _MARKS.search(text):
        raise ValueError(
            f"{path} has no place for the table: <!-- search: made by benchmarks/search.py --> ... <!-- end -->"
        )
    lines = "\n".join(["", about(facts), "", *table(facts["rows"]), "", *predictions(facts), ""])
    path.write_text(_MARKS.sub(lambda found: found[1] + lines + found[2], text), encoding="utf-8")


def about(facts: dict[str, Any]) -> str:
    """What was measured, and what a clip takes dense."""
    size, where = facts["size"], facts["environment"]
    dense = statistics.median(facts["dense_seconds"])
    attention = statistics.median(facts["dense_attention_seconds"])
    return (
        f"{size['frames']} frames of {size['width']} x {size['height']}, {size['steps']} steps, {facts['dtype']}; "
        f"{len(facts['prompts']) - len(facts['held_out'])} prompts recorded, {len(facts['held_out'])} others measured; "
        f"{where['machine']}, {where['threads']} threads, torch {where['torch']}. A dense clip took {dense:.2f} s, of "
        f"it {attention:.2f} in attention, {facts['dense_attention_seconds_on_our_kernels']:.2f} dense on our kernels."
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row a contender, a column a share."""
    shares = sorted({row["share"] for row in rows})
    names = dict.fromkeys(row["contender"] for row in rows)
    lines = [
        f"| share of the dense seconds | {' | '.join(f'{share:g}' for share in shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for name in names:
        cells = []
        for share in shares:
            row = next((r for r in rows if r["contender"] == name and r["share"] == share), None)
            dense = "" if row is None or "dense_first" not in row else f", {row['dense_first']} dense"
            cells.append("-" if row is None else f"{row['psnr']:.1f} dB, {row['attention_seconds']:.2f} s{dense}")
        shown = f"**{name}**" if name == "searched" else f"`{name}`"
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def predictions(facts: dict[str, Any]) -> list[str]:
    """How predictions compare with what was measured; nothing where that was not asked for."""
    if "spearman" not in facts:
        return []
    ranking = facts["ranking"]
    ratios = [facts[f"seconds_ratio_{name}"] for name in ("median", "least", "most")]
    return [
        f"Predictions of {len(ranking)} searched plans of densities from {ranking[0]['budget']:.2f} to "
        f"{ranking[-1]['budget']:.2f}: rank correlation of predicted error and PSNR {facts['spearman']:.2f}; measured "
        "over predicted seconds of a clip {:.2f} in the middle, from {:.2f} to {:.2f}.".format(*ratios)
    ]
