"""What minireel is trained on and for how long: the numbers, and nothing else.

Sizes grow from stage to stage. Appearance is learned on small clips, where a step is cheap; on large canvases only the
distances are new, and a random share of the tokens (`keep`) is enough to learn those.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsereel.minireel.training.clip_sets import ClipSet

SMALL = ClipSet("small", count=2400, frames=17, height=48, width=48, two=0.15, seed=1)
NATIVE = ClipSet("native", count=900, frames=33, height=96, width=96, two=0.0, seed=2)
NATIVE_PAIRS = ClipSet("native_pairs", count=900, frames=33, height=96, width=96, two=1.0, seed=3)
MIDDLE = ClipSet("middle", count=400, frames=33, height=160, width=160, two=0.25, seed=4)
LARGE_CLIPS = ClipSet("large", count=400, frames=33, height=256, width=256, two=0.25, seed=5)
HELD_OUT = ClipSet("held_out", count=12, frames=33, height=96, width=96, two=0.25, seed=101)

VAE_MINUTES = 25.0
# Clips of 64 x 64 x 17 that the VAE's crops are cut from, and those its latents' statistics are measured on.
VAE_POOL = 1500
MEASURED_CLIPS = 48


@dataclass(frozen=True)
class Portion:
    """One kind of step: `batch` clips of a set, drawn for this `share` of the steps.

    Attributes:
        keep: Share of a clip's tokens that take part in the step, drawn at random each time.
        tile: They are drawn in columns of tile x tile latent cells through all frames, so that some neighbours stay.
        shift: Time shift of the noise levels; larger clips are noised more.
        long_text: Share of these steps with prompts padded to 512, stock `WanPipeline`'s default.
    """

    clips: ClipSet
    batch: int
    share: float
    keep: float = 1.0
    tile: int = 2
    shift: float = 5.0
    long_text: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One run of the transformer's training; rates are held for `hold` of it, then fall linearly."""

    name: str
    minutes: float
    portions: tuple[Portion, ...]
    muon_rate: float
    adamw_rate: float
    hold: float
    held_out: ClipSet = HELD_OUT

    @property
    def sets(self) -> tuple[ClipSet, ...]:
        return (*(portion.clips for portion in self.portions), self.held_out)


TRANSFORMER = Stage(
    "transformer",
    minutes=75,
    portions=(
        Portion(SMALL, batch=24, share=0.3, shift=3.0),
        Portion(NATIVE, batch=4, share=0.4, long_text=0.15),
        Portion(NATIVE_PAIRS, batch=4, share=0.3, long_text=0.15),
    ),
    muon_rate=1.5e-3,
    adamw_rate=6e-4,
    hold=0.3,
)
LARGE = Stage(
    "large",
    minutes=60,
    portions=(
        Portion(NATIVE, batch=4, share=0.25, long_text=0.1),
        Portion(NATIVE_PAIRS, batch=4, share=0.25, long_text=0.1),
        Portion(MIDDLE, batch=1, share=0.15),
        Portion(LARGE_CLIPS, batch=2, share=0.35, keep=0.25, shift=6.0),
    ),
    muon_rate=1.2e-3,
    adamw_rate=5e-4,
    hold=0.25,
)
