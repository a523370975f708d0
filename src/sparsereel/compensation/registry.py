"""Compensations by name: what YAML and the command line use."""

from __future__ import annotations

from typing import Any

from sparsereel.compensation.base import Compensation
from sparsereel.compensation.cached_residual import CachedResidual
from sparsereel.compensation.flash_bias import FlashBias
from sparsereel.compensation.linear import Linear
from sparsereel.compensation.mean_key import MeanKey
from sparsereel.compensation.rectified import Rectified
from sparsereel.registry import Registry

CLASSES: tuple[type[Any], ...] = (MeanKey, FlashBias, Rectified, Linear, CachedResidual)

REGISTRY: Registry[Compensation] = Registry("compensation", CLASSES)
names = REGISTRY.names
make = REGISTRY.make


def from_plain(value: Any) -> Compensation:
    """The compensation that plain data describes: a name, or `{name: {arguments}}`.

    Raises:
        ValueError: another shape; what `make` refuses.
    """
    if isinstance(value, str):
        return make(value)
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a compensation must be a name or {{name: {{arguments}}}}, got {value!r}")
    ((name, arguments),) = value.items()
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f"the arguments of {name} must be a mapping, got {arguments!r}")
    return make(str(name), **arguments)
