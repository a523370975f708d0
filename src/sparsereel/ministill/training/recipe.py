"""What ministill is trained on, and for how long: 48 minutes on one thread of a CPU with AVX2."""

from __future__ import annotations

from dataclasses import dataclass

#: Steps, not minutes: the same weights come out of a slower machine.
VAE_STEPS, UNET_STEPS = 1500, 3400
#: Pictures that the VAE's batches are drawn from, and those that its latents are measured on.
VAE_POOL, MEASURED = 3000, 256


@dataclass(frozen=True)
class PictureSet:
    """`count` random pictures; the descriptions follow from the seed.

    Attributes:
        sides: The pictures' sides over the native one, drawn alike; of larger ones only a window of native size is
            kept, somewhere on the digit: a close-up.
    """

    name: str
    count: int
    seed: int
    sides: tuple[int, ...] = (1,)


TRAINING = PictureSet("training", 16_000, seed=1)
HELD_OUT = PictureSet("held_out", 128, seed=2)
CLOSE_UPS = PictureSet("close_ups", 6_000, seed=3, sides=(2, 4))

BATCH = 24
MUON_RATE = 1.5e-3
ADAMW_RATE = 1e-3
#: Share of the stage at full rate; then it falls linearly.
HOLD = 0.4
#: Share of prompts left out: classifier-free guidance needs the unconditional prediction.
DROPPED_PROMPTS = 0.1
#: Close-ups join after so many steps, at noise levels below this one (of 1,000) only, as this share of the pictures.
#: There the layout is decided: strokes of any thickness are learned, and whole digits stay as they are.
CLOSE_AFTER, CLOSE_BELOW, CLOSE_SHARE = 2450, 600, 0.5
