"""Compensation: what skipped blocks would have added, estimated cheaply, so that it is not simply lost.

A plan option: `compensation: mean_key`, `compensation: {rectified: {flavour: ipar}}`. One file a method. All are exact
where nothing is skipped. docs/compensation.md tells them apart.
"""

from __future__ import annotations

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.compensation.cached_residual import CachedResidual
from sparsereel.compensation.flash_bias import FlashBias, biased_attention, low_rank
from sparsereel.compensation.linear import Linear, linear_branch
from sparsereel.compensation.mean_key import MeanKey
from sparsereel.compensation.rectified import Rectified
from sparsereel.compensation.registry import CLASSES, from_plain, make, names

__all__ = [
    "CLASSES",
    "CachedResidual",
    "Compensation",
    "FlashBias",
    "Linear",
    "MeanKey",
    "Rectified",
    "SparseCall",
    "biased_attention",
    "from_plain",
    "linear_branch",
    "low_rank",
    "make",
    "names",
]
