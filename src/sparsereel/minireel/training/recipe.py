"""What minireel is trained on and for how long: the numbers, and nothing else.

Sizes grow within a stage and from stage to stage: appearance is learned on small clips, where a step is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsereel.minireel.training.clip_sets import ClipSet
from sparsereel.minireel.training.layouts import SINK_1, SINK_3, SLIDING, START, Layout

SMALL = ClipSet("small", count=2400, frames=17, height=48, width=48, two=0.15, seed=1)
NATIVE = ClipSet("native", count=900, frames=33, height=96, width=96, two=0.0, seed=2)
NATIVE_PAIRS = ClipSet("native_pairs", count=900, frames=33, height=96, width=96, two=1.0, seed=3)
# They bounce on for longer than a window of the causal model; the starts are those of native clips.
ENDLESS_SMALL = ClipSet("endless_small", count=600, frames=81, height=48, width=48, two=0.0, seed=6, starts_of=33)
ENDLESS = ClipSet("endless", count=72, frames=81, height=96, width=96, two=0.0, seed=7, starts_of=33)
HELD_OUT = ClipSet("held_out", count=12, frames=33, height=96, width=96, two=0.25, seed=101)
ENDLESS_HELD_OUT = ClipSet("endless_held_out", count=2, frames=81, height=96, width=96, two=0.0, seed=102, starts_of=33)

VAE_MINUTES = 25.0
# Clips of 64 x 64 x 17 that the VAE's crops are cut from, and those its latents' statistics are measured on.
VAE_POOL = 1500
MEASURED_CLIPS = 48


@dataclass(frozen=True)
class Portion:
    """One kind of step: `batch` clips of a set, drawn for this `share` of the steps.

    Attributes:
        shift: Time shift of the noise levels; larger clips are noised more.
        long_text: Share of these steps with prompts padded to 512, stock `WanPipeline`'s default.
        layout: Of the causal stage: which chunks stand in a sequence and who sees whom.
    """

    clips: ClipSet
    batch: int
    share: float
    shift: float = 5.0
    long_text: float = 0.0
    layout: Layout | None = None


@dataclass(frozen=True)
class Stage:
    """One run of the transformer's training; rates are held for `hold` of it, then fall linearly.

    Attributes:
        warm_up: Steps over which the rates rise.
    """

    name: str
    minutes: float
    portions: tuple[Portion, ...]
    muon_rate: float
    adamw_rate: float
    hold: float
    held_out: ClipSet = HELD_OUT
    warm_up: int = 60

    @property
    def sets(self) -> tuple[ClipSet, ...]:
        return (*(portion.clips for portion in self.portions), self.held_out)


TRANSFORMER = Stage(
    "transformer",
    minutes=65,
    portions=(
        Portion(SMALL, batch=24, share=0.3, shift=3.0),
        Portion(NATIVE, batch=4, share=0.4, long_text=0.15),
        Portion(NATIVE_PAIRS, batch=4, share=0.3, long_text=0.15),
    ),
    muon_rate=1.5e-3,
    adamw_rate=6e-4,
    hold=0.3,
)
# Who may see whom is learned on small clips, at a quarter of the cost; then at native size, with some small ones left.
CAUSAL_SMALL = Stage(
    "causal_small",
    minutes=10,
    portions=(
        Portion(ENDLESS_SMALL, batch=4, share=0.4, shift=3.0, layout=START),
        Portion(ENDLESS_SMALL, batch=3, share=0.2, shift=3.0, layout=SLIDING),
        Portion(ENDLESS_SMALL, batch=3, share=0.25, shift=3.0, layout=SINK_3),
        Portion(ENDLESS_SMALL, batch=3, share=0.15, shift=3.0, layout=SINK_1),
    ),
    muon_rate=7e-4,
    adamw_rate=3e-4,
    hold=1.0,
    warm_up=15,
    held_out=ENDLESS_HELD_OUT,
)
# A chunk that continues others has little left to decide, so the first, from nothing, has the largest share.
CAUSAL = Stage(
    "causal",
    minutes=50,
    portions=(
        Portion(ENDLESS_SMALL, batch=3, share=0.25, shift=3.0, layout=SINK_3),
        Portion(ENDLESS, batch=1, share=0.4, layout=START),
        Portion(ENDLESS, batch=1, share=0.15, layout=SLIDING),
        Portion(ENDLESS, batch=1, share=0.12, layout=SINK_3),
        Portion(ENDLESS, batch=1, share=0.08, layout=SINK_1),
    ),
    muon_rate=7e-4,
    adamw_rate=3e-4,
    hold=0.3,
    warm_up=15,
    held_out=ENDLESS_HELD_OUT,
)
