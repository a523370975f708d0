"""Methods by name: one table a kind of method (patterns, selectors, compensation), for YAML and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The methods of one kind.

    Args:
        kind: the word for it in messages, such as "pattern".
        classes: frozen dataclasses with a `name`.
        ordered: the fields of a class in the order of documentation.
    """

    def __init__(
        self, kind: str, classes: Sequence[type[Any]], ordered: Callable[[type[Any]], Sequence[Field[Any]]] = fields
    ) -> None:
        self.kind = kind
        self.classes = tuple(classes)
        self._ordered = ordered

    def names(self) -> tuple[str, ...]:
        """The names that `make` knows."""
        return tuple(cls.name for cls in self.classes)

    def make(self, name: str, **arguments: Any) -> T:
        """The method `name` with these arguments; hyphen and underscore are alike.

        Raises:
            ValueError: unknown name, unknown or missing arguments (the valid ones are listed), values out of range.
        """
        cls = next((cls for cls in self.classes if cls.name == str(name).replace("-", "_")), None)
        if cls is None:
            raise ValueError(f"unknown {self.kind} {name!r}; the {self.kind}s are {', '.join(self.names())}")
        known = self._ordered(cls)
        unknown = [argument for argument in arguments if argument not in [f.name for f in known]]
        missing = [f.name for f in known if f.default is MISSING and f.name not in arguments]
        if unknown or missing:
            problem = f"has no argument {unknown[0]!r}" if unknown else f"needs the argument {missing[0]!r}"
            raise ValueError(f"{self.kind} {cls.name} {problem}; its arguments are: {self._signature(cls)}")
        try:
            method: T = cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{self.kind} {cls.name}: {error}") from None
        return method

    def _signature(self, cls: type[Any]) -> str:
        listed = (f.name if f.default is MISSING else f"{f.name}={f.default}" for f in self._ordered(cls))
        return ", ".join(listed) or "none"


def tuples(value: Any) -> Any:
    """Lists of plain data as tuples, all the way down."""
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def lists(value: Any) -> Any:
    """Tuples as lists, all the way down: how plans write them."""
    return [lists(v) for v in value] if isinstance(value, tuple) else value
