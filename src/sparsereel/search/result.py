"""What a search hands back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereel.plan import AttentionPlan

if TYPE_CHECKING:
    from sparsereel.search.evidence import Evidence


@dataclass(frozen=True)
class FrontPoint:
    """One plan on the front, as predicted.

    Attributes:
        pressure: lambda, error for one clip's worth of dense attention time (or density, with a budget).
        density: share of key blocks visited, mean over layers, heads and steps.
        seconds: of a clip.
        speedup: over the untouched clip.
        error: weighted; the mean squared error of the latents over their variance.
        psnr: dB against the dense clip.
    """

    pressure: float
    density: float
    seconds: float
    speedup: float
    error: float
    psnr: float


@dataclass(frozen=True)
class SearchResult:
    """A plan and how it was found.

    Attributes:
        plan: with everything that was measured in its `calibration`.
        front: all trade-offs, thinned, from dense to the cheapest.
        predicted: of the plan.
        measured: means on the held-out prompts, by name; empty where none were held out.
        met: whether the target was reached, as measured where prompts were held out, else as predicted.
        note: one sentence on what the reader should know; may be empty.
        evidence: what was seen on the way, for `report`.
    """

    plan: AttentionPlan
    front: tuple[FrontPoint, ...]
    predicted: FrontPoint
    measured: dict[str, Any] = field(default_factory=dict)
    met: bool = True
    note: str = ""
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    def report(self, path: str | Path) -> None:
        """Write one HTML page that opens offline: heads, choices, the front, what was measured, clips.

        Raises:
            ValueError: the folder is not writable, or the result has no evidence.
        """
        from sparsereel.search.report import write_report

        write_report(Path(path), self)

    def save(self, path: str | Path) -> None:
        """Write the plan file in one move.

        Raises:
            OSError: the folder is missing or not writable.
        """
        self.plan.save(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "met": self.met,
            "note": self.note,
            "predicted": asdict(self.predicted),
            "measured": self.measured,
            "front": [asdict(point) for point in self.front],
            "plan": self.plan.to_dict(),
        }
