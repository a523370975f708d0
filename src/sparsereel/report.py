"""The receipt of a sparsified model: every attention layer, what runs in it, and what it saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: component and module name.
        replaced: whether sparsereel runs this layer.
        reason: why it is not replaced, or why (some of) its calls stayed dense; empty when there is nothing to say.
        pattern: what the plan asks for, in short.
        density: share of key blocks visited, mean over calls (1.0 = dense); None until called.
        token_density: share of query-key pairs allowed, mean over calls; None until called.
        backend: kernel that ran the sparse calls; None until one ran.
        calls, dense_calls: how often the layer ran since `sparsify`, and how often dense.
        seconds: time inside attention; None unless profiled.
    """

    name: str
    replaced: bool
    reason: str = ""
    pattern: str = ""
    density: float | None = None
    token_density: float | None = None
    backend: str | None = None
    calls: int = 0
    dense_calls: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """What `sparsify` did and what ran since. `str()` is a table; `to_dict()` is what goes into JSON."""

    plan: str
    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    @property
    def replaced(self) -> int:
        """Number of layers that sparsereel runs."""
        return sum(layer.replaced for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Mean block density over all calls of replaced layers; None before the first call."""
        return self._mean("density")

    @property
    def token_density(self) -> float | None:
        """Mean token density over all calls of replaced layers; None before the first call."""
        return self._mean("token_density")

    def _mean(self, field: str) -> float | None:
        called = [layer for layer in self.layers if layer.replaced and layer.calls]
        calls = sum(layer.calls for layer in called)
        return sum(getattr(layer, field) * layer.calls for layer in called) / calls if calls else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: plan, mean densities, and one dictionary a layer."""
        return {
            "plan": self.plan,
            "replaced": self.replaced,
            "density": self.density,
            "token_density": self.token_density,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        header = ("layer", "runs", "pattern", "density", "tokens", "backend", "calls", "dense", "note")
        timed = any(layer.seconds is not None for layer in self.layers)
        rows = [header[:-1] + (("seconds",) if timed else ()) + header[-1:]]
        for layer in self.layers:
            seconds = (f"{layer.seconds:.2f}" if layer.seconds is not None else "-",) if timed else ()
            rows.append(
                (
                    layer.name,
                    "sparse" if layer.replaced else "dense",
                    layer.pattern or "-",
                    _share(layer.density),
                    _share(layer.token_density),
                    layer.backend or "-",
                    str(layer.calls),
                    str(layer.dense_calls),
                    *seconds,
                    layer.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        mean = "" if self.density is None else f", mean density {self.density:.3f} (tokens {self.token_density:.3f})"
        lines.append(f"plan {self.plan}: {self.replaced} of {len(self.layers)} layers replaced{mean}")
        return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
