"""Files and folders of clips against each other, with statistics over clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsereel_eval.lpips import Lpips
    from sparsereel_eval.paired import PairResult

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # how many are done, of how many


@dataclass
class Comparison:
    """Result of `compare_paths`.

    Attributes:
        pairs: One entry a pair of clips.
        table: Figure to its summary over clips (`sparsereel_eval.paired.aggregate`).
        versus_table: Figure to the summary of (TEST - other) over clips, with the p of Wilcoxon's test.
        skipped: What was left out and why.
    """

    pairs: list[PairResult]
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    versus_table: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def missing(self) -> dict[str, str]:
        """Figures no clip has, with the first reason."""
        reasons: dict[str, str] = {}
        for pair in self.pairs:
            reasons = {**pair.missing, **reasons}
        return {name: reason for name, reason in reasons.items() if name not in self.table}

    @property
    def lossy(self) -> bool:
        return any(pair.lossy for pair in self.pairs)

    @property
    def identical(self) -> bool:
        """Every frame of every pair is equal to the last bit."""
        return bool(self.pairs) and all(pair.identical == pair.frames for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "identical": self.identical,
            "versus": self.versus_table,
            "missing": self.missing,
            "skipped": self.skipped,
            "pairs": [pair.to_dict() for pair in self.pairs],
        }


def load_measure(net: str, weights: Path | None, *, download: bool, say: Say) -> Lpips | None:
    """LPIPS where its weights are at hand; else None, after one line that says what is needed.

    Raises:
        ValueError: a file was named but is missing or wrong.
    """
    from sparsereel_eval.lpips import MissingWeights, load_lpips

    if net == "off":
        return None
    try:
        return load_lpips(net, weights, download=download)
    except MissingWeights as error:
        if weights is not None:
            raise
        say(f"no LPIPS: {error}")
        return None


def compare_paths(
    reference: Path,
    test: Path,
    *,
    versus: Path | None = None,
    lpips: Lpips | None = None,
    skip: bool = False,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare two clips, or all clips of the same name in two folders.

    Args:
        versus: Another tested path, compared with the reference as well; differences go to `versus_table`.
        skip: Leave out unreadable and unpaired clips, each with a line, instead of refusing.
        progress: Called after each pair.

    Raises:
        ValueError: what `pair_clips` and `compare_clips` refuse.
    """
    from sparsereel_eval.paired import aggregate

    result = _measure(reference, test, lpips, skip, say, progress)
    if result.pairs:
        result.table = aggregate(result.pairs)
    if versus is not None:
        other = _measure(reference, versus, lpips, skip, say, progress)
        result.versus_table = differences(result.pairs, other.pairs)
        result.skipped += other.skipped
    return result


def _measure(reference: Path, test: Path, lpips: Lpips | None, skip: bool, say: Say, progress: Progress) -> Comparison:
    from sparsereel_eval.folders import pair_clips
    from sparsereel_eval.paired import compare_clips

    pairs, lonely = pair_clips(reference, test, skip=skip)
    result = Comparison([], skipped=[f"{path} has no partner" for path in lonely])
    for done, (left, right) in enumerate(pairs, start=1):
        try:
            result.pairs.append(compare_clips(left, right, lpips=lpips))
        except ValueError as error:
            if not skip:
                raise
            result.skipped.append(str(error))
        progress(done, len(pairs))
    for text in result.skipped:
        say(f"left out: {text}")
    return result


def differences(a: list[PairResult], b: list[PairResult]) -> dict[str, dict[str, Any]]:
    """Per figure the summary of a - b over references both have, and p of Wilcoxon's signed-rank test."""
    from sparsereel_eval.intervals import summarise, wilcoxon

    others = {pair.reference: pair for pair in b}
    table = {}
    for name in dict.fromkeys(name for pair in a for name in pair.values):
        both = [
            (pair.values[name], others[pair.reference].values[name])
            for pair in a
            if name in pair.values and pair.reference in others and name in others[pair.reference].values
        ]
        if both:
            left, right = [x for x, _ in both], [y for _, y in both]
            row = summarise([x - y for x, y in both])
            table[name] = {**row, "p": wilcoxon(left, right)}
    return table
