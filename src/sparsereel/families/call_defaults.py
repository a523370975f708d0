"""Defaults of a pipeline's own call: what its model was trained for."""

from __future__ import annotations

import inspect
from typing import Any


def call_default(pipe: Any, name: str, otherwise: Any = None) -> Any:
    """The default of an argument of `pipe(...)`; `otherwise` where it has none.

    A class that passes its arguments on to the one it is built upon, as `sparsereel_pipelines` do, is seen through.
    """
    for base in type(pipe).__mro__:
        call = vars(base).get("__call__")
        parameter = None if call is None else inspect.signature(call).parameters.get(name)
        if parameter is not None and parameter.default not in (None, inspect.Parameter.empty):
            return parameter.default
    return otherwise
