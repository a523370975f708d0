"""How much memory a search will take, said before its first long run.

The forward pass that the search has looked at shows what the model takes; recording adds scores of sampled queries
against all keys (bounded by `errors.MOST_NUMBERS`), what selectors choose, and the sums that are kept.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from sparsereel.families import models_of
from sparsereel.families.layout import decode
from sparsereel.patterns import Pattern
from sparsereel.search.errors import CELLS, MOST_NUMBERS, SAMPLES
from sparsereel.search.record import Study
from sparsereel.selectors import Selector

#: arrays of scores alive at once: logits, their softmax, its product with a mask and the mask itself as numbers
ARRAYS = 4
FLOAT, GIB = 4, 2**30


def recording_bytes(study: Study) -> int:
    """What recording takes beyond a forward pass."""
    layers = study.facts.layers.values()
    tokens = max(decode(layer.layout).seq_len for layer in layers)
    heads = max(layer.heads for layer in layers)
    samples = min(SAMPLES, tokens)
    scores = ARRAYS * FLOAT * min(MOST_NUMBERS, heads * samples * tokens)
    # A row of bools for each pattern, four rows of numbers for the places.
    patterns = sum(isinstance(method, Pattern) for method in study.candidates)
    rows = samples * tokens * (patterns + 4 * FLOAT)
    # Selectors run on reordered copies of q, k, v, and leave an output each.
    size = max(decode(layer.layout).seq_len * layer.heads * layer.head_dim for layer in layers)
    chosen = sum(isinstance(method, Selector) for method in study.candidates)
    copies = (3 + chosen) * size * study.facts.dtype.itemsize
    kept = sum(layer.heads for layer in layers) * len(study.buckets) * 8 * (CELLS**2 + 4 * len(study.candidates))
    return scores + rows + copies + kept


def forward_bytes(pipe: Any) -> int:
    """The most that this process has taken so far: models, and the forward pass that was looked at."""
    device = next(next(iter(models_of(pipe).values())).parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sentence(pipe: Any, study: Study) -> str:
    """One line for people."""
    seen, more = forward_bytes(pipe), recording_bytes(study)
    return (
        f"about {(seen + more) / GIB:.1f} GiB of memory while recording ({seen / GIB:.1f} seen in a forward pass); "
        "decoding clips is not counted"
    )
